package bench

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime/pprof"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/ktlsvisor/ktlsvisor/handoff"
	"github.com/ktlsvisor/ktlsvisor/internal/config"
	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/supervise"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// Of what the environment of a unit says.
const (
	envLayer   = "KTLSVISOR_BENCH_LAYER"   // kernel or software
	envRest    = "KTLSVISOR_BENCH_REST"    // "1": workers give idle sessions a rest
	envWorkers = "KTLSVISOR_BENCH_WORKERS" // how many
	envProfile = "KTLSVISOR_BENCH_PROFILE" // folder for CPU profiles, from SIGUSR1 on
)

// stateSize is what the application of every session takes along.
const stateSize = 1 << 10

// restAfter is when an idle session gets its rest, where sessions do.
const restAfter = 200 * time.Millisecond

// moveUnit is keeper, supervisor or worker of a unit whose sessions are crafted; which,
// says its first argument, as with ktlsvisor itself.
func moveUnit(args []string, _ *bufio.Scanner, out io.Writer) error {
	if len(args) == 0 {
		return errors.New("which part of the unit?")
	}
	endProfile, err := profileOnSignal(args[0])
	if err != nil {
		return err
	}
	defer endProfile()
	log := hclog.New(&hclog.LoggerOptions{Level: hclog.Info, Output: os.Stderr})
	switch args[0] {
	case "run":
		return moveKeeper(args[1:], log)
	case "supervise":
		code := supervise.MainCrafting(context.Background(), log, "bench", craftServer(os.Getenv(envLayer) == "kernel"))
		if code != 0 {
			return fmt.Errorf("exit code %d", code)
		}
		return nil
	case "worker":
		return moveWorker(out)
	}
	return fmt.Errorf("no such part: %q", args[0])
}

func moveKeeper(args []string, log hclog.Logger) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	workers, err := strconv.Atoi(os.Getenv(envWorkers))
	if err != nil {
		return fmt.Errorf("%s: %w", envWorkers, err)
	}
	cfg, err := config.FromFlags(config.Flags{Admin: args[1], Listen: []string{"127.0.0.1:0"}, SelfSigned: true,
		Workers: workers, Pool: "bench", Offload: os.Getenv(envLayer), Command: []string{self, "worker"}})
	if err != nil {
		return err
	}
	cfg.MaxSessions = 1 << 17
	// Emulated machines take long for everything.
	cfg.Pools[0].ReadyTimeout, cfg.Pools[0].FreezeTimeout = config.Duration(time.Minute), config.Duration(time.Minute)
	cfg.Pools[0].HangTimeout = config.Duration(2 * time.Minute)
	cfg.Pools[0].Env = map[string]string{}
	for _, name := range []string{envRole, envRest, envProfile} {
		if v := os.Getenv(name); v != "" {
			cfg.Pools[0].Env[name] = v
		}
	}
	data, err := cfg.Encode()
	if err != nil {
		return err
	}
	blob, err := sys.SealedMemfd("ktlsvisor-config", data)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	code, err := keeper.Run(ctx, keeper.Config{Supervisor: []string{self, "supervise"}, Log: log, Output: os.Stderr,
		Initial: []keeper.Entry{{Key: keeper.Key{Kind: keeper.KindBlob, Name: supervise.ConfigName}, FDs: []int{blob}}}})
	if err == nil && code != 0 {
		err = fmt.Errorf("exit code %d", code)
	}
	return err
}

const releasedMark = "BENCH RELEASED "

// echoWithState echoes. Every session carries stateSize bytes that say which it is.
func echoWithState(_ context.Context, c *handoff.Conn) error {
	st := c.State()
	switch {
	case st == nil:
		st = make([]byte, stateSize)
		binary.LittleEndian.PutUint64(st, c.ID())
		c.SetState(st)
	case len(st) != stateSize || binary.LittleEndian.Uint64(st) != c.ID():
		return fmt.Errorf("session %d came with the state of another", c.ID())
	}
	_, err := io.Copy(c, c)
	return err
}

// moveWorker serves with echoWithState. When it has given everything away it prints when
// that was.
func moveWorker(out io.Writer) error {
	if _, err := sys.RaiseNofile(); err != nil {
		return err
	}
	var opts []handoff.Option
	if os.Getenv(envRest) == "1" {
		opts = append(opts, handoff.WithRest(restAfter))
	}
	err := handoff.Serve(context.Background(), handoff.HandlerFunc(echoWithState), opts...)
	cpu, cerr := cpuTime()
	if cerr != nil {
		return cerr
	}
	fmt.Fprintf(out, "%s%d %d %d\n", releasedMark, os.Getpid(), sys.Monotonic(), cpu.Nanoseconds())
	return err
}

