package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The whole promise with real programs: members of one room talk without a
// pause while ktlsvisor replaces release 1 by release 2, then its supervisor.
// Each hears every line of every other exactly once and in order; the line that
// one of them was typing goes on; and it is the new release that serves them.
func TestUpgradeWithRealPrograms(t *testing.T) {
	if testing.Short() {
		t.Skip("builds and runs programs; left out by -short")
	}
	dir := t.TempDir()
	build(t, filepath.Join(dir, "ktlsvisor"), "github.com/ktlsvisor/ktlsvisor/cmd/ktlsvisor")
	build(t, filepath.Join(dir, "chat1"), ".")
	build(t, filepath.Join(dir, "chat2"), "-ldflags=-X main.stateVersion=2", ".")
	v := startVisor(t, dir, "chat1")

	const members = 6
	clients := make([]*talker, members)
	for i := range clients {
		clients[i] = dialTalker(t, v.addr, i)
		clients[i].types("/nick n%d\n/join ops\n", i)
		clients[i].waitFor("* you are in ops")
	}
	for _, c := range clients[:members-1] {
		c.waitFor(fmt.Sprintf("* n%d joined ops", members-1))
	}
	typist := clients[0]
	before := typist.version()
	if !strings.Contains(before, "state version 1") {
		t.Fatalf("at first: %s", before)
	}
	typist.types("half-")

	// All but the typist talk from here to the end.
	quiet := make(chan struct{})
	var talking sync.WaitGroup
	said := make([]int, members)
	for i, c := range clients[1:] {
		talking.Go(func() {
			tick := time.NewTicker(3 * time.Millisecond)
			defer tick.Stop()
			for {
				c.types("line %d\n", said[i+1])
				said[i+1]++
				select {
				case <-quiet:
					return
				case <-tick.C:
				}
			}
		})
	}
	v.command("upgrade", "--command", filepath.Join(dir, "chat2"))
	v.command("upgrade", "--supervisor")
	v.command("upgrade")
	close(quiet)
	talking.Wait()
	typist.types("typed\n")

	for i, c := range clients {
		for j := range clients {
			if j != i && j != 0 {
				c.waitFor(fmt.Sprintf("<n%d> line %d", j, said[j]-1))
			}
		}
		if i != 0 {
			c.waitFor("<n0> half-typed")
		}
	}
	for i, c := range clients {
		next := make([]int, members)
		for _, line := range c.all() {
			var from, n int
			if _, err := fmt.Sscanf(line, "<n%d> line %d", &from, &n); err != nil {
				continue
			}
			if n != next[from] {
				t.Fatalf("member %d heard line %d of member %d when line %d was next", i, n, from, next[from])
			}
			next[from]++
		}
		for j := range clients {
			if j != i && next[j] != said[j] {
				t.Errorf("member %d heard %d of %d lines of member %d", i, next[j], said[j], j)
			}
		}
	}
	after := typist.version()
	if !strings.Contains(after, "state version 2") {
		t.Errorf("after the upgrade: %s", after)
	}
	typist.types("/away at lunch\n/who\n")
	typist.waitFor("* - n0 (away: at lunch)")
	typist.waitFor(fmt.Sprintf("* - n%d", members-1))

	// The way back is refused, and costs nobody anything.
	if out, err := v.try("upgrade", "--command", filepath.Join(dir, "chat1")); exitCode(err) != 1 {
		t.Errorf("an upgrade to release 1 exits with %d, want 1:\n%s", exitCode(err), out)
	}
	if now := typist.version(); now != after {
		t.Errorf("after a refused upgrade %q serves, before it was %q", now, after)
	}
	for i, c := range clients {
		c.types("/quit\n")
		if err := c.end(); err != nil {
			t.Errorf("member %d: the connection ended with %v", i, err)
		}
	}
	t.Logf("lines said: %v", said[1:])
}

func build(t *testing.T, out string, args ...string) {
	t.Helper()
	cmd := exec.Command("go", append([]string{"build", "-o", out}, args...)...)
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build %v: %v\n%s", args, err, msg)
	}
}

func exitCode(err error) int {
	if e, ok := errors.AsType[*exec.ExitError](err); ok {
		return e.ExitCode()
	}
	if err != nil {
		return -1
	}
	return 0
}

// A visor is a ktlsvisor that runs for the test.
type visor struct {
	t       *testing.T
	program string
	admin   string
	addr    string
	log     *logFile
}

// A logFile is written by the visor and read when the test fails.
type logFile struct{ path string }

func (l *logFile) String() string {
	b, err := os.ReadFile(l.path)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-16<<10):])
}

