package handoff

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
	"github.com/ktlsvisor/ktlsvisor/state"
)

// childEnv makes the test binary a worker.
const childEnv = "KTLSVISOR_TEST_HANDOFF_CHILD"

func child() int {
	schema := state.Info{Name: "test", Writes: 2, Restores: []uint32{1, 2}}
	ready := func(context.Context) error {
		if _, there := os.LookupEnv(wire.EnvFD); there {
			return errors.New("the channel is still in the environment")
		}
		if os.Getenv(childEnv) == "unready" {
			return errors.New("no database")
		}
		return nil
	}
	err := Serve(context.Background(), HandlerFunc(echoHandler), WithName("child/1"), WithSchemas(schema), WithReady(ready))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 3
	}
	return 0
}

type childProc struct {
	*proc
	cmd *exec.Cmd
	err strings.Builder
}

// startChild starts a worker process; withChannel false leaves its channel out.
func startChild(t *testing.T, kind string, withChannel bool) *childProc {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	a, b, err := sys.PacketPair()
	if err != nil {
		t.Fatal(err)
	}
	peer := os.NewFile(uintptr(b), "peer")
	defer func() { _ = peer.Close() }()
	c := &childProc{proc: &proc{t: t, msgs: make(chan *wire.Message, 100)}, cmd: exec.Command(exe)}
	c.cmd.Env = append(os.Environ(), childEnv+"="+kind)
	c.cmd.Stderr = &c.err
	if withChannel {
		c.cmd.Env = append(c.cmd.Env, fmt.Sprintf("%s=%d", wire.EnvFD, wire.ChannelFD))
		c.cmd.ExtraFiles = []*os.File{peer}
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if c.ch, err = wire.NewChannel(a); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(c.msgs)
		for {
			m, err := c.ch.Recv()
			if err != nil {
				return
			}
			c.msgs <- m
		}
	}()
	t.Cleanup(func() {
		_ = c.ch.Close()
		_ = c.cmd.Process.Kill()
		_ = c.cmd.Wait()
	})
	return c
}

func (c *childProc) exit(want int) {
	c.t.Helper()
	timer := time.AfterFunc(patience, func() { _ = c.cmd.Process.Kill() })
	defer timer.Stop()
	_ = c.cmd.Wait()
	if got := c.cmd.ProcessState.ExitCode(); got != want {
		c.t.Fatalf("exit code %d, want %d; it said: %s", got, want, c.err.String())
	}
}

func (c *childProc) welcome() {
	c.t.Helper()
	c.send(&wire.Message{Type: wire.TypeWelcome, Welcome: &wire.Welcome{Version: 1, Worker: 1, Pool: "test", FreezeTimeout: 5000}})
}

func TestServeInProcessOfItsOwn(t *testing.T) {
	c := startChild(t, "echo", true)
	h := c.expect(wire.TypeHello).Hello
	if h.PID != c.cmd.Process.Pid || h.Name != "child/1" || h.Min != 1 || h.Max != 1 || len(h.Schemas) != 1 || h.Schemas[0].Writes != 2 {
		t.Fatalf("HELLO %+v", h)
	}
	c.welcome()
	c.expect(wire.TypeReady)
	s := newSession(t, ktls.ModeSoftware, 0)
	c.give(s)
	s.say("to the child", "to the child")

	// Ctrl-C in a terminal, and a service manager that signals every process.
	for _, sig := range []os.Signal{syscall.SIGINT, syscall.SIGTERM} {
		if err := c.cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
	}
	s.say("still here", "still here")

	other := startProc(t, echoHandler)
	move(s, c.proc, other)
	s.say("moved to another process", "moved to another process")
	move(s, other, c.proc)
	s.say("and back", "and back")

	c.send(&wire.Message{Type: wire.TypeStop, Millis: 2000})
	c.expectClosed(s, wire.ReasonOperator)
	s.eof()
	c.exit(0)
	if n := strings.Count(c.err.String(), "signal ignored"); n != 2 {
		t.Errorf("%d lines about signals, want 2: %s", n, c.err.String())
	}
}

func TestServeWithoutSupervisor(t *testing.T) {
	c := startChild(t, "echo", false)
	c.exit(3)
	if want := "ktlsvisor run --listen"; !strings.Contains(c.err.String(), want) {
		t.Fatalf("the message does not say %q: %s", want, c.err.String())
	}
}

func TestServeRefusesOtherDescriptors(t *testing.T) {
	for _, v := range []string{"", "x", "-1", "0", "999999"} {
		t.Setenv(wire.EnvFD, v)
		if err := Serve(t.Context(), HandlerFunc(echoHandler)); !errors.Is(err, ErrNoSupervisor) {
			t.Errorf("%s=%q: error %v, want ErrNoSupervisor", wire.EnvFD, v, err)
		}
	}
}

func TestNotReady(t *testing.T) {
	c := startChild(t, "unready", true)
	c.expect(wire.TypeHello)
	c.welcome()
	c.exit(3)
	if !strings.Contains(c.err.String(), "no database") {
		t.Fatalf("the reason is missing: %s", c.err.String())
	}
}
