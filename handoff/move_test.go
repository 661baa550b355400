package handoff

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// eachLayer runs f with sessions in every record layer.
func eachLayer(t *testing.T, f func(t *testing.T, mode ktls.Mode)) {
	t.Run("software", func(t *testing.T) { f(t, ktls.ModeSoftware) })
	t.Run("kernel", func(t *testing.T) {
		guest.NeedKernelTLS(t)
		f(t, ktls.ModeKernel)
	})
}

func TestMove(t *testing.T) {
	eachLayer(t, func(t *testing.T, mode ktls.Mode) {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			t.Run(tls.VersionName(version), func(t *testing.T) {
				a, b := startProc(t, echoHandler), startProc(t, echoHandler)
				s := newSession(t, mode, version)
				before := countFDs(t)
				a.give(s)
				s.say("one", "one")
				move(s, a, b)
				s.say("two", "two")
				move(s, b, a)
				s.say("three", "three")
				if err := s.cli.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				a.expectClosed(s, wire.ReasonPeer)
				s.eof()
				a.refs(wire.TypeClosedAck, s.own())
				if len(a.inventory())+len(b.inventory()) != 0 {
					t.Error("something is left in the tables")
				}
				if after := countFDs(t); after != before {
					t.Errorf("%d descriptors before, %d after", before, after)
				}
			})
		}
	})
}

// traffic is one busy client: it writes random bytes in random pieces and checks
// every byte that comes back, until stop.
func traffic(s *sess, seed uint64, stop <-chan struct{}) error {
	rnd := rand.New(rand.NewPCG(seed, 1))
	sent := make(chan []byte, 64)
	werr := make(chan error, 1)
	go func() {
		defer close(sent)
		interval, largest := 2*time.Millisecond, 15 // the moves need the processor too
		if guest.InGuest() {
			interval, largest = 20*time.Millisecond, 12
		}
		pace := time.NewTicker(interval)
		defer pace.Stop()
		for {
			<-pace.C
			p := make([]byte, 1+rnd.IntN(1<<(4+rnd.IntN(largest-3))))
			for i := range p {
				p[i] = byte(rnd.Uint32())
			}
			select {
			case <-stop:
				werr <- nil
				return
			case sent <- p:
			}
			if _, err := s.cli.Write(p); err != nil {
				werr <- fmt.Errorf("write: %w", err)
				return
			}
		}
	}()
	total := 0
	for p := range sent {
		got := make([]byte, len(p))
		if n, err := io.ReadFull(s.cli, got); err != nil {
			return fmt.Errorf("after %d bytes: read: %w", total+n, err)
		}
		if !bytes.Equal(got, p) {
			return fmt.Errorf("wrong bytes after %d", total)
		}
		total += len(p)
	}
	if total == 0 {
		return errors.New("nothing was sent")
	}
	return <-werr
}

