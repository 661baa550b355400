package supervise

import (
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// upgrading puts the pool into a phase of an upgrade from generation 1 to 2.
func (u *unit) upgrading(phase opPhase, workers int) <-chan *admin.PoolReport {
	return u.upgradingWith(phase, workers, upgradeOptions{})
}

func (u *unit) upgradingWith(phase opPhase, workers int, o upgradeOptions) <-chan *admin.PoolReport {
	ch := make(chan *admin.PoolReport, 1)
	u.s.call(func() {
		u.pool.cfg.Workers = workers
		op := &operation{kind: opUpgrade, pool: u.pool, from: 1, to: 2, command: []string{"/nonexistent"}, oldCommand: []string{"/nonexistent"}, phase: phase,
			opts: o, share: newShare(o.canary), began: u.s.now(), wait: patience, deadline: u.s.now().Add(patience), finished: func(op *operation) {
				u.pool.cfg.Workers = 0
				ch <- &op.report
			}}
		u.pool.newest, u.pool.op = 2, op
	})
	return ch
}

func (u *unit) report(ch <-chan *admin.PoolReport) (*admin.PoolReport, admin.Outcome) {
	u.t.Helper()
	select {
	case r := <-ch:
		return r, outcome([]admin.PoolReport{*r})
	case <-time.After(patience):
		u.t.Fatal("the upgrade does not end")
		return nil, 0
	}
}

// nonsense is a message that no worker sends.
var nonsense = &wire.Message{Type: wire.TypeFreeze, Refs: refs(wire.Ref{ID: 1, Epoch: 1})}

// A new worker that breaks the protocol ends the upgrade, also when it was ready and
// others are still starting.
func TestNewWorkerBreaksTheProtocolWhileStarting(t *testing.T) {
	u := newUnit(t)
	u.owned(u.worker(1), true)
	ch := u.upgrading(opStarting, 2)
	u.worker(2).send(nonsense)
	if r, o := u.report(ch); o != admin.OutcomeRefused || r.Error == "" || u.pool.serving != 1 {
		t.Errorf("report %+v, outcome %d", r, o)
	}
}

// The same at its first session: everything goes back, and new sessions go to the
// old generation.
func TestNewWorkerBreaksTheProtocolWhileMoving(t *testing.T) {
	u := newUnit(t)
	old := u.worker(1)
	u.owned(old, true)
	y := u.worker(2)
	u.retire(old, 2)
	ch := u.upgrading(opMoving, 1)
	try := old.expect(wire.TypeFreeze).Refs[0]
	old.send(parkedItem(try, "p"))
	y.expect(wire.TypeAdopt)
	y.send(nonsense)
	old.expect(wire.TypeThaw)
	if r, o := u.report(ch); o != admin.OutcomeRefused || r.Error == "" {
		t.Errorf("report %+v, outcome %d", r, o)
	}
	u.owned(old, true)
}

// The last old worker is killed in mid-upgrade: the end of its channel comes before
// its death, and what it takes with it is in the report.
func TestLostSessionsAreInTheReport(t *testing.T) {
	u := newUnit(t)
	old := u.worker(1)
	u.owned(old, true)
	u.worker(2)
	u.retire(old, 2)
	ch := u.upgrading(opMoving, 1)
	old.expect(wire.TypeFreeze)
	_ = old.ch.Close()
	u.until(func() bool { return old.w.eof })
	old.kill()
	if r, o := u.report(ch); o != admin.OutcomeLost || r.Lost != 1 || r.Stayed != 0 {
		t.Errorf("report %+v, outcome %d", r, o)
	}
}

// Record state that an owner parked is spent once somebody owned the session
// afterwards: a second crash must not bring its unread and unsent bytes back.
func TestParkedStateIsUsedOnce(t *testing.T) {
	u := newUnit(t)
	old := u.worker(1)
	u.owned(old, false)
	young := u.worker(2)
	u.retire(old, 2)
	try := old.expect(wire.TypeFreeze).Refs[0]
	old.send(parkedItem(try, "parked and unsent"))
	young.expect(wire.TypeAdopt)
	old.kill()
	u.until(func() bool { return len(u.s.workers) == 1 })
	young.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(try)})
	young.expect(wire.TypeResume)
	third := u.worker(2)
	young.kill()
	it := third.expect(wire.TypeAdopt).Items[0]
	if got := string(it.Cargo.Record); got != "initial "+secretText || it.Flags&wire.FlagInterrupted == 0 {
		t.Errorf("the third owner gets %q, flags %d", got, it.Flags)
	}
}

