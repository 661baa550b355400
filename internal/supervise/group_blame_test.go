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