// TestMovesUnderTraffic moves busy sessions to and fro, and calls moves off at every
// step, and checks every byte.
func TestMovesUnderTraffic(t *testing.T) {
	eachLayer(t, func(t *testing.T, mode ktls.Mode) {
		clients, rounds := 6, 100
		if guest.InGuest() { // no KVM: everything is slow, cryptography most of all
			clients, rounds = 4, 20
		}
		procs := [2]*proc{startProc(t, echoHandler), startProc(t, echoHandler)}
		before := countFDs(t)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		var all []*sess
		owner := map[*sess]int{}
		for i := range clients {
			s := newSession(t, mode, []uint16{tls.VersionTLS12, tls.VersionTLS13}[i%2])
			procs[i%2].give(s)
			all = append(all, s)
			owner[s] = i % 2
			wg.Add(1)
			go func() {
				defer wg.Done()
				if err := traffic(s, uint64(i), stop); err != nil {
					t.Errorf("client %d: %v", i, err)
				}
			}()
		}
		rnd := rand.New(rand.NewPCG(7, 7))
		moved := 0
		for range rounds {
			for _, s := range all {
				from, to := procs[owner[s]], procs[1-owner[s]]
				e := newEpoch()
				switch rnd.IntN(10) {
				case 0: // called off at once; PARKED may come all the same
					from.refs(wire.TypeFreeze, s.ref(e))
					from.refs(wire.TypeThaw, s.ref(e))
					from.inventory()
					from.dropParked(s.ref(e))
				case 1: // called off when parked
					from.refs(wire.TypeFreeze, s.ref(e))
					from.parked(s, e)
					from.refs(wire.TypeThaw, s.ref(e))
				case 2: // called off when adopted
					from.refs(wire.TypeFreeze, s.ref(e))
					from.parked(s, e)
					to.adopt(s, e)
					to.refs(wire.TypeAbort, s.ref(e))
					from.refs(wire.TypeThaw, s.ref(e))
				case 3: // the new worker cannot
					from.refs(wire.TypeFreeze, s.ref(e))
					from.parked(s, e)
					bad := s.item(e)
					bad.Cargo.Record = []byte("nonsense")
					to.send(&wire.Message{Type: wire.TypeAdopt, Items: []wire.Item{bad}})
					if m := to.expect(wire.TypeRefused); m.Refused[0].Ref != s.ref(e) || m.Refused[0].Why == "" {
						t.Fatalf("REFUSED %+v", m.Refused)
					}
					from.refs(wire.TypeThaw, s.ref(e))
				default:
					move(s, from, to)
					owner[s] = 1 - owner[s]
					moved++
				}
			}
		}
		close(stop)
		wg.Wait()
		t.Logf("%d moves", moved)
		if moved < rounds*clients/3 {
			t.Errorf("only %d moves", moved)
		}
		for _, s := range all {
			_ = s.cli.CloseWrite()
			procs[owner[s]].expect(wire.TypeClosed)
			s.close()
		}
		for _, p := range procs {
			p.quiet(wire.TypeRefused)
		}
		if after := countFDs(t); after != before {
			t.Errorf("%d descriptors before, %d after", before, after)
		}
	})
}

// dropParked forgets a PARKED that crossed the THAW. The inventory was asked for
// after the THAW and the channel keeps the order, but a late one may still come.
func (p *proc) dropParked(r wire.Ref) {
	for i, m := range p.stash {
		if m.Type == wire.TypeParked && m.Items[0].Ref == r {
			p.stash = append(p.stash[:i:i], p.stash[i+1:]...)
			return
		}
	}
}

func TestStateTravels(t *testing.T) {
	ha, hb := newStepHandler(), newStepHandler()
	a, b := startProc(t, ha.serve), startProc(t, hb.serve)
	s := newSession(t, ktls.ModeSoftware, 0)
	a.give(s)
	c := ha.wait(t)
	if c.State() != nil || c.Restored() || c.Interrupted() || c.ID() != s.id || c.Layer() != "software" {
		t.Errorf("a new session: state %q, restored %v, interrupted %v, id %d, layer %s", c.State(), c.Restored(), c.Interrupted(), c.ID(), c.Layer())
	}
	want := c.ConnectionState()
	big := bytes.Repeat([]byte("a large state "), 100_000) // by memory file
	for i, app := range [][]byte{[]byte("small"), big, nil} {
		h, from, to := []*stepHandler{ha, hb, ha}[i], []*proc{a, b, a}[i], []*proc{b, a, b}[i]
		h.do <- func(ctx context.Context, c *Conn) error {
			err := readMovingAfterUnread(c)
			c.SetState(app)
			return fmt.Errorf("wrapped: %w", err)
		}
		s.write("ab")
		s.read("x") // it has read "ab", given back "b", and reads again
		move(s, from, to)
		next := []*stepHandler{hb, ha, hb}[i]
		c := next.wait(t)
		if !bytes.Equal(c.State(), app) || !c.Restored() || c.Interrupted() {
			t.Fatalf("move %d: state of %d bytes, want %d; restored %v", i, len(c.State()), len(app), c.Restored())
		}
		if cs := c.ConnectionState(); cs.Version != want.Version || cs.CipherSuite != want.CipherSuite || c.RemoteAddr().String() != s.cli.LocalAddr().String() {
			t.Errorf("move %d: the facts changed: %+v from %s", i, cs, c.RemoteAddr())
		}
		next.do <- func(_ context.Context, c *Conn) error {
			buf := make([]byte, 10)
			n, err := c.Read(buf)
			if err != nil || string(buf[:n]) != "b" {
				return fmt.Errorf("unread bytes: got %q, %w", buf[:n], err)
			}
			_, _ = c.Write([]byte("y"))
			return errNext
		}
		s.read("y")
	}
	close(ha.do)
	close(hb.do)
	b.expectClosed(s, wire.ReasonOwner)
}

