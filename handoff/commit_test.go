package handoff

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// lines answers every line with its number, which is its state. It commits line by line
// and leaves the half of one uncommitted. hold, when it is not nil, is called with each
// line before it is committed.
func lines(hold func(line string)) HandlerFunc {
	return func(_ context.Context, c *Conn) error {
		n := 0
		if c.State() != nil {
			if _, err := fmt.Sscan(string(c.State()), &n); err != nil {
				return err
			}
		}
		var text string
		buf := make([]byte, 7)
		for {
			k, err := c.Read(buf)
			if err != nil {
				return err
			}
			text += string(buf[:k])
			for {
				line, rest, ok := strings.Cut(text, "\n")
				if !ok {
					break
				}
				if hold != nil {
					hold(line)
				}
				n++
				if err := c.Commit(len(line)+1, fmt.Appendf(nil, "%d", n), fmt.Appendf(nil, "%d:%s\n", n, line)); err != nil {
					return err
				}
				text = rest
			}
		}
	}
}

// What was read and not committed is read again after a move, by a handler that knows
// nothing of moves: it just returns.
func TestUncommittedInputMoves(t *testing.T) {
	eachLayer(t, func(t *testing.T, mode ktls.Mode) {
		a, b := startProc(t, lines(nil), WithCommit()), startProc(t, lines(nil), WithCommit())
		s := newSession(t, mode, tls.VersionTLS13)
		a.give(s)
		s.say("one\ntwo\nthr", "1:one\n2:two\n")
		move(s, a, b)
		s.say("ee\nfour, and a line that is longer than what is read at once", "3:three\n")
		move(s, b, a)
		s.say("\nfi", "4:four, and a line that is longer than what is read at once\n")
		// A move that is called off: the handler is started again here.
		e := a.freeze(s)
		a.refs(wire.TypeThaw, s.ref(e))
		s.say("ve\n", "5:five\n")
		if err := s.cli.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		a.expectClosed(s, wire.ReasonPeer)
		s.eof()
	})
}

// A move that is wanted while a line is handled: the commit is done, and what it put out
// travels.
func TestCommitWhileMoving(t *testing.T) {
	eachLayer(t, func(t *testing.T, mode ktls.Mode) {
		entered, leave := make(chan struct{}), make(chan struct{})
		a := startProc(t, lines(func(string) { entered <- struct{}{}; <-leave }), WithCommit())
		b := startProc(t, lines(nil), WithCommit())
		s := newSession(t, mode, tls.VersionTLS13)
		a.give(s)
		s.write("one\ntwo\n")
		<-entered
		e := newEpoch()
		a.refs(wire.TypeFreeze, s.ref(e))
		a.quiet(wire.TypeParked)
		leave <- struct{}{} // commits "one", and comes to "two" if it has read it
		select {
		case <-entered:
			leave <- struct{}{}
			a.parked(s, e)
		case m := <-a.msgs:
			a.stash = append(a.stash, m)
			a.parked(s, e)
		}
		b.adopt(s, e)
		s.epoch = e
		b.refs(wire.TypeResume, s.ref(e))
		a.refs(wire.TypeRelease, s.ref(e))
		s.read("1:one\n2:two\n")
		s.say("three\n", "3:three\n")
	})
}

// Checkpoint without keeping input, and what is refused.
func TestCheckpoint(t *testing.T) {
	errs := make(chan error, 4)
	h := func(_ context.Context, c *Conn) error {
		buf := make([]byte, 100)
		for {
			n, err := c.Read(buf)
			if err != nil {
				return err
			}
			if err := c.Checkpoint(append(append([]byte(nil), c.State()...), buf[:n]...)); err != nil {
				errs <- err
			}
			if buf[0] == '?' {
				errs <- c.Commit(1, nil, nil)
				errs <- c.Commit(0, nil, []byte("x"))
			}
			if _, err := fmt.Fprintf(c, "%s\n", c.State()); err != nil {
				return err
			}
		}
	}
	a, b := startProc(t, h, WithCheckpoint()), startProc(t, h, WithCheckpoint())
	s := newSession(t, ktls.ModeSoftware, tls.VersionTLS13)
	a.give(s)
	s.say("a", "a\n")
	s.say("b", "ab\n")
	move(s, a, b)
	s.say("c", "abc\n")
	s.say("?", "abc?\n")
	for range 2 {
		if err := <-errs; err == nil {
			t.Error("a Commit that Checkpoint's mode cannot keep was taken")
		}
	}

	c := startProc(t, h)
	s = newSession(t, ktls.ModeSoftware, tls.VersionTLS13)
	c.give(s)
	s.say("a", "\n")
	if err := <-errs; !errors.Is(err, ErrNoCommit) {
		t.Errorf("Checkpoint without the option: %v", err)
	}
}

// A handler cannot commit what it did not read, and one that never commits is told.
func TestCommitLimits(t *testing.T) {
	got := make(chan error, 1)
	h := func(_ context.Context, c *Conn) error {
		if err := c.Commit(1, nil, nil); err == nil {
			got <- errors.New("committed a byte that was not read")
			return nil
		}
		if err := c.Commit(0, nil, make([]byte, ktls.MaxQueued+1)); err == nil {
			got <- errors.New("took more output than can be kept")
			return nil
		}
		buf := make([]byte, 64<<10)
		for {
			if _, err := c.Read(buf); err != nil {
				got <- err
				return nil
			}
		}
	}
	a := startProc(t, h, WithCommit())
	s := newSession(t, ktls.ModeSoftware, tls.VersionTLS13)
	a.give(s)
	go func() { _, _ = s.cli.Write(make([]byte, ktls.MaxUncommitted+300<<10)) }()
	if err := <-got; !errors.Is(err, ktls.ErrUncommitted) {
		t.Errorf("got %v, want ErrUncommitted", err)
	}
}

// What CheckpointGroup was given goes to the supervisor, also to one that takes over
// before it has answered.
func TestCheckpointGroup(t *testing.T) {
	result := make(chan error, 2)
	h := func(ctx context.Context, c *Conn) error {
		result <- c.CheckpointGroup(ctx, []byte("too early"))
		if err := c.JoinGroup(ctx, "room"); err != nil {
			return err
		}
		result <- c.CheckpointGroup(ctx, []byte("state"))
		_, err := c.Read(make([]byte, 1))
		return err
	}
	p := startRaw(t, h)
	p.expect(wire.TypeHello)
	p.send(&wire.Message{Type: wire.TypeWelcome, Welcome: &wire.Welcome{Version: 1, Worker: 1, Pool: "test", FreezeTimeout: 5000, Groups: true}})
	p.expect(wire.TypeReady)
	s := newSession(t, ktls.ModeSoftware, tls.VersionTLS13)
	p.give(s)
	if err := <-result; err == nil {
		t.Error("a checkpoint of no group was taken")
	}
	p.expect(wire.TypeGroup)
	p.send(&wire.Message{Type: wire.TypeGrouped, Refs: []wire.Ref{s.own()}, Group: "room"})
	first := p.expect(wire.TypeCheckpoint)
	p.inventory()
	again := p.expect(wire.TypeCheckpoint)
	if again.Nonce != first.Nonce || again.Group != "room" || string(again.Blobs[0].Data) != "state" || again.Refs[0] != s.own() {
		t.Errorf("CHECKPOINT %+v, then %+v", first, again)
	}
	p.send(&wire.Message{Type: wire.TypeCheckpointed, Nonce: again.Nonce, Text: "no room"})
	if err := <-result; err == nil || !strings.Contains(err.Error(), "no room") {
		t.Errorf("got %v", err)
	}
}
