package supervise

import (
	"bytes"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// A whole move: the cargo arrives, and RESUME comes only after the ledger names
// the new owner.
func TestMoveCommitsBeforeResume(t *testing.T) {
	u := newUnit(t)
	old := u.worker(1)
	own := u.owned(old, true)
	young := u.worker(2)
	u.retire(old, 2)
	try := old.expect(wire.TypeFreeze).Refs[0]
	if try.ID != own.ID || try.Epoch <= own.Epoch {
		t.Fatalf("FREEZE %+v after %+v: an attempt takes a new, higher epoch", try, own)
	}
	old.send(parkedItem(try, "parked"))
	it := young.expect(wire.TypeAdopt).Items[0]
	if it.Ref != try || string(it.Cargo.Record) != "parked" || string(it.Cargo.App) != "app" || it.Flags != wire.FlagRestored {
		t.Fatalf("ADOPT %+v", it)
	}
	if owner, _ := u.owner(own.ID); owner != old.w.ID {
		t.Fatalf("owner %d before ADOPTED, want the old worker %d", owner, old.w.ID)
	}
	young.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(try)})
	young.expect(wire.TypeResume)
	owner, e := u.owner(own.ID)
	if owner != young.w.ID || e.Epoch != try.Epoch || e.Phase != slotOwned {
		t.Fatalf("RESUME is out and the ledger says %+v", e)
	}
	u.s.call(func() {
		if _, err := u.s.led.record(u.s.sessions[own.ID].kept, own.ID); err == nil || bytes.Contains(u.s.led.mem, []byte(secretText)) {
			t.Error("RESUME is out and record state of the software layer is still in the ledger")
		}
	})
	if got := old.expect(wire.TypeRelease).Refs[0]; got != try {
		t.Fatalf("RELEASE %+v", got)
	}
	old.expect(wire.TypeStop) // it is empty
	if c := u.counters(); c.moved != 1 || c.lost != 0 {
		t.Errorf("counters %+v", c)
	}
}

// Whatever fails before the commit ends with the old owner going on.
func TestFailedMoveThaws(t *testing.T) {
	for name, fail := range map[string]func(u *unit, young *fake, try wire.Ref){
		"refused": func(u *unit, young *fake, try wire.Ref) {
			young.send(&wire.Message{Type: wire.TypeRefused, Refused: []wire.Refused{{Ref: try, Why: "no"}}})
			young.expect(wire.TypeAbort)
		},
		"target dies": func(u *unit, young *fake, try wire.Ref) { young.kill() },
		"target closes its channel": func(u *unit, young *fake, try wire.Ref) {
			young.send(&wire.Message{Type: wire.TypeHello, Hello: &wire.Hello{Min: 1, Max: 1}}) // a second one
		},
		"no answer": func(u *unit, young *fake, try wire.Ref) {
			u.s.call(func() { u.s.attemptTimedOut(u.s.sessions[try.ID].Try) })
			young.expect(wire.TypeAbort)
		},
	} {
		t.Run(name, func(t *testing.T) {
			u, old, young, own, try := offered(t, true)
			fail(u, young, try)
			if got := old.expect(wire.TypeThaw).Refs[0]; got != try {
				t.Fatalf("THAW %+v, want %+v", got, try)
			}
			owner, e := u.owner(own.ID)
			if owner != old.w.ID || e.Epoch != own.Epoch {
				t.Errorf("the ledger says %+v", e)
			}
			if c := u.counters(); c.moved+c.lost+c.interrupted != 0 {
				t.Errorf("counters %+v", c)
			}
		})
	}
}

