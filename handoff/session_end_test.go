package handoff

import (
	"context"
	"errors"
	"io"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

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
	h, p, s, c := stepping(t)
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
