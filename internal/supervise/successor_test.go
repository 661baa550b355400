package supervise

import (
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/ownership"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// A supervisor that dies after it has noted whose fault a death was, and before the
// keeper has heard of the death, leaves the same death to the next one: it is one crash,
// and closes nothing.
func TestDeathSeenByTwoSupervisorsIsOneCrash(t *testing.T) {
	u, _ := poisonable(t)
	f := u.marked()
	own := u.owned(f, false)
	u.s.call(func() {
		f.w.marks.words[1].Store(own.ID | wire.MarkHandling)
		f.w.marks.words[0].Store(1)
		u.s.blame(f.w, workerReady)
	})
	marks := f.w.marks
	u.crash()
	u.s.call(func() {
		u.pool.cfg.Poison, u.pool.ward.starting = 2, true
		u.s.workers[f.w.ID].marks = marks // the keeper has them
	})
	f.reply(wire.Held{Ref: own, Phase: wire.PhaseActive})
	u.recovered()
	f.kill()
	u.until(func() bool { return u.s.workers[f.w.ID] == nil && u.pool.parked[own.ID] != nil })
	if _, e := u.owner(own.ID); e.Crashes != 1 {
		t.Errorf("the ledger says %d crashes, want 1", e.Crashes)
	}
	if n := u.poisoned(); n != 0 {
		t.Error("closed as poison after one crash")
	}
	// The next death is another one.
	ward := u.ward()
	u.s.call(func() { u.s.onTick(u.s.now().Add(time.Second)); u.s.pump() })
	got := ward.adopts(1)
	u.dies(ward, got...)
	u.peerSeesEnd(own.ID)
	if u.poisoned() != 1 {
		t.Error("not closed as poison after two crashes")
	}
}

// A session whose state is in the arena of its dead worker is looked at again by the next
// supervisor; it was interrupted once.
func TestInterruptedIsCountedOnceOverSupervisors(t *testing.T) {
	u := newUnit(t)
	f := u.worker(1)
	own := u.owned(f, false)
	f.kill()
	u.until(func() bool { return u.pool.parked[own.ID] != nil })
	u.s.call(func() { // as with a commit
		ss := u.s.sessions[own.ID]
		ss.estate = &estate{worker: f.w.ID, left: 1}
		u.s.led.put(int(ss.slot), ss.slotEntry())
	})
	u.crash()
	u.until(func() bool { return u.pool.parked[own.ID] != nil })
	if n := u.counters().interrupted; n != 1 {
		t.Errorf("%d interrupted, want 1", n)
	}
	// The next crash is another one.
	g := u.worker(1)
	g.expect(wire.TypeAdopt)
	u.s.call(func() {})
	ref := wire.Ref{ID: own.ID}
	u.s.call(func() { ref.Epoch = u.s.sessions[own.ID].Try.Epoch })
	g.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(ref)})
	g.expect(wire.TypeResume)
	g.kill()
	u.until(func() bool { return u.pool.parked[own.ID] != nil })
	if n := u.counters().interrupted; n != 2 {
		t.Errorf("%d interrupted, want 2", n)
	}
}

// The order to kill a worker of which nobody knows what it serves outlives the supervisor.
func TestDoubtfulWorkerIsKilledByTheSuccessor(t *testing.T) {
	u := newUnit(t)
	f := u.worker(1)
	own := u.owned(f, false)
	_ = f.ch.Close() // it lives; it gets a moment to die
	u.until(func() bool { return f.w.doubtful })
	u.crash()
	other := u.worker(1)
	if it := other.expect(wire.TypeAdopt).Items[0]; it.ID != own.ID {
		t.Fatalf("ADOPT %+v", it)
	}
}

// A worker cannot fill the supervisor's memory by saying that it has ever more sessions.
func TestEndlessInventory(t *testing.T) {
	u := newUnit(t)
	f := u.worker(1)
	u.crash()
	m := f.expect(wire.TypeInventory)
	go func() {
		var held []wire.Held
		for id := range uint64(wire.MaxItems) {
			held = append(held, wire.Held{Ref: wire.Ref{ID: 1000 + id}, Phase: wire.PhaseActive})
		}
		for f.ch.Send(&wire.Message{Type: wire.TypeInventoryReply, Nonce: m.Nonce, Held: held}) == nil {
		}
	}()
	u.until(func() bool { return f.w == nil || u.s.workers[f.w.ID] == nil || u.s.workers[f.w.ID].ch == nil })
	u.recovered()
}

// A wish to join that comes while other workers have not said yet what they have is
// answered when they have.
func TestJoinDuringRecovery(t *testing.T) {
	u := newUnit(t)
	home := u.worker(1)
	member := u.members(home, 1, "room")[0]
	away := u.worker(1)
	ref := u.owned(away, true)
	u.crash()
	away.reply(wire.Held{Ref: ref, Phase: wire.PhaseActive})
	away.send(&wire.Message{Type: wire.TypeGroup, Refs: refs(ref), Group: "room"})
	u.until(func() bool { return len(u.s.waiters[ownership.GroupKey{Pool: "p", Name: "room"}]) == 1 })
	home.reply(wire.Held{Ref: member, Phase: wire.PhaseActive, Group: "room"})
	away.expect(wire.TypeFreeze)
}
