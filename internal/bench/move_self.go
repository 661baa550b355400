package bench

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/handoff"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// selfServer is a program that upgrades itself (handoff.Upgrader), whose sessions carry
// stateSize bytes each. Every generation prints a line when it serves, and one about
// each upgrade it has made:
//
//	serving PID ADDRESS CPU
//	moved N MICROSECONDS NEWPID CPU
//
// CPU is the processor time of the process so far, in nanoseconds.
func selfServer(_ []string, _ *bufio.Scanner, out io.Writer) error {
	if _, err := sys.RaiseNofile(); err != nil {
		return err
	}
	creds, err := newCredentials()
	if err != nil {
		return err
	}
	u, err := handoff.NewUpgrader(handoff.HandlerFunc(echoWithState), handoff.WithRest(restAfter))
	if err != nil {
		return err
	}
	addr, err := u.Listen("tcp4", "127.0.0.1:0", &ktls.Config{TLS: creds.server(aes128TLS13), Mode: ktls.ModeSoftware})
	if err != nil {
		return err
	}
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	var telling sync.Mutex // Serve ends with the upgrade, and what came of it is still to be told
	go func() {
		for range hup {
			telling.Lock()
			if r, err := u.Upgrade(); err != nil {
				fmt.Fprintln(out, "error", err)
			} else {
				cpu, _ := cpuTime()
				fmt.Fprintln(out, "moved", r.Moved, r.Moving.Microseconds(), r.PID, cpu.Nanoseconds())
			}
			telling.Unlock()
		}
	}()
	cpu, err := cpuTime()
	if err != nil {
		return err
	}
	fmt.Fprintln(out, "serving", os.Getpid(), addr, cpu.Nanoseconds())
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	defer telling.Lock()
	return u.Serve(ctx)
}

// talkingClients are clients of crypto/tls at args[0], which keep clientOrders.
func talkingClients(args []string, in *bufio.Scanner, out io.Writer) error {
	if len(args) != 1 {
		return errors.New("the address is missing")
	}
	if _, err := sys.RaiseNofile(); err != nil {
		return err
	}
	var conns []*tls.Conn
	return clientOrders(in, out, func(want int) (int, error) {
		more, err := openClients(args[0], want-len(conns))
		conns = append(conns, more...)
		return len(conns), err
	}, func(from, to int) error { return talk(conns[from:to]) })
}

func talk(conns []*tls.Conn) error {
	limit := time.Now().Add(time.Minute)
	for i, c := range conns {
		if err := c.SetDeadline(limit); err != nil {
			return err
		}
		if _, err := c.Write([]byte{byte(i)}); err != nil {
			return fmt.Errorf("client %d: %w", i, err)
		}
	}
	b := []byte{0}
	for i, c := range conns {
		if _, err := io.ReadFull(c, b); err != nil || b[0] != byte(i) {
			return fmt.Errorf("client %d: %x, %w", i, b, err)
		}
	}
	return nil
}

// selfUnit is a selfServer with its successors.
type selfUnit struct {
	child *child // the first of them
	addr  string
	pid   int // of the one in charge
}

func startSelf() (*selfUnit, error) {
	c, err := startRole("self-server")
	if err != nil {
		return nil, err
	}
	u := &selfUnit{child: c}
	line, err := c.answer()
	var cpu int64
	if err == nil {
		_, err = fmt.Sscanf(line, "serving %d %s %d", &u.pid, &u.addr, &cpu)
	}
	if err != nil {
		_ = c.stop()
		return nil, err
	}
	return u, nil
}

// turn is one upgrade: how long the move took, and the processor time of both sides.
func (u *selfUnit) turn(sessions int) (took time.Duration, cpu map[string]time.Duration, err error) {
	before, err := sys.ProcessCPU(u.pid)
	if err != nil {
		return 0, nil, err
	}
	if err := syscall.Kill(u.pid, syscall.SIGHUP); err != nil {
		return 0, nil, err
	}
	var started, at, ended int64
	var pid, moved, next int
	for at == 0 || pid == 0 {
		line, err := u.child.answer()
		if err != nil {
			return 0, nil, err
		}
		var addr string
		switch word, _, _ := strings.Cut(line, " "); word {
		case "serving":
			_, err = fmt.Sscanf(line, "serving %d %s %d", &pid, &addr, &started)
		case "moved":
			_, err = fmt.Sscanf(line, "moved %d %d %d %d", &moved, &at, &next, &ended)
		default:
			err = errors.New(line)
		}
		if err != nil {
			return 0, nil, err
		}
	}
	after, err := sys.ProcessCPU(pid)
	if err != nil {
		return 0, nil, err
	}
	if moved != sessions || next != pid {
		return 0, nil, fmt.Errorf("%d of %d sessions moved to process %d, which is %d", moved, sessions, next, pid)
	}
	u.pid = pid
	return time.Duration(at) * time.Microsecond, map[string]time.Duration{
		"old process": time.Duration(ended) - before, "new process": after - time.Duration(started)}, nil
}

func (u *selfUnit) stop() error {
	if p, err := os.FindProcess(u.pid); err == nil {
		_ = p.Signal(syscall.SIGTERM)
	}
	return u.child.stop()
}

// MeasureSelfMove is MeasureMove for a program that upgrades itself: sessions go from
// the old process to the new one, with nobody in between.
func MeasureSelfMove(o MoveOptions) (m Move, err error) {
	m = Move{ID: o.ID(), Layer: o.Layer, Sessions: o.Sessions, Rest: o.Rest, Turns: o.Turns, Self: true, Run: thisRun()}
	m.Load = loadAverage()
	u, err := startSelf()
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, u.stop()) }()
	clients, err := startRole("talking-clients", u.addr)
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, clients.stop()) }()
	if _, err := clients.order("open %d", o.Sessions); err != nil {
		return m, err
	}
	var c collected
	for range o.Turns {
		time.Sleep(4 * restAfter) // nothing tells from outside that sessions are at rest
		raw, err := rawRate(o.Sessions)
		if err != nil {
			return m, err
		}
		took, cpu, err := u.turn(o.Sessions)
		if err != nil {
			return m, err
		}
		rate := c.add(o.Sessions, took, raw, cpu)
		o.Say("  %.0f sessions a second, bare descriptors %.0f; CPU a session (µs): %s", rate, raw, describeCPU(cpu, o.Sessions))
	}
	if _, err := clients.order("echo %d", o.Sessions); err != nil {
		return m, err
	}
	c.into(&m)
	return m, nil
}
