package handoff

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
	"github.com/ktlsvisor/ktlsvisor/state"
)

func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	limit := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(limit) {
			t.Fatalf("waited for %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// Sessions go from process to process: echo, with something half read, and a descriptor
// less for each that has left.
func TestUpgraderMovesSessions(t *testing.T) {
	p := startUpgrader(t, newFlip(t), echoHandler)
	n := 300 // more than go at a time
	if guest.InGuest() {
		n = 80 // more than a message holds; handshakes take their time there
	}
	var cl []uclient
	for i := range n {
		c := p.dial()
		c.say(fmt.Sprint("hello ", i), fmt.Sprint("hello ", i))
		cl = append(cl, c)
	}
	for i := range 3 {
		next, r, err := p.upgrade(echoHandler)
		if err != nil || r.Moved != n || r.Stayed != 0 || r.Lost != 0 {
			t.Fatalf("upgrade %d: %+v, %v", i, r, err)
		}
		if err := p.result(); err != nil {
			t.Fatal(err)
		}
		p = next
		for j, c := range cl {
			c.say(fmt.Sprint(i, "th process, ", j), fmt.Sprint(i, "th process, ", j))
		}
	}
	late := p.dial()
	late.say("new here", "new here")
	p.cancel()
	if err := p.result(); err != nil {
		t.Fatal(err)
	}
	late.eof()
	cl[0].eof()
}

// What the handler keeps in its state arrives, also when it takes long over a message,
// and a session that reaches no safe point stays until it does.
func TestUpgraderStateAndStragglers(t *testing.T) {
	h := func(_ context.Context, c *Conn) error {
		n := len(c.State())
		buf := make([]byte, 1)
		for {
			_, err := c.Read(buf)
			if errors.Is(err, ErrMoving) {
				c.SetState(bytes.Repeat([]byte{'x'}, n))
			}
			if err != nil {
				return err
			}
			release := func() {}
			if buf[0] == '[' {
				release = c.Hold()
				for buf[0] != ']' {
					if _, err := c.Read(buf); err != nil {
						return err
					}
				}
			}
			n++
			fmt.Fprintf(c, "%d;", n)
			release()
		}
	}
	opts := []Option{WithMoveTime(200 * time.Millisecond), WithFreezeTimeout(50 * time.Millisecond)}
	p := startUpgrader(t, newFlip(t), h, opts...)
	quick, slow := p.dial(), p.dial()
	quick.say("aa", "1;2;")
	slow.say("a", "1;")
	slow.write("[ long")
	quick.say("a", "3;")
	next, r, err := p.upgrade(h, opts...)
	if err != nil || r.Moved+r.Stayed != 2 || r.Lost != 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	quick.say("a", "4;")
	if _, err := p.u.Upgrade(); !errors.Is(err, ErrReplaced) {
		t.Errorf("upgrade of a replaced process: %v", err)
	}
	if r.Stayed == 1 { // else the bracket was not read yet, and the session moved before it
		if _, err := next.u.Upgrade(); !errors.Is(err, ErrPredecessor) {
			t.Errorf("upgrade beside an old process: %v", err)
		}
	}
	slow.say("]", "2;")
	if err := p.result(); err != nil {
		t.Fatal(err)
	}
	slow.say("a", "3;")
	// The old process has ended: now there may be a third.
	if _, r, err := next.upgrade(h, opts...); err != nil || r.Moved != 2 {
		t.Fatalf("the third process: %+v, %v", r, err)
	}
	quick.say("a", "5;")
	slow.say("a", "4;")
}

// WithDrainLimit ends what does not move.
func TestUpgraderDrainLimit(t *testing.T) {
	started := make(chan struct{}, 1)
	h := func(ctx context.Context, c *Conn) error {
		defer c.Hold()()
		started <- struct{}{}
		<-ctx.Done()
		return nil
	}
	opts := []Option{WithMoveTime(50 * time.Millisecond), WithFreezeTimeout(20 * time.Millisecond), WithDrainLimit(100 * time.Millisecond)}
	p := startUpgrader(t, newFlip(t), h, opts...)
	c := p.dial()
	<-started
	_, r, err := p.upgrade(h, opts...)
	if err != nil || r.Stayed != 1 || r.Moved != 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	if err := p.result(); err != nil {
		t.Fatal(err)
	}
	c.eof()
}

// The new program says first what it can restore; what it cannot stays untouched.
func TestUpgraderRefusesIncompatibleState(t *testing.T) {
	v1 := WithSchemas(state.Info{Name: "test", Writes: 1, Restores: []uint32{1}})
	v2 := WithSchemas(state.Info{Name: "test", Writes: 2, Restores: []uint32{2}})
	both := WithSchemas(state.Info{Name: "test", Writes: 2, Restores: []uint32{1, 2}})
	p := startUpgrader(t, newFlip(t), echoHandler, v1)
	c := p.dial()
	c.say("before", "before")
	if _, _, err := p.upgrade(echoHandler, v2); !errors.Is(err, ErrRefusedState) {
		t.Fatalf("upgrade to a program that cannot read the state: %v", err)
	}
	c.say("after", "after")
	p.dial().say("and a new one", "and a new one")
	_, r, err := p.upgrade(echoHandler, both)
	if err != nil || r.Moved != 2 {
		t.Fatalf("%+v, %v", r, err)
	}
	c.say("moved", "moved")
}

// A program that is not ready in the end changes nothing either.
func TestUpgraderNewProcessNotReady(t *testing.T) {
	p := startUpgrader(t, newFlip(t), echoHandler)
	c := p.dial()
	c.say("before", "before")
	_, _, err := p.upgrade(echoHandler, WithReady(func(context.Context) error { return errors.New("no database") }))
	if err == nil {
		t.Fatal("no error")
	}
	c.say("after", "after")
	p.dial().say("and a new one", "and a new one")
}

// Groups move as one, and a group lives in one process.
func TestUpgraderMovesGroups(t *testing.T) {
	newRoom := func() (*roomGroups, HandlerFunc) {
		g := newRoomGroups()
		return g, g.serve
	}
	g1, h1 := newRoom()
	p := startUpgrader(t, newFlip(t), h1, WithGroups(g1))
	var cl []uclient
	for range 80 { // more than a message holds
		c := p.dial()
		c.say("join lobby\n", "joined lobby\n")
		cl = append(cl, c)
	}
	cl[0].say("add 5\n", "5\n")
	cl[1].say("add 2\n", "7\n")
	g2, h2 := newRoom()
	next, r, err := p.upgrade(h2, WithGroups(g2))
	if err != nil || r.Moved != len(cl) || r.Stayed != 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	for i, c := range cl {
		c.read("joined lobby\n")
		c.say("add 1\n", fmt.Sprint(8+i, "\n"))
	}
	c := next.dial()
	c.say("join lobby\n", "joined lobby\n")
	c.say("add 1\n", fmt.Sprint(8+len(cl), "\n"))
	if err := p.result(); err != nil {
		t.Fatal(err)
	}
}

// A group that refuses to leave stays as a whole, and a client of the new process cannot
// split it.
func TestUpgraderGroupStays(t *testing.T) {
	g1, g2 := newRoomGroups(), newRoomGroups()
	g1.stubborn = true
	opts := []Option{WithMoveTime(200 * time.Millisecond), WithFreezeTimeout(50 * time.Millisecond)}
	p := startUpgrader(t, newFlip(t), g1.serve, append(opts, WithGroups(g1))...)
	a, b := p.dial(), p.dial()
	a.say("join lobby\n", "joined lobby\n")
	b.say("join lobby\n", "joined lobby\n")
	next, r, err := p.upgrade(g2.serve, append(opts, WithGroups(g2))...)
	if err != nil || r.Moved != 0 || r.Stayed != 2 {
		t.Fatalf("%+v, %v", r, err)
	}
	c := next.dial()
	c.say("join lobby\n", "refused\n")
	c.say("join attic\n", "joined attic\n")
	a.write("quit\n")
	b.write("quit\n")
	if err := p.result(); err != nil {
		t.Fatal(err)
	}
	c.say("join lobby\n", "joined lobby\n")
}

// Whatever the new process does or leaves undone, what was not given to it goes on here.
func TestUpgraderNewProcessDies(t *testing.T) {
	const n = 3
	for _, tc := range []struct {
		name string
		play func(*uproc, *script) // ends with its death
		lost int
	}{
		{"at once", func(*uproc, *script) {}, 0},
		{"after HELLO", func(p *uproc, s *script) { s.hello(); s.expect(wire.TypeWelcome) }, 0},
		{"when it is offered sessions", func(p *uproc, s *script) { s.ready(); s.expectAdopt().CloseSockets() }, 0},
		{"with sessions that it did not answer for", func(p *uproc, s *script) {
			s.ready()
			m := s.expectAdopt()
			defer m.CloseSockets()
		}, 0},
		{"before it read RESUME", func(p *uproc, s *script) {
			s.ready()
			var all wire.Message
			for len(all.Items) < n {
				m := s.expectAdopt()
				m.CloseSockets()
				all.Items = append(all.Items, m.Items...)
			}
			s.adopted(&all)
			await(s.t, "RESUME to be sent", func() bool { return p.committing() == n })
		}, 0},
		{"after it read RESUME", func(p *uproc, s *script) {
			s.ready()
			m := s.expectAdopt()
			m.CloseSockets()
			for left := n - len(m.Items); left > 0; {
				more := s.expectAdopt()
				more.CloseSockets()
				left -= len(more.Items)
			}
			s.adopted(&wire.Message{Items: m.Items[:1]})
			s.expectResume()
		}, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := startUpgrader(t, newFlip(t), echoHandler)
			var cl []uclient
			for range n {
				c := p.dial()
				c.say("before", "before")
				cl = append(cl, c)
			}
			s, result := p.scripted()
			tc.play(p, s)
			s.die()
			r := <-result
			if r.err == nil || r.Lost != tc.lost || r.Moved != 0 {
				t.Errorf("%+v, %v; want %d lost", r.Upgraded, r.err, tc.lost)
			}
			alive := 0
			for _, c := range cl {
				_, _ = io.WriteString(c.cli, "after")
				buf := make([]byte, 5)
				if _, err := io.ReadFull(c.cli, buf); err == nil && string(buf) == "after" {
					alive++
				}
			}
			if alive != n-tc.lost {
				t.Errorf("%d sessions live, want %d", alive, n-tc.lost)
			}
			p.dial().say("a new one", "a new one")
			_, r2, err := p.upgrade(echoHandler)
			if err != nil || r2.Moved != alive+1 {
				t.Errorf("the next upgrade: %+v, %v", r2, err)
			}
		})
	}
}

// A new process that answers nothing, or nonsense, or refuses everything.
func TestUpgraderNewProcessMisbehaves(t *testing.T) {
	quick := func(o *options) { o.embed.answerTime = 200 * time.Millisecond }
	begin := func(t *testing.T, opts ...Option) (*uproc, uclient, *script, <-chan upgradeReply) {
		p := startUpgrader(t, newFlip(t), echoHandler, append(opts, quick)...)
		c := p.dial()
		c.say("before", "before")
		s, result := p.scripted()
		return p, c, s, result
	}
	t.Run("silent", func(t *testing.T) {
		_, c, s, result := begin(t)
		s.ready()
		s.expectAdopt().CloseSockets()
		if r := <-result; !errors.Is(r.err, errNoAnswer) {
			t.Errorf("%+v, %v", r.Upgraded, r.err)
		}
		c.say("after", "after")
		s.die()
	})
	t.Run("nonsense", func(t *testing.T) {
		_, c, s, result := begin(t)
		s.ready()
		s.send(&wire.Message{Type: wire.TypeFreeze})
		if r := <-result; !errors.Is(r.err, wire.ErrProtocol) {
			t.Errorf("%+v, %v", r.Upgraded, r.err)
		}
		c.say("after", "after")
	})
	t.Run("refuses", func(t *testing.T) {
		_, c, s, result := begin(t, WithMoveTime(300*time.Millisecond))
		s.ready()
		m := s.expectAdopt()
		m.CloseSockets()
		s.send(&wire.Message{Type: wire.TypeRefused, Refused: []wire.Refused{{Ref: m.Items[0].Ref, Why: "full"}}})
		c.say("goes on", "goes on")
		for {
			_ = s.ch.Conn().SetReadDeadline(time.Now().Add(patience))
			m, err := s.ch.Recv()
			if err != nil {
				t.Fatal(err)
			}
			m.CloseSockets()
			if m.Type == wire.TypeSettled {
				break
			}
		}
		_ = s.flip.Ready()
		if r := <-result; r.err != nil || r.Stayed != 1 || r.Moved != 0 {
			t.Errorf("%+v, %v", r.Upgraded, r.err)
		}
		c.say("still here", "still here")
	})
	t.Run("stale answers", func(t *testing.T) {
		_, c, s, _ := begin(t)
		s.ready()
		m := s.expectAdopt()
		m.CloseSockets()
		ref := m.Items[0].Ref
		s.send(&wire.Message{Type: wire.TypeAdopted, Refs: []wire.Ref{{ID: ref.ID, Epoch: ref.Epoch - 1}, {ID: 99, Epoch: ref.Epoch}}})
		s.send(&wire.Message{Type: wire.TypePong, Nonce: 12345})
		s.die()
		c.say("after", "after")
	})
}

// What a new process does when the old one is gone: it takes over what it owns if the old
// one is dead, and otherwise only ends what it has.
func TestUpgraderOldProcessEndsInTheMiddle(t *testing.T) {
	for _, tc := range []struct {
		name          string
		dead, revoked bool
	}{{"killed", true, false}, {"killed after it took an offer back", true, true}, {"alive", false, true}} {
		t.Run(tc.name, func(t *testing.T) {
			// A session that its client began with the old process.
			made := newSession(t, ktls.ModeSoftware, 0)
			other := newSession(t, ktls.ModeSoftware, 0)
			parent := newFlip(t)
			pair := newPair(t)
			if err := parent.AddFile(channelName, pair.end); err != nil {
				t.Fatal(err)
			}
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := parent.AddFile(revokeName, r); err != nil {
				t.Fatal(err)
			}
			_ = r.Close()
			f := newFlip(t)
			f.parent, f.files, parent.files = parent, parent.files, nil
			_ = pair.end.Close()
			var child *uproc
			started := make(chan struct{})
			go func() {
				defer close(started)
				child, _ = tryUpgrader(t, f, echoHandler)
			}()
			old := &script{t: t, flip: parent, ch: pair.ch}
			old.expect(wire.TypeHello)
			old.send(&wire.Message{Type: wire.TypeWelcome, Welcome: &wire.Welcome{Version: 1, Generation: 7}})
			old.expect(wire.TypeReady)
			<-started
			old.send(&wire.Message{Type: wire.TypeBegin})
			made.id, other.id = 6<<32|1, 6<<32|2
			e := wire.NewEpoch(6, 10)
			old.send(&wire.Message{Type: wire.TypeAdopt, Items: []wire.Item{made.item(e), other.item(e)}})
			for got := 0; got < 2; {
				got += len(old.expect(wire.TypeAdopted).Refs)
			}
			old.send(&wire.Message{Type: wire.TypeResume, Refs: []wire.Ref{made.ref(e)}})
			old.send(&wire.Message{Type: wire.TypePing, Nonce: 3})
			if m := old.expect(wire.TypePong); m.Nonce != 3 {
				t.Fatalf("PONG %d", m.Nonce)
			}
			made.say("it is served", "it is served")
			if tc.revoked {
				if _, err := w.Write([]byte{1}); err != nil {
					t.Fatal(err)
				}
			}
			_ = w.Close()
			if tc.dead {
				parent.die()
			}
			_ = old.ch.Close()
			f.closeAll()
			if tc.dead {
				<-f.ready // takes over
				made.say("still", "still")
				child.dial().say("a new one", "a new one")
			}
			if !tc.revoked {
				other.say("nobody else has it", "nobody else has it")
				return
			}
			back := startProc(t, echoHandler)
			if tc.dead {
				n := 0
				_ = child.u.h.call(func(done func(error)) { n = len(child.u.h.residents); done(nil) })
				if n != 2 {
					t.Fatalf("%d sessions, want the one that was given and the new one", n)
				}
				back.give(other) // untouched
				other.say("goes on", "goes on")
				return
			}
			await(t, "the new process to see that it is alone", func() bool {
				var role hostRole
				_ = child.u.h.call(func(done func(error)) { role = child.u.h.role; done(nil) })
				return role == roleOrphaned
			})
			made.say("still", "still")
			_ = made.cli.Close()
			if err := child.result(); err != nil {
				t.Error(err)
			}
			// What was only offered was not touched: the old process can go on with it.
			back.give(other)
			other.say("goes on", "goes on")
		})
	}
}

// A session that the program began itself travels too, and can be told from others.
func TestUpgraderClientSessions(t *testing.T) {
	ln, err := ktls.Listen("tcp", "127.0.0.1:0", &ktls.Config{TLS: serverTLS(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	h := func(ctx context.Context, c *Conn) error {
		if !strings.HasPrefix(string(c.State()), "upstream") {
			return echoHandler(ctx, c)
		}
		buf := make([]byte, 100)
		for {
			n, err := c.Read(buf)
			if err != nil {
				return err
			}
			fmt.Fprintf(c, "%s: %s", c.State(), buf[:n])
		}
	}
	p := startUpgrader(t, newFlip(t), h)
	err = p.u.Dial(t.Context(), "tcp", ln.Addr().String(), &ktls.Config{TLS: clientTLS()}, []byte("upstream 7"))
	if err != nil {
		t.Fatal(err)
	}
	srv, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = srv.Close() }()
	say := func(text, want string) {
		t.Helper()
		_ = srv.SetDeadline(time.Now().Add(patience))
		if _, err := io.WriteString(srv, text); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, len(want))
		if _, err := io.ReadFull(srv, buf); err != nil || string(buf) != want {
			t.Fatalf("%q, %v; want %q", buf, err, want)
		}
	}
	say("one", "upstream 7: one")
	_, r, err := p.upgrade(h)
	if err != nil || r.Moved != 1 {
		t.Fatalf("%+v, %v", r, err)
	}
	say("two", "upstream 7: two")
	if err := p.result(); err != nil {
		t.Fatal(err)
	}
	if err := p.u.Dial(t.Context(), "tcp", ln.Addr().String(), &ktls.Config{TLS: clientTLS()}, nil); !errors.Is(err, ErrStopped) {
		t.Errorf("a session for a process that has ended: %v", err)
	}
}

// Nothing stays open of ten upgrades but what is in use.
func TestUpgraderDescriptors(t *testing.T) {
	p := startUpgrader(t, newFlip(t), echoHandler)
	c := p.dial()
	c.say("x", "x")
	before := 0
	for i := range 10 {
		next, _, err := p.upgrade(echoHandler)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.result(); err != nil {
			t.Fatal(err)
		}
		p.flip.closeAll() // the death of a process
		p = next
		if i == 0 {
			before = countFDs(t)
		}
	}
	c.say("x", "x")
	if n := countFDs(t); n > before {
		t.Errorf("%d descriptors after ten upgrades, %d after the first", n, before)
	}
}

// What a handler committed, and what it read and did not, goes along exactly.
func TestUpgraderCommit(t *testing.T) {
	h := func(_ context.Context, c *Conn) error { // answers in words of four bytes
		var buf []byte
		in := make([]byte, 100)
		for {
			n, err := c.Read(in)
			if err != nil {
				return err
			}
			for buf = append(buf, in[:n]...); len(buf) >= 4; buf = buf[4:] {
				words := append(c.State(), 'w')
				if err := c.Commit(4, words, fmt.Appendf(nil, "%d %s;", len(words), buf[:4])); err != nil {
					return err
				}
			}
		}
	}
	p := startUpgrader(t, newFlip(t), h, WithCommit())
	c := p.dial()
	c.say("onceup", "1 once;")
	for i := range 3 {
		next, r, err := p.upgrade(h, WithCommit())
		if err != nil || r.Moved != 1 {
			t.Fatalf("%+v, %v", r, err)
		}
		p = next
		c.say("onup", fmt.Sprint(2+i, " upon;"))
	}
}

// Keys change before and after moves; in the kernel layer that takes secrets that came
// along.
func TestUpgraderKeyUpdate(t *testing.T) {
	if guest.InGuest() {
		guest.NeedKernel(t, 6, 14, "a change of keys")
	}
	p := startUpgrader(t, newFlip(t), echoHandler)
	tcp, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	cli, err := ktls.Client(t.Context(), tcp.(*net.TCPConn), &ktls.Config{Mode: ktls.ModeSoftware, TLS: clientTLS()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cli.Close() }()
	_ = cli.SetDeadline(time.Now().Add(patience))
	c := uclient{&sess{t: t, cli: cli, fd: -1}}
	for i := range 3 {
		for _, ask := range []bool{true, false} {
			if err := cli.KeyUpdate(ask); err != nil {
				t.Fatal(err)
			}
			c.say("under other keys", "under other keys")
		}
		next, r, err := p.upgrade(echoHandler)
		if err != nil || r.Moved != 1 {
			t.Fatalf("upgrade %d: %+v, %v", i, r, err)
		}
		if err := p.result(); err != nil {
			t.Fatal(err)
		}
		p = next
	}
	c.say("at the end", "at the end")
}
