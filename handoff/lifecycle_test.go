package handoff

import (
	"context"
	"errors"
	"io"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

func software(t *testing.T) *sess {
	t.Helper()
	return newSession(t, ktls.ModeSoftware, 0)
}

// A move that is called off while the handler runs is not even noticed by a handler
// that does not look.
func TestThawWhileRunning(t *testing.T) {
	h := newStepHandler()
	p := startProc(t, h.serve)
	s := software(t)
	p.give(s)
	c := h.wait(t)
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
	h := newStepHandler()
	p := startProc(t, h.serve)
	s := software(t)
	p.give(s)
	c := h.wait(t)
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
	h := newStepHandler()
	p := startProc(t, h.serve)
	s := software(t)
	p.give(s)
	c := h.wait(t)
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

// A handler that holds gets its input and sends its output although a move is wanted.
func TestHold(t *testing.T) {
	h := newStepHandler()
	p := startProc(t, h.serve)
	s := software(t)
	p.give(s)
	c := h.wait(t)
	h.do <- func(_ context.Context, c *Conn) error {
		release := c.Hold()
		buf := make([]byte, 4)
		for range 2 { // the second part comes after FREEZE
			if _, err := io.ReadFull(c, buf); err != nil {
				return err
			}
			if _, err := c.Write(buf); err != nil {
				return err
			}
		}
		release()
		release()
		_, err := c.Read(buf)
		return err
	}
	s.say("1234", "1234")
	e := newEpoch()
	p.refs(wire.TypeFreeze, s.ref(e))
	<-c.Moving()
	s.say("5678", "5678")
	p.parked(s, e)
	p.refs(wire.TypeRelease, s.ref(e))
	p.inventory()
}

// The application's deadlines are its own: an interrupt by a move does not change
// them.
func TestDeadlines(t *testing.T) {
	h := newStepHandler()
	p := startProc(t, h.serve)
	s := software(t)
	p.give(s)
	c := h.wait(t)
	_ = c.SetReadDeadline(time.Now().Add(-time.Second))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("expired deadline: %v", err)
	}
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("deadline: %v", err)
	}
	limit := time.Now().Add(300 * time.Millisecond)
	_ = c.SetReadDeadline(limit)
	e := newEpoch()
	p.refs(wire.TypeFreeze, s.ref(e))
	<-c.Moving()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, ErrMoving) {
		t.Fatalf("Read while moving: %v", err)
	}
	p.refs(wire.TypeThaw, s.ref(e))
	p.inventory()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("deadline after THAW: %v", err)
	}
	if time.Now().Before(limit) {
		t.Error("the deadline was too early")
	}
	_ = c.SetReadDeadline(time.Time{})
	s.write("z")
	if n, err := c.Read(make([]byte, 1)); n != 1 || err != nil {
		t.Errorf("Read: %d, %v", n, err)
	}
	close(h.do)
}

// Every end of a session is reported with its reason.
func TestReasons(t *testing.T) {
	errApp := errors.New("out of cheese")
	for _, tc := range []struct {
		name   string
		h      HandlerFunc
		client func(*sess)
		want   wire.Reason
		text   string
	}{
		{"peer closes", echoHandler, func(s *sess) { _ = s.cli.CloseWrite() }, wire.ReasonPeer, ""},
		{"peer vanishes", echoHandler, func(s *sess) { _ = s.tcp().Close() }, wire.ReasonPeerAbrupt, "close_notify"},
		{"peer resets", echoHandler, func(s *sess) {
			_ = s.tcp().SetLinger(0)
			_ = s.tcp().Close()
		}, wire.ReasonPeerAbrupt, "reset"},
		{"garbage", echoHandler, func(s *sess) {
			_, _ = s.tcp().Write([]byte("\x17\x03\x03\x00\x20 this is not an encrypted record "))
		}, wire.ReasonProtocol, "bad_record_mac"},
		{"handler returns nil", func(context.Context, *Conn) error { return nil }, nil, wire.ReasonOwner, ""},
		{"handler closes", func(_ context.Context, c *Conn) error { _ = c.Close(); return errApp }, nil, wire.ReasonOwner, "cheese"},
		{"idle limit", func(_ context.Context, c *Conn) error {
			_ = c.SetReadDeadline(time.Now())
			_, err := c.Read(make([]byte, 1))
			return err
		}, nil, wire.ReasonOwner, "timeout"},
		{"handler fails", func(context.Context, *Conn) error { return errApp }, nil, wire.ReasonHandler, "cheese"},
		{"handler panics", func(context.Context, *Conn) error { panic("ouch") }, nil, wire.ReasonHandler, "ouch"},
		{"handler ends its goroutine", func(context.Context, *Conn) error { runtime.Goexit(); return nil }, nil, wire.ReasonHandler, "Goexit"},
		{"ErrMoving out of nothing", func(context.Context, *Conn) error { return ErrMoving }, nil, wire.ReasonHandler, "moving"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := startProc(t, tc.h)
			s := software(t)
			before := countFDs(t)
			p.give(s)
			if tc.client != nil {
				tc.client(s)
			}
			c := p.expectClosed(s, tc.want)
			if !strings.Contains(c.Text, tc.text) {
				t.Errorf("text %q, want %q", c.Text, tc.text)
			}
			if tc.client == nil {
				s.eof() // close_notify, although the supervisor still holds the socket
			}
			if got := p.inventory()[s.id]; got.Phase != wire.PhaseClosed || got.Reason != tc.want || got.Ref != s.own() {
				t.Errorf("tombstone %+v", got)
			}
			p.refs(wire.TypeClosedAck, s.ref(s.epoch+1)) // stale
			p.refs(wire.TypeClosedAck, s.own())
			if got := p.inventory(); len(got) != 0 {
				t.Errorf("after CLOSED_ACK: %+v", got)
			}
			if after := countFDs(t); tc.client == nil && after != before {
				t.Errorf("%d descriptors before, %d after", before, after)
			}
		})
	}
}

