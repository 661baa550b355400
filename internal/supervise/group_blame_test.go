package supervise

import (
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// A worker dies while it takes a group's state over: the group goes on in quarantine, with
// its state as often as it is offered at all, then without; the worker's own sessions go
// elsewhere, nobody is closed, and no other worker is given the group.
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
			for offers := 1; offers <= maxStateOffers; offers++ {
				ward := u.ward()
				pass(5 * time.Second)
				ad := ward.expect(wire.TypeAdopt)
				if len(ad.Items) != 2 || len(ad.Blobs) != map[bool]int{true: 1}[offers < maxStateOffers] {
					t.Fatalf("offer %d in quarantine: %+v", offers+1, ad)
				}
				if offers < maxStateOffers {
					u.dies(ward, ms...)
				}
			}
			u.silent(other)
			if _, e := u.owner(ms[0].ID); e.Crashes != 1 || u.poisoned() != 0 {
				t.Errorf("the ledger says %d crashes, %d were closed", e.Crashes, u.poisoned())
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
