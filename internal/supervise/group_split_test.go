package supervise

import (
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// commits writes the commit of one session as a supervisor does that dies with it.
func (u *unit) commits(try wire.Ref, to *fake) {
	u.s.call(func() {
		e := u.s.sessions[try.ID].slotEntry()
		e.Owner, e.Epoch = to.w.ID, try.Epoch
		u.s.led.put(int(u.s.sessions[try.ID].slot), e)
	})
}

// split is a unit whose supervisor took over a group of two, of which its predecessor had
// committed one to young; old has both parked, and has not said so.
func split(t *testing.T) (u *unit, old, young *fake, own, try []wire.Ref) {
	u, old, young, own, fr := freezing(t, 2)
	try = fr.Refs
	if own[0].ID != try[0].ID {
		own[0], own[1] = own[1], own[0]
	}
	old.send(parkGroup("room", try, true))
	young.expect(wire.TypeAdopt)
	u.commits(try[0], young)
	u.crash()
	young.reply(wire.Held{Ref: try[0], Phase: wire.PhaseAdopted, Group: "room"}, wire.Held{Ref: try[1], Phase: wire.PhaseAdopted, Group: "room"})
	u.until(func() bool {
		for _, w := range u.s.workers {
			if w.inventory != nil && w.inventory.last {
				u.s.recoveryTimedOut()
				return true
			}
		}
		return false
	})
	if m := young.expect(wire.TypeAbort); len(m.Refs) != 1 || m.Refs[0] != try[1] {
		t.Fatalf("ABORT %+v", m)
	}
	u.silent(young)
	return u, old, young, own, try
}

// The supervisor dies in the middle of a group's commit, and the old home is late with its
// word: the group goes on there, whole.
func TestSplitGroupWaitsForItsOldHome(t *testing.T) {
	u, old, young, own, try := split(t)
	old.reply(wire.Held{Ref: own[0], Phase: wire.PhaseParked, Attempt: try[0].Epoch, Group: "room"},
		wire.Held{Ref: own[1], Phase: wire.PhaseParked, Attempt: try[1].Epoch, Group: "room"})
	if m := young.expect(wire.TypeAbort); len(m.Refs) != 1 || m.Refs[0] != try[0] {
		t.Errorf("ABORT %+v", m)
	}
	if m := old.expect(wire.TypeThaw); m.Group != "room" || !m.Last || len(m.Refs) != 2 {
		t.Errorf("THAW %+v", m)
	}
	for _, r := range own {
		if owner, e := u.owner(r.ID); owner != old.w.ID || e.Epoch != r.Epoch {
			t.Errorf("the ledger says %+v", e)
		}
	}
}

// When it does not say anything at all, the other one goes on in time.
func TestSplitGroupDoesNotWaitForEver(t *testing.T) {
	u, _, young, _, try := split(t)
	u.s.call(func() {
		now := u.s.now()
		u.s.endSplits(now)
		u.s.endSplits(now.Add(splitTimeout + time.Second))
	})
	if m := young.expect(wire.TypeResume); len(m.Refs) != 1 || m.Refs[0] != try[0] {
		t.Fatalf("RESUME %+v", m)
	}
}

// strayed is a unit in which a member of a group is away from home.
func strayed(t *testing.T) (u *unit, home, away *fake, ref wire.Ref) {
	t.Helper()
	u = newUnit(t)
	home = u.worker(1)
	u.members(home, 1, "room")
	away = u.worker(1)
	ref = u.owned(away, true)
	u.s.call(func() {
		k := u.pool.groupKey("room")
		u.s.m.Restore(&u.s.sessions[ref.ID].Session, &away.w.Worker, &k)
	})
	return u, home, away, ref
}

// To take sessions from a worker that has a member of a group is not to take the group
// from the worker that is its home.
func TestStrayMemberDoesNotMoveItsGroup(t *testing.T) {
	u, home, away, _ := strayed(t)
	other := u.worker(1)
	u.s.call(func() {
		if n, _ := u.s.shift(away.w, other.w, 1, func(int, int) bool { return true }); n != 0 {
			t.Errorf("%d sessions under way", n)
		}
	})
	u.silent(home)
}

// Who does not serve a session yet cannot change its keys: what is owed to the peer is paid
// when it goes on.
func TestSplitGroupPaysKeyUpdatesLater(t *testing.T) {
	u, _, young, _, try := split(t)
	u.s.call(func() {
		u.s.workers[young.w.ID].rekeys = true
		u.s.startUpdate(u.s.sessions[try[0].ID], owesUpdate)
	})
	u.silent(young)
	u.s.call(func() { u.s.m.ResumeWithheld() })
	young.expect(wire.TypeResume)
	young.expect(wire.TypePause)
}

// A member that is elsewhere than its group follows it when its worker is to go.
func TestStrayMemberFollowsItsGroup(t *testing.T) {
	u, home, away, ref := strayed(t)
	u.s.call(func() { away.w.state = workerRetiring })
	u.comesHome(home, away, ref)
}
