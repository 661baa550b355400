package handoff

import (
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// sleeper echoes, with a count of its runs as the state. gone gets a value whenever
// the handler has returned with ErrMoving.
type sleeper struct{ gone chan byte }

func newSleeper() *sleeper { return &sleeper{gone: make(chan byte, 100)} }

func (r *sleeper) serve(_ context.Context, c *Conn) error {
	runs := byte(1)
	if b := c.State(); len(b) == 1 {
		runs = b[0] + 1
	}
	if c.Restored() != (runs > 1) {
		return errors.New("Restored does not say whether there was a run before")
	}
	c.SetState([]byte{runs})
	_, err := io.Copy(c, c)
	switch {
	case errors.Is(err, ErrMoving):
		r.gone <- runs
	case errors.Is(err, ErrStopping):
		_, _ = io.WriteString(c, "bye")
	}
	return err
}

// rested waits for the end of a run.
func (r *sleeper) rested(t *testing.T, want byte) {
	t.Helper()
	select {
	case n := <-r.gone:
		if n != want {
			t.Fatalf("run %d ended, want %d", n, want)
		}
	case <-time.After(patience):
		t.Fatalf("run %d did not end", want)
	}
}

// asleep waits until the loop has taken note of that.
func asleep(p *proc, s *sess) {
	p.t.Helper()
	for begin := time.Now(); ; {
		is := false
		if err := p.w.call(p.t.Context(), func(done func(error)) {
			is = p.w.sessions[s.id] != nil && p.w.sessions[s.id].asleep
			done(nil)
		}); err != nil {
			p.t.Fatal(err)
		}
		if is {
			return
		}
		if time.Since(begin) > patience {
			p.t.Fatalf("session %d does not get a rest", s.id)
		}
	}
}

const restTest = 20 * time.Millisecond

func resting(t *testing.T) (*proc, *sess, *sleeper) {
	t.Helper()
	r := newSleeper()
	p := startProc(t, r.serve, WithRest(restTest))
	s := software(t)
	p.give(s)
	s.say("one", "one")
	r.rested(t, 1)
	return p, s, r
}

// asleepWithConn is a session at rest, and the Conn that its handler had.
func asleepWithConn(t *testing.T) (*proc, *sess, <-chan *Conn) {
	t.Helper()
	conns := make(chan *Conn, 10)
	r := newSleeper()
	p := startProc(t, func(ctx context.Context, c *Conn) error {
		conns <- c
		return r.serve(ctx, c)
	}, WithRest(restTest))
	s := software(t)
	p.give(s)
	r.rested(t, 1)
	asleep(p, s)
	return p, s, conns
}

// An idle session has no handler, and has one again as soon as there is input.
func TestRest(t *testing.T) {
	p, s, r := resting(t)
	for run := byte(2); run < 6; run++ {
		s.say("more", "more")
		r.rested(t, run)
	}
	p.quiet(wire.TypeParked) // the supervisor hears nothing of it
	if h := p.inventory()[s.id]; h.Phase != wire.PhaseActive || h.Epoch != s.epoch {
		t.Errorf("inventory of a session at rest: %+v", h)
	}
	_ = s.cli.CloseWrite()
	p.expectClosed(s, wire.ReasonPeer)
	s.eof()
}

// Every way in which a session leaves its rest other than by input.
func TestRestEnds(t *testing.T) {
	t.Run("move", func(t *testing.T) {
		p, s, r := resting(t)
		to := newSleeper()
		q := startProc(t, to.serve, WithRest(restTest))
		move(s, p, q)
		s.say("there", "there")
		to.rested(t, 2)
		if len(r.gone) > 0 {
			t.Error("its handler ran in the old worker")
		}
	})
	t.Run("move called off", func(t *testing.T) {
		p, s, r := resting(t)
		e := p.freeze(s)
		p.refs(wire.TypeThaw, s.ref(e))
		s.say("back", "back")
		r.rested(t, 2)
	})
	t.Run("reset by the peer", func(t *testing.T) {
		p, s, _ := resting(t)
		_ = s.tcp().SetLinger(0)
		_ = s.tcp().Close()
		if m := p.expect(wire.TypeClosed); m.Closed[0].Ref != s.own() {
			t.Errorf("CLOSED %+v", m.Closed)
		}
	})
	t.Run("closed by the operator", func(t *testing.T) {
		p, s, _ := resting(t)
		p.refs(wire.TypeClose, s.own())
		p.expectClosed(s, wire.ReasonOperator)
		s.eof()
	})
	t.Run("worker told to stop", func(t *testing.T) {
		p, s, _ := resting(t)
		p.send(&wire.Message{Type: wire.TypeStop, Millis: 5000})
		s.read("bye")
		s.eof()
		p.expectClosed(s, wire.ReasonOperator)
		if err := p.result(); err != nil {
			t.Error(err)
		}
	})
	t.Run("closed by the application", func(t *testing.T) {
		p, s, conns := asleepWithConn(t)
		_ = (<-conns).Close()
		s.eof()
		p.expectClosed(s, wire.ReasonOwner)
	})
	t.Run("the supervisor is gone", func(t *testing.T) {
		p, s, r := resting(t)
		_ = p.ch.Close()
		s.say("still", "still")
		r.rested(t, 2)
		_ = s.cli.CloseWrite()
		if err := p.result(); !errors.Is(err, ErrSupervisorGone) {
			t.Error(err)
		}
	})
}

// What another goroutine of the application writes goes out at once.
func TestRestAndWrite(t *testing.T) {
	_, s, conns := asleepWithConn(t)
	if _, err := io.WriteString(<-conns, "news"); err != nil {
		t.Fatal(err)
	}
	s.read("news")
}

// A handler that works, holds, waits with a deadline or belongs to a group gets no
// rest.
func TestNoRest(t *testing.T) {
	for name, prepare := range map[string]func(c *Conn){
		"deadline": func(c *Conn) { _ = c.SetReadDeadline(time.Now().Add(time.Hour)) },
		"hold":     func(c *Conn) { c.Hold() },
	} {
		t.Run(name, func(t *testing.T) {
			read := make(chan error, 1)
			p := startProc(t, func(_ context.Context, c *Conn) error {
				prepare(c)
				b := make([]byte, 2)
				_, err := io.ReadFull(c, b)
				read <- err
				return err
			}, WithRest(time.Millisecond))
			s := software(t)
			p.give(s)
			for begin := p.w.ticks.Load(); p.w.ticks.Load()-begin < 10; {
				p.quiet(wire.TypeClosed)
			}
			s.write("ok")
			if err := <-read; err != nil {
				t.Error(err)
			}
		})
	}
}

// Rests and a move in both layers.
func TestRestLayers(t *testing.T) {
	eachLayer(t, func(t *testing.T, mode ktls.Mode) {
		r := newSleeper()
		p := startProc(t, r.serve, WithRest(restTest))
		s := newSession(t, mode, 0)
		p.give(s)
		for run := byte(1); run < 5; run++ {
			s.say("more", "more")
			r.rested(t, run)
		}
		q := startProc(t, echoHandler)
		move(s, p, q)
		s.say("there", "there")
	})
}

// What a handler says before its session gets a rest is sent, also when the deadline of
// what it wrote before is long over.
func TestLastWordBeforeRest(t *testing.T) {
	p := startProc(t, func(_ context.Context, c *Conn) error {
		if err := c.SetWriteDeadline(time.Now().Add(time.Millisecond)); err != nil {
			return err
		}
		_, err := c.Read(make([]byte, 1))
		if errors.Is(err, ErrMoving) && !c.Restored() {
			_, _ = io.WriteString(c, "later")
		}
		return err
	}, WithRest(restTest))
	s := software(t)
	p.give(s)
	s.read("later")
}

// A handler that was asked to return for a move which is called off runs again at once,
// although it was once about to get a rest.
func TestNoRestForTheMoved(t *testing.T) {
	runs, told, back := make(chan *Conn, 10), make(chan error), make(chan struct{})
	p := startProc(t, func(_ context.Context, c *Conn) error {
		runs <- c
		_, err := c.Read(make([]byte, 1))
		if errors.Is(err, ErrMoving) {
			told <- err
			<-back
		}
		return err
	}, WithRest(time.Hour))
	s := software(t)
	p.give(s)
	c := <-runs
	if err := p.w.call(t.Context(), func(done func(error)) {
		m := p.w.sessions[s.id]
		m.resting, m.frozen = true, true // as restIdle, and then there was input
		done(nil)
	}); err != nil {
		t.Fatal(err)
	}
	c.fresh()
	e := newEpoch()
	p.refs(wire.TypeFreeze, s.ref(e))
	<-told
	p.refs(wire.TypeThaw, s.ref(e))
	p.inventory()
	close(back)
	select {
	case <-runs:
	case <-time.After(patience):
		t.Error("the handler was not started again")
	}
	_ = s.cli.CloseWrite()
	p.expectClosed(s, wire.ReasonPeer)
}

// A handler that has seen the end of the input may still answer at length.
func TestNoRestAtTheEnd(t *testing.T) {
	ended := make(chan bool, 1)
	p := startProc(t, func(_ context.Context, c *Conn) error {
		_, err := c.Read(make([]byte, 1))
		if errors.Is(err, io.EOF) {
			ended <- c.isTired()
		}
		return err
	}, WithRest(time.Hour))
	s := software(t)
	p.give(s)
	for begin, waits := time.Now(), false; !waits; {
		if err := p.w.call(t.Context(), func(done func(error)) {
			c := p.w.sessions[s.id].conn
			c.mu.Lock()
			defer c.mu.Unlock()
			if waits = c.since.Swap(0) != 0; waits {
				c.tired = true // by a tire whose interruption comes too late
			}
			done(nil)
		}); err != nil {
			t.Fatal(err)
		}
		if time.Since(begin) > patience {
			t.Fatal("the handler does not read")
		}
	}
	_ = s.cli.CloseWrite()
	if <-ended {
		t.Error("the handler is still to return for a rest")
	}
	p.expectClosed(s, wire.ReasonPeer)
}

// Data that came before its key wakes a session that got its rest in between: the
// kernel reports it when the key is set, though it hides it until then.
func TestRestAndKeys(t *testing.T) {
	p, s := rekeyingWith(t, newSleeper().serve, WithRest(restTest))
	s.changeKeys(false)
	s.write("under the next key\n")
	if r := p.told(wire.TypeKeyUpdate, s); r.Count != 1 {
		t.Fatalf("KEY_UPDATE %+v", r)
	}
	asleep(p, s)
	s.set(ktls.Receiving)
	p.order(wire.TypeRekeyed, wire.Rekey{Ref: s.own(), Count: 1})
	s.read("under the next key\n")
}
