package handoff

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// A move that is called off while the handler runs is not even noticed by a handler
// that does not look.
func TestThawWhileRunning(t *testing.T) {
	h, p, s, c := stepping(t)
	e := newEpoch()
	p.refs(wire.TypeFreeze, s.ref(e))
	<-c.Moving()
	if got := p.inventory()[s.id]; got.Phase != wire.PhaseFreezing || got.Attempt != e || got.Epoch != s.epoch {
		t.Errorf("inventory while freezing: %+v", got)
	}
	if n, err := c.Write([]byte("queued")); n != 6 || err != nil {
		t.Fatalf("Write while moving: %d, %v", n, err)
	}
	p.refs(wire.TypeThaw, s.ref(e))
	s.read("queued") // sent without another Write
	h.do <- func(_ context.Context, c *Conn) error {
		if _, err := io.CopyN(c, c, 5); err != nil {
			return err
		}
		return errNext
	}
	s.say("hello", "hello")
	select {
	case <-c.Moving():
		t.Error("Moving is still closed")
	default:
	}
	p.quiet(wire.TypeParked)
	close(h.do)
	p.expectClosed(s, wire.ReasonOwner)
}

// A handler that returns ErrMoving after the move was called off is started again,
// with its state, on the same Conn.
func TestThawCrossesReturn(t *testing.T) {
	h, p, s, c := stepping(t)
	e := newEpoch()
	p.refs(wire.TypeFreeze, s.ref(e))
	<-c.Moving()
	h.do <- func(_ context.Context, c *Conn) error {
		defer func() { _ = c.Close() }() // what many handlers do; it must not end the session
		_, err := c.Read(make([]byte, 1))
		p.refs(wire.TypeThaw, s.ref(e))
		p.inventory() // the THAW is handled
		c.SetState([]byte("mine"))
		return err
	}
	again := h.wait(t)
	if again != c || string(again.State()) != "mine" || !again.Restored() {
		t.Errorf("restarted with state %q, restored %v, the same Conn %v", again.State(), again.Restored(), again == c)
	}
	p.quiet(wire.TypeParked)
	h.do <- echoHandler
	s.say("on it goes", "on it goes")
	_ = s.cli.CloseWrite()
	p.expectClosed(s, wire.ReasonPeer)
	close(h.do)
}

func TestThawOfParked(t *testing.T) {
	h, p, s, c := stepping(t)
	go func() {
		h.do <- func(_ context.Context, c *Conn) error {
			c.SetState([]byte("kept"))
			return readMoving(context.TODO(), c)
		}
	}()
	e := p.freeze(s)
	if got := p.inventory()[s.id]; got.Phase != wire.PhaseParked || got.Attempt != e || got.Epoch != s.epoch {
		t.Errorf("inventory while parked: %+v", got)
	}
	if _, err := c.Write([]byte("x")); !errors.Is(err, ErrMoving) {
		t.Errorf("Write while parked: %v, want ErrMoving", err)
	}
	s.write("sent while nobody listens")
	p.refs(wire.TypeThaw, s.ref(e))
	if again := h.wait(t); again != c || string(again.State()) != "kept" {
		t.Errorf("state %q", again.State())
	}
	h.do <- echoHandler
	s.read("sent while nobody listens")
	s.say("on", "on")
	_ = s.cli.CloseWrite()
	p.expectClosed(s, wire.ReasonPeer)
	close(h.do)
}

// Messages of attempts that are over change nothing.
func TestStaleEpochs(t *testing.T) {
	a, b := startProc(t, echoHandler), startProc(t, echoHandler)
	s := software(t)
	e0 := newEpoch()
	a.adopt(s, e0)
	s.epoch = e0
	a.refs(wire.TypeResume, s.ref(e0-1), s.ref(e0+1)) // not its epoch: not resumed
	a.refs(wire.TypeRelease, s.ref(e0))
	a.refs(wire.TypeFreeze, s.ref(e0+5))
	if got := a.inventory()[s.id].Phase; got != wire.PhaseAdopted {
		t.Fatalf("phase %d after stale messages, want adopted", got)
	}
	a.refs(wire.TypeResume, s.ref(e0))
	a.refs(wire.TypeResume, s.ref(e0)) // again, after a supervisor's restart
	s.say("1", "1")

	old := newEpoch()
	a.refs(wire.TypeFreeze, s.ref(old))
	a.parked(s, old)
	now := newEpoch()
	a.refs(wire.TypeThaw, s.ref(old))
	a.refs(wire.TypeFreeze, s.ref(now))
	a.parked(s, now)
	a.refs(wire.TypeThaw, s.ref(old))    // late
	a.refs(wire.TypeRelease, s.ref(old)) // late
	a.refs(wire.TypeAbort, s.ref(old), s.ref(now))
	a.refs(wire.TypeFreeze, s.ref(old))
	if got := a.inventory()[s.id]; got.Phase != wire.PhaseParked || got.Attempt != now {
		t.Fatalf("after stale messages: %+v", got)
	}
	// A newer attempt takes the place of one that the supervisor forgot.
	newest := newEpoch()
	a.refs(wire.TypeFreeze, s.ref(newest))
	a.parked(s, newest)
	a.refs(wire.TypeRelease, s.ref(now)) // of the forgotten one
	b.adopt(s, newest)
	s.epoch = newest
	b.refs(wire.TypeResume, s.own())
	a.refs(wire.TypeRelease, s.own())
	s.say("2", "2")
	if got := a.inventory(); len(got) != 0 {
		t.Errorf("the old owner still has %+v", got)
	}
	unknown := wire.Ref{ID: 1 << 60, Epoch: newEpoch()}
	for _, typ := range []wire.Type{wire.TypeFreeze, wire.TypeThaw, wire.TypeResume, wire.TypeRelease, wire.TypeAbort, wire.TypeClosedAck, wire.TypeClose, wire.TypeGrouped} {
		b.refs(typ, unknown)
	}
	b.refs(wire.TypeClose, s.ref(s.epoch-1))
	s.say("3", "3")
}

func TestAdoptTwice(t *testing.T) {
	p := startProc(t, echoHandler)
	s := software(t)
	before := countFDs(t)
	e := newEpoch()
	p.adopt(s, e)
	p.adopt(s, e) // idempotent
	refused := func(e wire.Epoch, word string) {
		t.Helper()
		p.send(&wire.Message{Type: wire.TypeAdopt, Items: []wire.Item{s.item(e)}})
		m := p.expect(wire.TypeRefused)
		if m.Refused[0].Ref != s.ref(e) || !strings.Contains(m.Refused[0].Why, word) {
			t.Errorf("REFUSED %+v, want %q", m.Refused, word)
		}
	}
	refused(newEpoch(), "still here")
	p.refs(wire.TypeResume, s.ref(e))
	s.epoch = e
	s.say("x", "x")
	refused(newEpoch(), "still here")
	try := p.freeze(s)
	refused(newEpoch(), "still here")
	p.refs(wire.TypeRelease, s.ref(try))
	p.give(s) // released: it may come back
	s.say("y", "y")
	_ = s.cli.CloseWrite()
	p.expectClosed(s, wire.ReasonPeer)
	refused(newEpoch(), "ended here")
	p.refs(wire.TypeClosedAck, s.own())
	p.inventory()
	if after := countFDs(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}