// The schedule that makes two owners when a session has one epoch a move instead
// of one an attempt: PARKED and ADOPTED of an attempt that was given up arrive
// during the next one.
func TestLateAnswersOfAnAbortedAttemptAreIgnored(t *testing.T) {
	u := newUnit(t)
	old := u.worker(1)
	own := u.owned(old, true)
	young := u.worker(2)
	u.retire(old, 2)
	first := old.expect(wire.TypeFreeze).Refs[0]
	u.s.call(func() { u.s.attemptTimedOut(u.s.sessions[own.ID].Try) })
	old.expect(wire.TypeThaw)
	u.s.call(func() { u.s.sessions[own.ID].retryAt = 0 })
	second := old.expect(wire.TypeFreeze).Refs[0]
	if second.Epoch <= first.Epoch {
		t.Fatalf("epochs %d, then %d", first.Epoch, second.Epoch)
	}
	old.send(parkedItem(first, "stale"))
	u.silent(young)
	old.send(parkedItem(second, "fresh"))
	if it := young.expect(wire.TypeAdopt).Items[0]; string(it.Cargo.Record) != "fresh" {
		t.Fatalf("the new worker gets %q", it.Cargo.Record)
	}
	young.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(first)})
	u.silent(young)
	if owner, _ := u.owner(own.ID); owner != old.w.ID {
		t.Fatal("an ADOPTED of another attempt was taken for this one's")
	}
	u.s.call(func() { u.s.attemptTimedOut(u.s.sessions[own.ID].Try) })
	young.expect(wire.TypeAbort)
	young.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(second)}) // crossed with ABORT
	u.silent(young)
	if owner, _ := u.owner(own.ID); owner != old.w.ID {
		t.Fatal("a late ADOPTED made a second owner")
	}
}

// The old worker may die once its sessions are parked: they go on from there.
func TestOldWorkerDiesAfterParked(t *testing.T) {
	u, old, young, own, try := offered(t, true)
	old.kill()
	u.until(func() bool { return u.s.workers[old.w.ID] == nil })
	young.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(try)})
	young.expect(wire.TypeResume)
	if owner, _ := u.owner(own.ID); owner != young.w.ID {
		t.Errorf("owner %d", owner)
	}
	if c := u.counters(); c.lost+c.interrupted != 0 {
		t.Errorf("counters %+v", c)
	}
}

// Both die: the first adopter too. The parked state goes to a third worker.
func TestParkedStateSurvivesBothWorkers(t *testing.T) {
	u, old, young, _, try := offered(t, true)
	old.kill()
	u.until(func() bool { return u.s.workers[old.w.ID] == nil })
	young.kill()
	third := u.worker(2)
	it := third.expect(wire.TypeAdopt).Items[0]
	if it.Epoch <= try.Epoch || string(it.Cargo.Record) != "parked" || string(it.Cargo.App) != "app" {
		t.Fatalf("ADOPT %+v", it)
	}
	third.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(it.Ref)})
	third.expect(wire.TypeResume)
	if c := u.counters(); c.lost+c.interrupted != 0 {
		t.Errorf("counters %+v", c)
	}
}

// kill -9 of an owner: the kernel layer's sessions go on elsewhere and count as
// interrupted; the software layer's are lost, and their peers learn it.
func TestOwnerDies(t *testing.T) {
	u := newUnit(t)
	old := u.worker(1)
	kernel := u.owned(old, false)
	soft := u.owned(old, true)
	old.kill()
	other := u.worker(1)
	it := other.expect(wire.TypeAdopt).Items[0]
	if it.ID != kernel.ID || it.Epoch <= kernel.Epoch || it.Flags != wire.FlagRestored|wire.FlagInterrupted ||
		string(it.Cargo.Record) != "initial "+secretText {
		t.Fatalf("ADOPT %+v", it)
	}
	other.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(it.Ref)})
	other.expect(wire.TypeResume)
	u.peerSeesEnd(soft.ID)
	u.until(func() bool { return u.s.led.counter(cntLost) == 1 })
	if c := u.counters(); c.interrupted != 1 || c.lost != 1 {
		t.Errorf("counters %+v", c)
	}
}

// A session of the software layer whose peer has gone is not counted as lost
// because its worker died as well.
func TestEndedSessionOfADeadWorkerIsNotLost(t *testing.T) {
	u := newUnit(t)
	old := u.worker(1)
	soft := u.owned(old, true)
	// The worker ended it and died before it could say so.
	entries, err := u.store.Get(t.Context(), 5, soft.ID)
	if err != nil || len(entries) != 1 {
		t.Fatal(entries, err)
	}
	u.s.retain.shutdown(soft.ID)
	old.kill()
	u.until(func() bool { return u.s.led.counter(cntClosedUnknown) == 1 && len(u.s.sessions) == 0 })
	if c := u.counters(); c.lost != 0 {
		t.Errorf("counters %+v", c)
	}
	for _, e := range entries {
		closeFDs(e.FDs)
	}
}

