package supervise

import (
	"fmt"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/ownership"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// handled returns when everything that a worker sent has been handled; nothing else may
// be on its way to it.
func handled(f *fake) {
	f.t.Helper()
	f.send(&wire.Message{Type: wire.TypeCheckpoint, Nonce: 1 << 40, Group: "none", Refs: refs(wire.Ref{ID: 1 << 40}),
		Blobs: []wire.Blob{{Group: "none", Data: []byte("x")}}})
	if m := f.expect(wire.TypeCheckpointed); m.Nonce != 1<<40 {
		f.t.Fatalf("CHECKPOINTED %+v", m)
	}
}

// waiting counts the wishes to join that wait.
func (u *unit) waiting() (n int) {
	for _, list := range u.s.waiters {
		n += len(list)
	}
	return n
}

// A worker that changes its mind again and again does not fill the supervisor's memory:
// a session waits for one group, and while a successor starts it has one question.
func TestOneWishPerSession(t *testing.T) {
	u, old, young, _, _ := freezing(t, 1)
	ref := u.owned(young, true)
	for i := range 50 {
		young.send(&wire.Message{Type: wire.TypeGroup, Refs: refs(ref), Group: [...]string{"room", "hall"}[i%2]})
		if i%2 == 1 {
			young.expect(wire.TypeGrouped) // the hall is its own
		}
	}
	young.send(&wire.Message{Type: wire.TypeGroup, Refs: refs(ref), Group: "room"})
	handled(young)
	u.s.call(func() {
		if n := u.waiting(); n != 1 {
			t.Errorf("%d wishes of one session wait", n)
		}
		u.s.quiescing = true
	})
	for i := range 50 {
		young.send(&wire.Message{Type: wire.TypeGroup, Refs: refs(ref), Group: fmt.Sprint("g", i)})
	}
	handled(young)
	u.s.call(func() {
		if n := len(u.s.unanswered); n != 1 {
			t.Errorf("%d questions of one session wait", n)
		}
	})
	u.s.call(u.s.goOn)
	if m := young.expect(wire.TypeGrouped); m.Group != "g49" || m.Text != "" {
		t.Errorf("GROUPED %+v, want the last wish granted", m)
	}
	u.s.call(func() {
		if n := u.waiting(); n != 0 {
			t.Errorf("%d wishes wait after another was granted", n)
		}
	})
	old.kill()
}

// A wish ends when it is taken back, when the session ends, and when it gets another owner,
// who asks by itself: nobody becomes a member who did not ask.
func TestWishEnds(t *testing.T) {
	for name, end := range map[string]func(u *unit, f *fake, ref wire.Ref){
		"taken back": func(u *unit, f *fake, ref wire.Ref) {
			f.send(&wire.Message{Type: wire.TypeGroup, Refs: refs(ref)})
			f.expect(wire.TypeGrouped)
		},
		"ended": func(u *unit, f *fake, ref wire.Ref) {
			f.send(&wire.Message{Type: wire.TypeClosed, Closed: []wire.Closed{{Ref: ref, Reason: wire.ReasonPeer}}})
			f.expect(wire.TypeClosedAck)
		},
		"moved": func(u *unit, f *fake, ref wire.Ref) {
			other := u.worker(2)
			u.s.call(func() { u.s.freezeOne(f.w, u.s.sessions[ref.ID], other.w, nil) })
			try := f.expect(wire.TypeFreeze).Refs[0]
			f.send(parkedItem(try, "rec"))
			other.expect(wire.TypeAdopt)
			other.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(try)})
			other.expect(wire.TypeResume)
		},
	} {
		t.Run(name, func(t *testing.T) {
			u, _, young, _, _ := freezing(t, 1)
			ref := u.owned(young, true)
			young.send(&wire.Message{Type: wire.TypeGroup, Refs: refs(ref), Group: "room"})
			handled(young)
			u.s.call(func() {
				if n := len(u.s.waiters[ownership.GroupKey{Pool: "p", Name: "room"}]); n != 1 {
					t.Errorf("%d wait", n)
				}
			})
			end(u, young, ref)
			u.until(func() bool { return u.waiting() == 0 })
		})
	}
}

// An end that is told twice in one message counts once, against a canary as well.
func TestEndToldTwiceAtOnce(t *testing.T) {
	u := newUnit(t)
	f := u.worker(1)
	ref := u.owned(f, true)
	op := &operation{kind: opUpgrade, pool: u.pool, to: 1, phase: opSoaking, deadline: u.s.now().Add(patience)}
	u.s.call(func() { u.pool.op = op })
	c := wire.Closed{Ref: ref, Reason: wire.ReasonHandler}
	f.send(&wire.Message{Type: wire.TypeClosed, Closed: []wire.Closed{c, c, c}})
	f.expect(wire.TypeClosedAck)
	u.s.call(func() {
		if n := op.share.young; n.ended != 1 || n.bad != 1 {
			t.Errorf("counted %+v", n)
		}
		u.pool.op = nil
	})
}
