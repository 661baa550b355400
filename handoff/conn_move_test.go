package handoff

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// A handler that holds gets its input and sends its output although a move is wanted.
func TestHold(t *testing.T) {
	h, p, s, c := stepping(t)
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
	h, p, s, c := stepping(t)
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
			h, p, s, _ := stepping(t)
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