// A peer that goes away while the session is on its way to a safe point.
func TestPeerResetsInFreeze(t *testing.T) {
	h := newStepHandler()
	p := startProc(t, h.serve)
	s := software(t)
	p.give(s)
	c := h.wait(t)
	e := newEpoch()
	h.do <- func(_ context.Context, c *Conn) error {
		release := c.Hold()
		_, err := c.Read(make([]byte, 1)) // sees the reset
		release()
		if err == nil {
			return errors.New("no reset")
		}
		return ErrMoving
	}
	p.refs(wire.TypeFreeze, s.ref(e))
	<-c.Moving()
	_ = s.tcp().SetLinger(0)
	_ = s.tcp().Close()
	p.expectClosed(s, wire.ReasonPeerAbrupt)
	p.quiet(wire.TypeParked)
}

func TestCloseByOperator(t *testing.T) {
	ignoring := func(ctx context.Context, c *Conn) error { // looks at its context only
		<-ctx.Done()
		return nil
	}
	for _, h := range []HandlerFunc{echoHandler, ignoring} {
		p := startProc(t, h)
		s := software(t)
		p.give(s)
		p.refs(wire.TypeClose, s.own())
		p.expectClosed(s, wire.ReasonOperator)
		s.eof()
	}
	// One that is parked may be somebody else's: it ends only if it comes back.
	p := startProc(t, echoHandler)
	s := software(t)
	p.give(s)
	e := p.freeze(s)
	p.refs(wire.TypeClose, s.own())
	p.quiet(wire.TypeClosed)
	p.refs(wire.TypeThaw, s.ref(e))
	p.expectClosed(s, wire.ReasonOperator)
	s.eof()
}

// A client that does not read cannot hold up the end of its session.
func TestCloseOfBlockedWriter(t *testing.T) {
	p := startProc(t, func(_ context.Context, c *Conn) error {
		for {
			if _, err := c.Write(make([]byte, 1<<20)); err != nil {
				return err
			}
		}
	})
	s := software(t)
	p.give(s)
	s.read("\x00")
	began := time.Now()
	p.refs(wire.TypeClose, s.own())
	p.expectClosed(s, wire.ReasonOperator)
	if d := time.Since(began); d > 10*time.Second {
		t.Errorf("it took %v", d)
	}
}