func startVisor(t *testing.T, dir, worker string) *visor {
	t.Helper()
	v := &visor{t: t, program: filepath.Join(dir, "ktlsvisor"), admin: filepath.Join(dir, "a.sock"), log: &logFile{filepath.Join(dir, "log")}}
	log, err := os.Create(v.log.path)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(v.program, "run", "--listen", "127.0.0.1:0", "--self-signed", "--workers", "2",
		"--admin", v.admin, "--", filepath.Join(dir, worker))
	cmd.Stderr = log
	cmd.Stdout = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(20 * time.Second):
			t.Error("ktlsvisor has not ended 20 s after SIGTERM")
			syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			<-ended
		}
		if t.Failed() {
			t.Logf("the log of ktlsvisor:\n%s", v.log)
		}
	})
	poll(t, "ktlsvisor serving", 20*time.Second, func() bool {
		out, err := v.try("status", "--json")
		var s struct {
			Listeners []struct {
				Address string `json:"address"`
			} `json:"listeners"`
			Pools []struct {
				Workers []struct {
					State string `json:"state"`
				} `json:"workers"`
			} `json:"pools"`
		}
		if err != nil || json.Unmarshal(out, &s) != nil || len(s.Listeners) == 0 || len(s.Pools) == 0 {
			return false
		}
		for _, w := range s.Pools[0].Workers {
			if w.State != "ready" {
				return false
			}
		}
		v.addr = s.Listeners[0].Address
		return len(s.Pools[0].Workers) == 2
	})
	return v
}

func (v *visor) try(args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(v.t.Context(), time.Minute)
	defer cancel()
	return exec.CommandContext(ctx, v.program, append(args, "--admin", v.admin)...).CombinedOutput()
}

func (v *visor) command(args ...string) {
	v.t.Helper()
	began := time.Now()
	if out, err := v.try(args...); err != nil {
		v.t.Fatalf("ktlsvisor %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	v.t.Logf("ktlsvisor %s: %v", strings.Join(args, " "), time.Since(began).Round(time.Millisecond))
}

// poll waits for something that happens in another process.
func poll(t *testing.T, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(limit); !ok(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("no %s after %v", what, limit)
		}
	}
}

// A talker is a stock TLS client that keeps every line it was sent.
type talker struct {
	t    *testing.T
	n    int
	conn *tls.Conn

	mu      sync.Mutex
	changed *sync.Cond
	lines   []string
	err     error // how the connection ended
}

func dialTalker(t *testing.T, addr string, n int) *talker {
	t.Helper()
	d := &net.Dialer{Timeout: 10 * time.Second}
	conn, err := tls.DialWithDialer(d, "tcp", addr, &tls.Config{InsecureSkipVerify: true}) // self-signed
	if err != nil {
		t.Fatal(err)
	}
	c := &talker{t: t, n: n, conn: conn}
	c.changed = sync.NewCond(&c.mu)
	done := make(chan struct{})
	go func() {
		defer close(done)
		lines := bufio.NewScanner(conn)
		for lines.Scan() {
			c.mu.Lock()
			c.lines = append(c.lines, lines.Text())
			c.changed.Broadcast()
			c.mu.Unlock()
		}
		c.mu.Lock()
		c.err = cmpErr(lines.Err())
		c.changed.Broadcast()
		c.mu.Unlock()
	}()
	t.Cleanup(func() {
		conn.Close()
		<-done
	})
	return c
}

// cmpErr makes the end that a Scanner does not report visible.
func cmpErr(err error) error {
	if err == nil {
		return io.EOF
	}
	return err
}

func (c *talker) types(format string, a ...any) {
	if _, err := fmt.Fprintf(c.conn, format, a...); err != nil {
		c.t.Errorf("member %d cannot send: %v", c.n, err)
	}
}

// find waits for a line that match accepts, from line number from on.
func (c *talker) find(what string, from int, match func(string) bool) string {
	c.t.Helper()
	const limit = 20 * time.Second
	deadline := time.Now().Add(limit)
	wake := time.AfterFunc(limit, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.changed.Broadcast()
	})
	defer wake.Stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := from; ; {
		for ; i < len(c.lines); i++ {
			if match(c.lines[i]) {
				return c.lines[i]
			}
		}
		if c.err != nil || !time.Now().Before(deadline) {
			c.t.Fatalf("member %d was not sent %q (the connection: %v); the last of its %d lines:\n%s",
				c.n, what, c.err, len(c.lines), strings.Join(c.lines[max(0, len(c.lines)-10):], "\n"))
		}
		c.changed.Wait()
	}
}

func (c *talker) waitFor(line string) {
	c.t.Helper()
	c.find(line, 0, func(s string) bool { return s == line })
}

// version asks which program serves.
func (c *talker) version() string {
	c.t.Helper()
	from := len(c.all())
	c.types("/version\n")
	const answer = "* chat with state version"
	return c.find(answer, from, func(s string) bool { return strings.HasPrefix(s, answer) })
}

func (c *talker) all() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lines[:len(c.lines):len(c.lines)]
}

// end waits for the connection to end and says how, nil for close_notify.
func (c *talker) end() error {
	c.t.Helper()
	poll(c.t, "end of the connection", 10*time.Second, func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.err != nil
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	if errors.Is(c.err, io.EOF) {
		return nil
	}
	return c.err
}
