package supervise

import (
	"context"
	"slices"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/ownership"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// crash ends the supervisor as kill -9 would and starts the next one on what it
// left: the ledger's memory, the keeper's entries, the workers.
func (u *unit) crash() {
	u.t.Helper()
	// What the keeper was told before the crash counts; the test wants it all.
	before, resume := u.pool, (*probationRecord)(nil)
	u.s.call(func() {
		if before.op != nil {
			resume = before.op.record()
		}
	})
	u.end()
	led, err := openLedger(u.led)
	if err != nil {
		u.t.Fatal(err)
	}
	u.start(led, u.s.incarnation+1)
	u.pool.serving, u.pool.newest, u.pool.resume = before.serving, before.newest, resume
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := u.s.recoverAll(ctx, func() { u.s.resumeUpgrade(u.pool) }); err != nil {
		u.t.Fatal(err)
	}
	go u.s.run()
}

// reply answers the successor's INVENTORY.
func (f *fake) reply(held ...wire.Held) {
	f.t.Helper()
	m := f.expect(wire.TypeInventory)
	f.send(&wire.Message{Type: wire.TypeInventoryReply, Nonce: m.Nonce, Held: held, Last: true})
}

func (u *unit) recovered() {
	u.t.Helper()
	u.until(func() bool { return u.s.recovery == nil })
}

// A supervisor dies between forgetting a dead worker and that worker's marks: the next one
// forgets these, or the keeper would hold them for ever. Those of a living worker stay.
func TestCrashLeavesNoMarks(t *testing.T) {
	u := newUnit(t)
	f := u.worker(1)
	dead := &worker{Worker: ownership.Worker{ID: f.w.ID + 100}}
	for _, w := range []*worker{f.w, dead} {
		fd, err := sys.SharedMemfd("marks", 16)
		if err != nil {
			t.Fatal(err)
		}
		if err := u.store.Put(t.Context(), keeper.Entry{Key: w.marksKey(), FDs: []int{fd}}); err != nil {
			t.Fatal(err)
		}
		sys.CloseAll([]int{fd})
	}
	u.crash()
	f.reply()
	u.recovered()
	u.until(func() bool { return !u.stored(dead.marksKey()) })
	if !u.stored(f.w.marksKey()) {
		t.Error("a living worker's marks were forgotten")
	}
}

// stored reports that the keeper has an entry.
func (u *unit) stored(k keeper.Key) bool {
	list, err := u.store.List(u.t.Context(), k.Kind)
	if err != nil {
		u.t.Fatal(err)
	}
	return slices.ContainsFunc(list, func(e keeper.Entry) bool { return e.Key == k })
}

// The supervisor dies after the commit and before RESUME got out: the new owner
// has it, and is told to go on.
func TestCrashAfterCommitRollsForward(t *testing.T) {
	u, old, young, own, try := offered(t, true)
	young.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(try)})
	young.expect(wire.TypeResume) // the test says it did not arrive
	old.expect(wire.TypeRelease)
	old.expect(wire.TypeStop)
	u.crash()
	old.reply(wire.Held{Ref: own, Phase: wire.PhaseParked, Attempt: try.Epoch})
	young.reply(wire.Held{Ref: try, Phase: wire.PhaseAdopted})
	u.recovered()
	if m := young.expect(wire.TypeResume); m.Refs[0] != try {
		t.Fatalf("RESUME %+v, want %+v", m, try)
	}
	if m := old.expect(wire.TypeRelease); m.Refs[0] != try {
		t.Fatalf("RELEASE %+v, want %+v", m, try)
	}
	if owner, _ := u.owner(own.ID); owner != young.w.ID {
		t.Errorf("owner %d", owner)
	}
}

// The supervisor dies before the commit: the old owner goes on, the new one drops
// its copy, and a late ADOPTED changes nothing.
func TestCrashBeforeCommitRollsBack(t *testing.T) {
	u, old, young, own, try := offered(t, true)
	u.crash()
	young.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(try)})
	old.reply(wire.Held{Ref: own, Phase: wire.PhaseParked, Attempt: try.Epoch})
	young.reply(wire.Held{Ref: try, Phase: wire.PhaseAdopted})
	if m := young.expect(wire.TypeAbort); m.Refs[0] != try {
		t.Fatalf("ABORT %+v", m)
	}
	if m := old.expect(wire.TypeThaw); m.Refs[0] != try {
		t.Fatalf("THAW %+v", m)
	}
	if owner, e := u.owner(own.ID); owner != old.w.ID || e.Epoch != own.Epoch {
		t.Errorf("the ledger says %+v", e)
	}
	// The move goes on by itself, with an epoch of the new incarnation.
	again := old.expect(wire.TypeFreeze).Refs[0]
	if again.Epoch <= try.Epoch {
		t.Errorf("epoch %d after %d", again.Epoch, try.Epoch)
	}
}