func TestStop(t *testing.T) {
	t.Run("handlers get a last word", func(t *testing.T) {
		p := startProc(t, func(ctx context.Context, c *Conn) error {
			_, err := io.Copy(c, c)
			if errors.Is(err, context.Canceled) {
				_, _ = c.Write([]byte("bye"))
			}
			return err
		})
		s := software(t)
		p.give(s)
		s.say("x", "x")
		p.send(&wire.Message{Type: wire.TypeStop, Millis: 60_000})
		s.read("bye")
		s.eof()
		p.expectClosed(s, wire.ReasonOperator)
		if err := p.result(); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Run("handlers that do not listen are made to", func(t *testing.T) {
		release := make(chan struct{})
		p := startProc(t, func(context.Context, *Conn) error { <-release; return nil })
		s, parked := software(t), software(t)
		p.give(s)
		p.adopt(parked, newEpoch())
		p.send(&wire.Message{Type: wire.TypeStop, Millis: 50})
		s.eof()
		p.expectClosed(s, wire.ReasonOperator)
		close(release)
		if err := p.result(); err != nil {
			t.Errorf("Serve: %v", err)
		}
		p.give2(startProc(t, echoHandler), parked) // nothing was done to it
	})
	t.Run("context ends", func(t *testing.T) {
		p := startProc(t, echoHandler)
		s := software(t)
		p.give(s)
		s.say("x", "x")
		p.stop()
		s.eof()
		if err := p.result(); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Run("drain", func(t *testing.T) {
		p := startProc(t, echoHandler)
		s, moves := software(t), software(t)
		p.give(s)
		p.give(moves)
		p.send(&wire.Message{Type: wire.TypeStop, Drain: true})
		late := software(t)
		p.send(&wire.Message{Type: wire.TypeAdopt, Items: []wire.Item{late.item(newEpoch())}})
		if m := p.expect(wire.TypeRefused); !strings.Contains(m.Refused[0].Why, "retiring") {
			t.Errorf("REFUSED %+v", m.Refused)
		}
		move(moves, p, startProc(t, echoHandler))
		moves.say("moved", "moved")
		s.say("on and on", "on and on")
		_ = s.cli.CloseWrite()
		p.expectClosed(s, wire.ReasonPeer)
		if err := p.result(); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Run("before anything", func(t *testing.T) {
		p := startRaw(t, echoHandler)
		p.stop()
		if err := p.result(); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
}

// give2 shows that a session which p had adopted is still good for another worker.
func (p *proc) give2(q *proc, s *sess) {
	p.t.Helper()
	q.give(s)
	s.say("untouched", "untouched")
}

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
	var conn *Conn
	{
		done := make(chan struct{})
		p.w.in.post(func() { conn = p.w.sessions[freezing.id].conn; close(done) })
		<-done
	}
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
	_ = before
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
	var conn *Conn
	done := make(chan struct{})
	p.w.in.post(func() { conn = p.w.sessions[busy.id].conn; close(done) })
	<-done
	conn.SetState(make([]byte, 1<<20))
	p.refs(wire.TypeFreeze, busy.ref(newEpoch()))
	busy.say("after a move that failed", "after a move that failed")
	p.quiet(wire.TypeParked)
	restore()
	p.give(s)
	s.say("now there is room", "now there is room")
}

// What is too large to travel stays, and is served on.
func TestTooLarge(t *testing.T) {
	huge := strings.Repeat("x", 3<<20)
	for name, tc := range map[string]struct {
		f    func(*Conn)
		want string
	}{
		"state":  {func(c *Conn) { c.SetState(make([]byte, wire.MaxCargo+1)) }, ""},
		"unread": {func(c *Conn) { c.Unread([]byte(huge)) }, huge},
	} {
		t.Run(name, func(t *testing.T) {
			h := newStepHandler()
			p := startProc(t, h.serve)
			s := software(t)
			p.give(s)
			h.wait(t)
			go func() {
				h.do <- func(ctx context.Context, c *Conn) error {
					<-c.Moving()
					tc.f(c)
					return readMoving(ctx, c)
				}
				h.do <- echoHandler
			}()
			p.refs(wire.TypeFreeze, s.ref(newEpoch()))
			h.wait(t) // started again
			if tc.want != "" {
				s.read(tc.want)
			}
			s.say("stays", "stays")
			p.quiet(wire.TypeParked)
			_ = s.cli.CloseWrite()
			p.expectClosed(s, wire.ReasonPeer)
		})
	}
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

// Half-closing is refused while a move is wanted, and works after it, here or there.
func TestCloseWrite(t *testing.T) {
	h := newStepHandler()
	a, b := startProc(t, h.serve), startProc(t, h.serve)
	s := software(t)
	a.give(s)
	c := h.wait(t)
	e := newEpoch()
	a.refs(wire.TypeFreeze, s.ref(e))
	<-c.Moving()
	if _, err := c.Write([]byte("queued")); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); !errors.Is(err, ErrMoving) {
		t.Errorf("CloseWrite while moving: %v", err)
	}
	h.do <- readMoving
	a.parked(s, e)
	b.adopt(s, e)
	s.epoch = e
	b.refs(wire.TypeResume, s.own())
	a.refs(wire.TypeRelease, s.ref(e))
	c = h.wait(t)
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	s.read("queued")
	s.eof()
	// The other direction is open, and that travels as well.
	h2 := newStepHandler()
	d := startProc(t, h2.serve)
	e = newEpoch()
	b.refs(wire.TypeFreeze, s.ref(e))
	h.do <- readMoving
	b.parked(s, e)
	d.adopt(s, e)
	s.epoch = e
	d.refs(wire.TypeResume, s.own())
	b.refs(wire.TypeRelease, s.own())
	c = h2.wait(t)
	s.write("still heard")
	buf := make([]byte, 11)
	if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "still heard" {
		t.Errorf("%q, %v", buf, err)
	}
	if _, err := c.Write([]byte("x")); err == nil {
		t.Error("Write after CloseWrite")
	}
	close(h.do)
	close(h2.do)
	d.expectClosed(s, wire.ReasonOwner)
	a.inventory()
	b.inventory()
}
