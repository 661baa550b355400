package handoff

import (
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// When the supervisor's end is gone, what the worker owns goes on, and what may
// belong to somebody else is dropped without a trace on the connection.
func TestSupervisorGone(t *testing.T) {
	h := newStepHandler()
	p := startProc(t, h.serve)
	running, freezing, parked, adopted := software(t), software(t), software(t), software(t)
	before := countFDs(t)
	for _, s := range []*sess{running, freezing, parked} {
		p.give(s)
		h.wait(t)
	}
	p.adopt(adopted, newEpoch())
	go func() {
		for range 3 {
			h.do <- echoHandler
		}
	}()
	for _, s := range []*sess{running, freezing, parked} {
		s.say("x", "x")
	}
	e := p.freeze(parked)
	conn := p.connOf(freezing)
	release := conn.Hold()
	p.refs(wire.TypeFreeze, freezing.ref(newEpoch()))
	p.inventory()
	_ = p.ch.Close()
	running.say("no supervisor", "no supervisor")
	<-waitThawed(conn)
	release()
	freezing.say("no move either", "no move either")
	select {
	case err := <-p.done:
		t.Fatalf("Serve returned with sessions left: %v", err)
	default:
	}
	// The parked one is good for whoever has its state.
	q := startProc(t, echoHandler)
	q.adopt(parked, e)
	q.refs(wire.TypeResume, parked.ref(e))
	parked.say("elsewhere", "elsewhere")
	_ = running.cli.CloseWrite()
	_ = freezing.cli.CloseWrite()
	if err := p.result(); !errors.Is(err, ErrSupervisorGone) {
		t.Errorf("Serve: %v, want ErrSupervisorGone", err)
	}
	_ = parked.cli.CloseWrite()
	q.expect(wire.TypeClosed)
	if after := countFDs(t); after != before { // the channel of q instead of that of p
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

// waitThawed is closed when no move of c is wanted any more.
func waitThawed(c *Conn) <-chan struct{} {
	ch := make(chan struct{})
	go func() {
		defer close(ch)
		for {
			c.mu.Lock()
			m := c.moving.on
			c.mu.Unlock()
			if !m {
				return
			}
			<-time.After(time.Millisecond)
		}
	}()
	return ch
}

// What cannot be trusted ends the channel, with ErrProtocol, and costs no session.
func TestHostileSupervisor(t *testing.T) {
	s0 := wire.Ref{ID: 1, Epoch: 1}
	for name, m := range map[string]*wire.Message{
		"second WELCOME":    {Type: wire.TypeWelcome, Welcome: &wire.Welcome{Version: 1}},
		"HELLO":             {Type: wire.TypeHello, Hello: &wire.Hello{}},
		"PARKED":            {Type: wire.TypeParked},
		"GROUPED of nobody": {Type: wire.TypeGrouped},
		"GROUPED of two":    {Type: wire.TypeGrouped, Refs: []wire.Ref{s0, s0}},
	} {
		t.Run(name, func(t *testing.T) {
			p := startProc(t, echoHandler)
			s := software(t)
			p.give(s)
			s.say("x", "x")
			p.send(m)
			s.say("y", "y")
			_ = s.cli.CloseWrite()
			if err := p.result(); !errors.Is(err, ErrSupervisorGone) || !errors.Is(err, wire.ErrProtocol) {
				t.Errorf("Serve: %v", err)
			}
		})
	}
	t.Run("ADOPT before WELCOME", func(t *testing.T) {
		p := startRaw(t, echoHandler)
		s := software(t)
		before := countFDs(t)
		p.send(&wire.Message{Type: wire.TypeAdopt, Items: []wire.Item{s.item(newEpoch())}})
		if err := p.result(); !errors.Is(err, wire.ErrProtocol) {
			t.Errorf("Serve: %v", err)
		}
		if after := countFDs(t); after != before-1 { // the worker's end of the channel
			t.Errorf("%d descriptors before, %d after", before, after)
		}
	})
	t.Run("a version from the future", func(t *testing.T) {
		p := startRaw(t, echoHandler)
		p.send(&wire.Message{Type: wire.TypeWelcome, Welcome: &wire.Welcome{Version: 2}})
		if err := p.result(); !errors.Is(err, wire.ErrProtocol) || !strings.Contains(err.Error(), "version 2") {
			t.Errorf("Serve: %v", err)
		}
	})
}

// A worker without free descriptors refuses what it cannot take and keeps the rest.
func TestOutOfDescriptors(t *testing.T) {
	p := startProc(t, echoHandler)
	busy := software(t)
	p.give(busy)
	busy.say("x", "x")
	s := software(t)
	var lim syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &lim); err != nil {
		t.Fatal(err)
	}
	// The lowest free descriptor becomes the limit: nothing can be opened any more.
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	var free uintptr
	rc, _ := f.SyscallConn()
	_ = rc.Control(func(fd uintptr) { free = fd })
	_ = f.Close()
	restore := func() { _ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &lim) }
	defer restore()
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: uint64(free), Max: lim.Max}); err != nil {
		t.Fatal(err)
	}
	e := newEpoch()
	p.send(&wire.Message{Type: wire.TypeAdopt, Items: []wire.Item{s.item(e)}})
	m := p.expect(wire.TypeRefused)
	if m.Refused[0].Ref != s.ref(e) || !strings.Contains(m.Refused[0].Why, "NOFILE") {
		t.Errorf("REFUSED %+v", m.Refused)
	}
	// A large state needs a memory file; without one the session stays and goes on.
	p.connOf(busy).SetState(make([]byte, 1<<20))
	p.refs(wire.TypeFreeze, busy.ref(newEpoch()))
	busy.say("after a move that failed", "after a move that failed")
	p.quiet(wire.TypeParked)
	restore()
	p.give(s)
	s.say("now there is room", "now there is room")
}

func TestInventoryInParts(t *testing.T) {
	p := startProc(t, echoHandler)
	const n = wire.MaxItems + 3
	want := map[uint64]wire.Phase{}
	var all []*sess
	for i := range n {
		s := software(t)
		all = append(all, s)
		switch i % 3 {
		case 0:
			p.adopt(s, newEpoch())
			want[s.id] = wire.PhaseAdopted
		case 1:
			p.give(s)
			want[s.id] = wire.PhaseActive
		default:
			p.give(s)
			p.freeze(s)
			want[s.id] = wire.PhaseParked
		}
	}
	got := p.inventory()
	if len(got) != n {
		t.Fatalf("%d sessions, want %d", len(got), n)
	}
	for id, ph := range want {
		if got[id].Phase != ph {
			t.Errorf("session %d: %+v, want phase %d", id, got[id], ph)
		}
	}
	p.stop()
	for _, s := range all {
		s.close()
	}
}
