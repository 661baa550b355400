package supervise

import (
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// A worker dies while it takes a group's state over: the group goes on in quarantine, with
// its state as often as it is offered at all, then without; the worker's own sessions go
// elsewhere, nobody is closed, and no other worker is given the group. If workers go on
// dying over it without the state, it is closed at last.
func TestGroupOverWhichItsNextHomeDies(t *testing.T) {
	for _, first := range []string{"channel ends first", "death seen first"} {
		t.Run(first, func(t *testing.T) {
			u, pass := poisonable(t)
			home := u.marked()
			ms := u.kernelMembers(home, 2, "room")
			u.checkpoint(home, ms[0], "room", "bad", 1)
			next := u.marked()
			u.dies(home)
			ad := next.expect(wire.TypeAdopt)
			if len(ad.Items) != 2 || len(ad.Blobs) != 1 {
				t.Fatalf("ADOPT %+v", ad)
			}
			own := u.owned(next, false)
			other := u.marked()
			if first == "death seen first" {
				u.s.call(func() { next.w.exited = true })
			}
			u.dies(next, ms...)
			if got := other.adopts(1); got[0].ID != own.ID {
				t.Fatalf("the bystander: %v", got)
			}
			for crashes := 1; crashes < groupLimit(2); crashes++ {
				if _, e := u.owner(ms[0].ID); int(e.Crashes) != crashes || u.poisoned() != 0 {
					t.Errorf("the ledger says %d crashes, want %d; %d were closed", e.Crashes, crashes, u.poisoned())
				}
				ward := u.ward()
				pass(5 * time.Second)
				ad := ward.expect(wire.TypeAdopt)
				if len(ad.Items) != 2 || len(ad.Blobs) != map[bool]int{true: 1}[crashes < maxStateOffers] {
					t.Fatalf("offer %d in quarantine: %+v", crashes, ad)
				}
				u.dies(ward, ms...)
			}
			u.silent(other)
			for _, ref := range ms {
				u.peerSeesEnd(ref.ID)
			}
			if n := u.poisoned(); n != 2 {
				t.Errorf("%d were closed, want the group", n)
			}
		})
	}
}

// The group goes on in another worker before it is known that the first one died over its
// state: it is under no suspicion there, and one that is still on its way is.
func TestGroupThatFoundAHomeMeanwhileIsNoSuspect(t *testing.T) {
	for _, taken := range []bool{false, true} {
		t.Run(map[bool]string{false: "offered", true: "taken"}[taken], func(t *testing.T) {
			u, pass := poisonable(t)
			home := u.marked()
			ms := u.kernelMembers(home, 2, "room")
			u.checkpoint(home, ms[0], "room", "state", 1)
			next := u.marked()
			u.dies(home)
			next.expect(wire.TypeAdopt)
			other := u.marked()
			u.s.call(func() { // no more is known of it than that it hung up
				u.s.refuseFor(next.w, "the worker closed its control channel")
				next.w.deaf = true // it is offered nothing
			})
			next.expect(wire.TypeAbort)
			pass(retryAfter)
			ad := other.expect(wire.TypeAdopt)
			if len(ad.Items) != 2 {
				t.Fatalf("ADOPT %+v", ad)
			}
			if taken {
				other.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(ad.Items[0].Ref, ad.Items[1].Ref)})
				other.expect(wire.TypeResume)
			}
			u.dies(next, ms...)
			suspects := 0
			u.s.call(func() { suspects = len(u.pool.ward.suspects) })
			for _, ref := range ms {
				if _, e := u.owner(ref.ID); (e.Crashes == 0) != taken {
					t.Errorf("the ledger says %d crashes", e.Crashes)
				}
			}
			if (suspects == 0) != taken {
				t.Errorf("%d suspects", suspects)
			}
		})
	}
}

// Worker after worker dies in a callback of a group that they serve: it goes on without its
// state, and is closed when that does not help. A member that was not handled in all of the
// crashes is not, nor is anybody when something else was being handled as well.
func TestGroupInWhoseCallbacksWorkersDie(t *testing.T) {
	u, pass := poisonable(t)
	f := u.marked()
	ms := u.kernelMembers(f, 3, "room")
	u.checkpoint(f, ms[0], "room", "bad", 1)
	alone := u.owned(f, false)
	bad := ms[:2]
	u.dies(f, append(refs(alone), bad...)...)
	for crashes := 1; ; crashes++ {
		ward := u.ward()
		p, blobs, states := ward.play(), 0, 0
		p.set(func() { p.seen = func(m *wire.Message) { blobs += len(m.Blobs) } })
		for n := 0; u.loadOf(ward)[0] < len(ms)+1; n++ {
			if n == 1000 {
				t.Fatalf("after %d crashes not all came to the quarantine worker", crashes)
			}
			pass(100 * time.Millisecond)
			time.Sleep(time.Millisecond)
		}
		u.surePlayed(ward)
		p.set(func() { states = blobs })
		if states != map[bool]int{true: 1}[crashes < maxStateOffers] {
			t.Fatalf("after %d crashes the group came with %d states", crashes, states)
		}
		if crashes == groupLimit(2) {
			u.dies(ward, bad...)
			break
		}
		u.dies(ward, append(refs(alone), bad...)...)
		if n := u.poisoned(); n != 0 {
			t.Fatalf("%d closed, and another one was being handled each time", n)
		}
	}
	for _, ref := range bad {
		u.peerSeesEnd(ref.ID)
	}
	if n := u.poisoned(); n != 2 {
		t.Errorf("%d were closed, want the two that were handled in each crash", n)
	}
	for _, ref := range refs(ms[2], alone) {
		if _, e := u.owner(ref.ID); e.ID != ref.ID {
			t.Errorf("session %d ended as well", ref.ID)
		}
	}
}