// What ended while no supervisor ran is counted once.
func TestCrashCountsWhatEndedMeanwhile(t *testing.T) {
	u := newUnit(t)
	w := u.worker(1)
	told := u.owned(w, true)
	unknown := u.owned(w, true)
	lives := u.owned(w, true)
	u.crash()
	w.reply(wire.Held{Ref: told, Phase: wire.PhaseClosed, Reason: wire.ReasonPeer}, wire.Held{Ref: lives, Phase: wire.PhaseActive})
	if m := w.expect(wire.TypeClosedAck); m.Refs[0].ID != told.ID {
		t.Fatalf("CLOSED_ACK %+v", m)
	}
	u.recovered()
	if c := u.counters(); c.peer != 1 || c.unknown != 1 || c.lost != 0 {
		t.Errorf("counters %+v", c)
	}
	u.s.call(func() {
		if len(u.s.sessions) != 1 || u.s.sessions[lives.ID] == nil {
			t.Errorf("sessions %v; only %d lives, not %d", u.s.sessions, lives.ID, unknown.ID)
		}
	})
}

// A session that nobody had yet, and one whose owner died together with the
// supervisor, find an owner.
func TestCrashWithParkedSessions(t *testing.T) {
	u := newUnit(t)
	w := u.worker(1)
	kernel := u.owned(w, false)
	soft := u.owned(w, true)
	u.s.call(func() { w.w.state = workerRetiring })
	fresh := u.session(true)
	u.until(func() bool { return len(u.pool.parked) == 1 })
	w.kill()
	u.crash()
	other := u.worker(1)
	got := map[uint64]wire.Item{}
	for len(got) < 2 {
		for _, it := range other.expect(wire.TypeAdopt).Items {
			got[it.ID] = it
		}
	}
	if it := got[fresh]; it.Flags != 0 || string(it.Cargo.Record) != "initial "+secretText {
		t.Errorf("the new session comes as %+v", it)
	}
	if it := got[kernel.ID]; it.Flags&wire.FlagInterrupted == 0 {
		t.Errorf("the interrupted session comes as %+v", it)
	}
	u.peerSeesEnd(soft.ID)
}

// A detached worker lives: a successor must not take its sessions for orphans.
func TestDetachedWorkerKeepsItsSessionsOverACrash(t *testing.T) {
	u := newUnit(t)
	w := u.worker(1)
	own := u.owned(w, false)
	u.sure(w)
	w.send(&wire.Message{Type: wire.TypeAdopt}) // nonsense
	u.until(func() bool { return w.w.state == workerDetached })
	u.crash()
	u.recovered()
	other := u.worker(1)
	u.silent(other)
	if owner, _ := u.owner(own.ID); owner != w.w.ID {
		t.Fatalf("owner %d, want the worker that still serves it, %d", owner, w.w.ID)
	}
	w.kill()
	if it := other.expect(wire.TypeAdopt).Items[0]; it.ID != own.ID {
		t.Fatalf("ADOPT %+v", it)
	}
}

// The supervisor dies between the commits of two members of one group: none was
// resumed, so all go back.
func TestCrashInTheMiddleOfAGroupsCommit(t *testing.T) {
	u, old, young, ms, fr := freezing(t, 2)
	old.send(parkGroup("room", fr.Refs, true))
	young.expect(wire.TypeAdopt)
	// The first member's commit, by hand.
	u.s.call(func() {
		ss := u.s.sessions[fr.Refs[0].ID]
		e := ss.slotEntry()
		e.Owner, e.Epoch = young.w.ID, fr.Refs[0].Epoch
		u.s.led.put(int(ss.slot), e)
	})
	u.crash()
	var atOld, atYoung []wire.Held
	for _, r := range fr.Refs {
		for _, m := range ms {
			if m.ID == r.ID {
				atOld = append(atOld, wire.Held{Ref: m, Phase: wire.PhaseParked, Attempt: r.Epoch, Group: "room"})
			}
		}
		atYoung = append(atYoung, wire.Held{Ref: r, Phase: wire.PhaseAdopted, Group: "room"})
	}
	old.reply(atOld...)
	young.reply(atYoung...)
	if m := young.expect(wire.TypeAbort); len(m.Refs) != 2 {
		t.Fatalf("ABORT %+v", m)
	}
	if m := old.expect(wire.TypeThaw); len(m.Refs) != 2 || m.Group != "room" {
		t.Fatalf("THAW %+v", m)
	}
	for _, m := range ms {
		if owner, e := u.owner(m.ID); owner != old.w.ID || e.Epoch != m.Epoch {
			t.Errorf("the ledger says %+v, want owner %d, epoch %d", e, old.w.ID, m.Epoch)
		}
	}
}

// A worker that does not answer holds nothing up for ever and keeps its sessions.
func TestSilentWorkerKeepsItsSessions(t *testing.T) {
	u := newUnit(t)
	w := u.worker(1)
	own := u.owned(w, true)
	u.crash()
	w.expect(wire.TypeInventory)
	u.s.call(func() { u.s.recoveryTimedOut() })
	u.recovered()
	if owner, _ := u.owner(own.ID); owner != w.w.ID {
		t.Errorf("owner %d", owner)
	}
}