// A worker that claims what is not its own is not listened to any more; nobody's
// session is touched.
func TestClaimsOfForeignSessionsAreRefused(t *testing.T) {
	for name, claim := range map[string]func(own, foreign wire.Ref) *wire.Message{
		"PARKED": func(own, foreign wire.Ref) *wire.Message { return parkedItem(foreign, "stolen") },
		"CLOSED": func(own, foreign wire.Ref) *wire.Message {
			return &wire.Message{Type: wire.TypeClosed, Closed: []wire.Closed{{Ref: foreign, Reason: wire.ReasonPeer}}}
		},
		"GROUP": func(own, foreign wire.Ref) *wire.Message {
			return &wire.Message{Type: wire.TypeGroup, Refs: refs(foreign), Group: "g"}
		},
		"a supervisor's message": func(own, foreign wire.Ref) *wire.Message {
			return &wire.Message{Type: wire.TypeRelease, Refs: refs(own)}
		},
	} {
		t.Run(name, func(t *testing.T) {
			u := newUnit(t)
			good := u.worker(1)
			foreign := u.owned(good, true)
			bad := u.worker(1)
			own := u.owned(bad, true)
			u.sure(bad)
			bad.send(claim(own, foreign))
			u.until(func() bool { return bad.w.state == workerDetached })
			for id, w := range map[uint64]*fake{foreign.ID: good, own.ID: bad} {
				if owner, _ := u.owner(id); owner != w.w.ID {
					t.Errorf("session %d: owner %d, want %d", id, owner, w.w.ID)
				}
			}
			if c := u.counters(); c.lost+c.interrupted+c.peer != 0 {
				t.Errorf("counters %+v", c)
			}
			u.owned(good, true) // new sessions go elsewhere
			u.s.call(func() {
				if u.s.workers[bad.w.ID] == nil {
					t.Error("the worker lives and must not be forgotten: its sessions are its own")
				}
			})
		})
	}
}

// A session that ends while it is asked to freeze is counted once and forgotten.
func TestSessionEndsWhileFreezing(t *testing.T) {
	u := newUnit(t)
	old := u.worker(1)
	own := u.owned(old, true)
	u.worker(2)
	u.retire(old, 2)
	old.expect(wire.TypeFreeze)
	old.send(&wire.Message{Type: wire.TypeClosed, Closed: []wire.Closed{{Ref: own, Reason: wire.ReasonPeer}}})
	old.expect(wire.TypeClosedAck)
	u.until(func() bool { return len(u.s.sessions) == 0 && u.s.m.Idle() })
	old.send(&wire.Message{Type: wire.TypeClosed, Closed: []wire.Closed{{Ref: own, Reason: wire.ReasonPeer}}})
	if m := old.expect(wire.TypeStop); !m.Drain {
		t.Errorf("STOP %+v", m)
	}
	old.expect(wire.TypeClosedAck)
	if c := u.counters(); c.peer != 1 {
		t.Errorf("counters %+v", c)
	}
}

// A worker that does not answer gets nothing more while there is another.
func TestDeafWorkerIsPassedOver(t *testing.T) {
	u := newUnit(t)
	deaf := u.worker(1)
	id := u.session(true)
	deaf.expect(wire.TypeAdopt)
	good := u.worker(1)
	u.s.call(func() { u.s.attemptTimedOut(u.s.sessions[id].Try) })
	deaf.expect(wire.TypeAbort)
	if it := good.expect(wire.TypeAdopt).Items[0]; it.ID != id {
		t.Errorf("ADOPT %+v", it)
	}
	for range 3 {
		u.session(true)
		good.expect(wire.TypeAdopt)
	}
	u.silent(good)
}
