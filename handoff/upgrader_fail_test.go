package handoff

import (
	"context"
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
	"github.com/ktlsvisor/ktlsvisor/state"
)

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

// A program that is told to stop while an upgrade fails, after which it would accept again,
// does not.
func TestUpgraderStoppedAcceptsNoMore(t *testing.T) {
	f := newFront(nil)
	f.start()
	f.end()
	f.start() // as reopen does, in a goroutine
	if f.isOpen() {
		t.Error("it accepts after it was told to stop")
	}
	f.close()
}