// profileOnSignal writes a CPU profile from SIGUSR1 on to the end of the process; no
// profile without envProfile.
func profileOnSignal(part string) (end func(), err error) {
	dir := os.Getenv(envProfile)
	if dir == "" {
		return func() {}, nil
	}
	sig := make(chan os.Signal, 2)
	signal.Notify(sig, syscall.SIGUSR1, syscall.SIGUSR2)
	if part == "worker" {
		sig <- syscall.SIGUSR1
	}
	var mu sync.Mutex
	go func() {
		for s := range sig {
			mu.Lock()
			if s == syscall.SIGUSR2 {
				pprof.StopCPUProfile()
			} else if f, err := os.Create(fmt.Sprintf("%s/%s-%d.prof", dir, part, os.Getpid())); err == nil {
				_ = pprof.StartCPUProfile(f)
			}
			mu.Unlock()
		}
	}()
	return func() {
		mu.Lock()
		defer mu.Unlock()
		pprof.StopCPUProfile()
	}, nil
}

// perAddress is how many clients share a loopback address: a third of the ports that the
// kernel first tries, because it looks for a free one from port to port.
const perAddress = 5000

// thinClients holds clients of crafted sessions at args[0], which keep clientOrders.
func thinClients(args []string, in *bufio.Scanner, out io.Writer) error {
	if len(args) != 1 {
		return errors.New("the address is missing")
	}
	if _, err := sys.RaiseNofile(); err != nil {
		return err
	}
	var socks []*net.TCPConn
	var conns []*ktls.Conn
	return clientOrders(in, out, func(want int) (n int, err error) {
		for len(socks) < want && err == nil {
			var more []*net.TCPConn
			more, err = openThin(args[0], len(socks), min(want-len(socks), openTogether))
			socks = append(socks, more...)
		}
		return len(socks), err
	}, func(from, to int) error {
		for len(conns) < to {
			c, err := craftClient(socks[len(conns)])
			if err != nil {
				return err
			}
			conns = append(conns, c)
		}
		return echoAll(conns[from:to])
	})
}

// clientOrders reads the orders of those who measure and answers each: "open N": let
// there be N clients, and say how many there are; "echo N": each of the first N that has
// not yet done so sends a byte and wants it back.
func clientOrders(in *bufio.Scanner, out io.Writer, open func(want int) (int, error), echo func(from, to int) error) error {
	clients, echoed := 0, 0
	for in.Scan() {
		word, arg, _ := strings.Cut(in.Text(), " ")
		n, err := strconv.Atoi(arg)
		switch {
		case err != nil:
		case word == "open":
			clients, err = open(n)
		case word == "echo" && n >= echoed && n <= clients:
			err = echo(echoed, n)
			echoed = n
		default:
			err = fmt.Errorf("no such order: %q", in.Text())
		}
		if err != nil {
			fmt.Fprintln(out, "error", err)
			continue
		}
		fmt.Fprintln(out, clients)
	}
	return in.Err()
}

// openTogether is how many clients connect at a time: where switching between processes
// takes longest, in emulated machines, one at a time takes several times as long.
const openTogether = 256

// openThin opens n clients, of which there are already at.
func openThin(addr string, at, n int) (socks []*net.TCPConn, err error) {
	for i := range n {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(2+(at+i)/perAddress))}, KeepAlive: -1, Control: portLater}
		d.SetMultipathTCP(false)
		c, err := d.Dial("tcp4", addr)
		if err != nil {
			return socks, err
		}
		socks = append(socks, c.(*net.TCPConn))
		if _, err := c.Write([]byte{0}); err != nil {
			return socks, err
		}
	}
	limit := time.Now().Add(2 * time.Minute)
	for _, c := range socks {
		if err := c.SetReadDeadline(limit); err != nil {
			return socks, err
		}
		if _, err := c.Read([]byte{0}); err != nil {
			return socks, err
		}
		if err := c.SetReadDeadline(time.Time{}); err != nil {
			return socks, err
		}
	}
	return socks, nil
}

// portLater leaves the choice of a port to connect, where only pairs of addresses must
// differ (IP_BIND_ADDRESS_NO_PORT of ip(7), Linux 4.2).
func portLater(_, _ string, rc syscall.RawConn) (err error) {
	if cerr := rc.Control(func(fd uintptr) {
		err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IP, 24, 1)
	}); cerr != nil {
		return cerr
	}
	return err
}

// echoAll sends a byte everywhere and then reads it everywhere.
func echoAll(conns []*ktls.Conn) error {
	for i, c := range conns {
		if _, err := c.Write([]byte{byte(i)}); err != nil {
			return fmt.Errorf("client %d: %w", i, err)
		}
		c.Trim()
	}
	limit := time.Now().Add(2 * time.Minute)
	for i, c := range conns {
		b := make([]byte, 2)
		if err := c.SetReadDeadline(limit); err != nil {
			return err
		}
		n, err := c.Read(b)
		if err != nil || n != 1 || b[0] != byte(i) {
			return fmt.Errorf("client %d: %d bytes, %x, %w", i, n, b[:n], err)
		}
		c.Trim()
	}
	return nil
}