// readMovingAfterUnread takes "ab", pushes "b" back, and stops at the safe point.
func readMovingAfterUnread(c *Conn) error {
	release := c.Hold()
	buf := make([]byte, 2)
	if _, err := io.ReadFull(c, buf); err != nil {
		return err
	}
	release()
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	<-c.Moving()
	c.Unread(buf[1:])
	_, err := c.Read(buf)
	return err
}

// A blocked Write is taken over, and so is what is written while a move is wanted,
// up to a limit.
func TestOutputTravels(t *testing.T) {
	eachLayer(t, func(t *testing.T, mode ktls.Mode) {
		h := newStepHandler()
		a, b := startProc(t, h.serve), startProc(t, echoHandler)
		s := newSession(t, mode, tls.VersionTLS13)
		a.give(s)
		c := h.wait(t)
		first := bytes.Repeat([]byte("0123456789abcdef"), 1<<14)
		type result struct {
			n   int
			err error
		}
		results := make(chan result, 3)
		wrote := 0
		h.do <- func(_ context.Context, c *Conn) error {
			for { // until a Write blocks and the move interrupts it
				n, err := c.Write(first)
				wrote += n
				select {
				case <-c.Moving():
				default:
					if err == nil {
						continue
					}
				}
				results <- result{n, err}
				break
			}
			n, err := c.Write([]byte("while moving"))
			results <- result{n, err}
			n, err = c.Write(make([]byte, 2*ktls.MaxQueued))
			results <- result{n, err}
			return err
		}
		// The client does not read, so sooner or later Write blocks.
		waitFor(t, "a blocked Write", func() bool { return blockedWriter(c) })
		e := a.freeze(s)
		r1, r2, r3 := <-results, <-results, <-results
		if r1.n != len(first) || r1.err != nil {
			t.Errorf("interrupted Write: %d, %v; want all of its %d bytes taken", r1.n, r1.err, len(first))
		}
		if r2.n != len("while moving") || r2.err != nil {
			t.Errorf("Write while moving: %d, %v", r2.n, r2.err)
		}
		if r3.n >= 2*ktls.MaxQueued || !errors.Is(r3.err, ErrMoving) {
			t.Errorf("Write beyond the limit: %d, %v; want ErrMoving", r3.n, r3.err)
		}
		b.adopt(s, e)
		s.epoch = e
		b.refs(wire.TypeResume, s.own())
		a.refs(wire.TypeRelease, s.ref(e))
		buf := make([]byte, wrote)
		if _, err := io.ReadFull(s.cli, buf); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(buf, bytes.Repeat(first, wrote/len(first))) {
			t.Error("the output is not what was written")
		}
		s.read("while moving")
		if _, err := io.ReadFull(s.cli, make([]byte, r3.n)); err != nil {
			t.Fatal(err)
		}
		s.say("after it", "after it")
	})
}

// blockedWriter reports that a Write has been in progress for a while.
func blockedWriter(c *Conn) bool {
	for range 20 {
		if c.wmu.TryLock() {
			c.wmu.Unlock()
			return false
		}
		<-time.After(5 * time.Millisecond)
	}
	return true
}

// waitFor polls for what no message tells.
func waitFor(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !f(); {
		if time.Now().After(end) {
			t.Fatalf("no %s", what)
		}
		<-time.After(time.Millisecond)
	}
}