// A session on its way to a room that begins to move in that moment stays and asks
// again, instead of being left behind in the room's old home.
func TestJoinRacesUpgrade(t *testing.T) {
	u := newUnit(t)
	a := u.worker(1)
	u.members(a, 2, "room")
	b := u.worker(1)
	x := u.owned(b, true)
	b.send(&wire.Message{Type: wire.TypeGroup, Refs: refs(x), Group: "room"})
	try := b.expect(wire.TypeFreeze).Refs[0]
	n := u.worker(2)
	u.retire(a, 2)
	fr := a.expect(wire.TypeFreeze)
	b.send(parkedItem(try, "x"))
	b.expect(wire.TypeThaw)
	b.send(&wire.Message{Type: wire.TypeGroup, Refs: refs(x), Group: "room"})
	u.settle(b)
	a.send(parkGroup("room", fr.Refs, true))
	n.expect(wire.TypeAdopt)
	n.send(&wire.Message{Type: wire.TypeAdopted, Refs: fr.Refs})
	n.expect(wire.TypeResume)
	again := b.expect(wire.TypeFreeze).Refs[0]
	b.send(parkedItem(again, "x"))
	if it := n.expect(wire.TypeAdopt).Items[0]; it.ID != x.ID || it.Group != "room" {
		t.Errorf("ADOPT %+v", it)
	}
}

// Who waits for a room whose home dies is answered when it has a new one.
func TestWaitersOfADeadHome(t *testing.T) {
	u := newUnit(t)
	a := u.worker(1)
	r := u.owned(a, false)
	u.join(a, r, "room")
	b := u.worker(1)
	x := u.owned(b, true)
	n := u.worker(2)
	u.retire(a, 2)
	a.expect(wire.TypeFreeze)
	b.send(&wire.Message{Type: wire.TypeGroup, Refs: refs(x), Group: "room"})
	u.settle(b)
	a.kill()
	it := n.expect(wire.TypeAdopt).Items[0]
	n.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(it.Ref)})
	n.expect(wire.TypeResume)
	if fr := b.expect(wire.TypeFreeze); fr.Refs[0].ID != x.ID {
		t.Errorf("FREEZE %+v", fr)
	}
}

// A worker that says late what it has is brought into line then.
func TestLateInventory(t *testing.T) {
	u, old, young, own, try := offered(t, true)
	young.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(try)})
	young.expect(wire.TypeResume) // the test says it did not arrive
	old.expect(wire.TypeRelease)
	old.expect(wire.TypeStop)
	u.crash()
	old.reply(wire.Held{Ref: own, Phase: wire.PhaseParked, Attempt: try.Epoch})
	m := young.expect(wire.TypeInventory)
	u.until(func() bool { return old.w != nil && u.s.recovery != nil })
	u.s.call(u.s.recoveryTimedOut)
	young.send(&wire.Message{Type: wire.TypeInventoryReply, Nonce: m.Nonce, Held: []wire.Held{{Ref: try, Phase: wire.PhaseAdopted}}, Last: true})
	if r := young.expect(wire.TypeResume); r.Refs[0] != try {
		t.Errorf("RESUME %+v", r)
	}
}

// A room without an owner is still a room after a crash of the supervisor.
func TestParkedGroupAfterCrash(t *testing.T) {
	u := newUnit(t)
	a := u.worker(1)
	for range 4 {
		u.join(a, u.owned(a, false), "room")
	}
	a.kill()
	u.until(func() bool { return len(u.s.workers) == 0 && len(u.pool.parked) == 4 })
	u.crash()
	u.recovered()
	b := u.worker(1)
	m := b.expect(wire.TypeAdopt)
	c := u.worker(1)
	if len(m.Items) != 4 {
		t.Fatalf("%d of 4 members offered", len(m.Items))
	}
	b.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(m.Items[0].Ref, m.Items[1].Ref)})
	b.send(&wire.Message{Type: wire.TypeRefused, Refused: []wire.Refused{{Ref: m.Items[2].Ref, Why: "not now"}}})
	if off := b.expect(wire.TypeAbort); len(off.Refs) != 4 {
		t.Errorf("ABORT %+v: the room is not split", off)
	}
	again := c.expect(wire.TypeAdopt)
	if len(again.Items) != 4 || again.Group != "room" || !again.Last {
		t.Errorf("ADOPT %+v", again)
	}
	c.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(again.Items[0].Ref, again.Items[1].Ref, again.Items[2].Ref, again.Items[3].Ref)})
	if on := c.expect(wire.TypeResume); len(on.Refs) != 4 {
		t.Errorf("RESUME %+v", on)
	}
	u.silent(b)
}

// While everything goes back, the old generation serves: a worker of it that dies is
// replaced, though sessions of the new one cannot move yet.
func TestDeathInTheOldGenerationWhileGoingBack(t *testing.T) {
	u := newUnit(t)
	old, young := u.worker(1), u.worker(1)
	u.owned(old, false)
	u.owned(young, false)
	u.s.call(func() {
		u.pool.cfg.Workers = 1
		young.w.gen, young.w.state = 2, workerRetiring
		u.pool.op = &operation{kind: opUpgrade, pool: u.pool, phase: opBack, from: 1, to: 2, deadline: time.Now().Add(time.Hour)}
	})
	old.kill()
	u.until(func() bool { return u.pool.failures > 0 }) // its program is not there
}
