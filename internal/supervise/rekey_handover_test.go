package supervise

import (
	"context"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// A successor is not started while a key is being set: both would set it.
func TestSuccessorWaitsForKeys(t *testing.T) {
	u, f, ref, k := keyed(t)
	reached, set := make(chan struct{}), make(chan struct{})
	k.mu.Lock()
	k.die = func(after bool) bool {
		if !after {
			close(reached)
			<-set
		}
		return false
	}
	k.mu.Unlock()
	f.send(rekeyMessage(wire.TypeKeyUpdate, wire.Rekey{Ref: ref, Count: 1}))
	<-reached
	resume, held := make(chan bool, 1), make(chan error, 1)
	var paused []*worker
	go func() {
		var err error
		paused, err = u.s.holdLedger(context.Background(), resume)
		held <- err
	}()
	u.until(func() bool { return u.s.hold != nil })
	select {
	case <-held:
		t.Fatal("the ledger was given away in the middle of a change of keys")
	default:
	}
	close(set)
	if err := <-held; err != nil {
		t.Fatal(err)
	}
	resume <- false // there is no successor after all
	u.s.call(func() {
		for _, w := range paused {
			u.s.unpause(w)
		}
	})
	f.expectRekey(wire.TypeRekeyed, ref)
	u.wantKeys(ref.ID, k, 0, 1, 0)
	// And when there is one, this supervisor does nothing more.
	go func() { _, _ = u.s.holdLedger(context.Background(), resume) }()
	resume <- true
	<-u.s.done
}

// A member of a group that goes back to its old worker, because the supervisor died
// before the whole group had moved, counts its client's KeyUpdates on from there.
func TestKeyUpdatesAreCountedOverAGroupsWayBack(t *testing.T) {
	u, f, ref, k := keyed(t)
	for n := uint64(1); n <= 2; n++ {
		f.send(rekeyMessage(wire.TypeKeyUpdate, wire.Rekey{Ref: ref, Count: n}))
		f.expectRekey(wire.TypeRekeyed, ref)
	}
	u.wantKeys(ref.ID, k, 0, 2, 0)
	other := u.owned(f, true)
	for _, r := range refs(ref, other) {
		f.send(&wire.Message{Type: wire.TypeGroup, Refs: refs(r), Group: "room"})
		f.expect(wire.TypeGrouped)
	}
	young := u.worker(2)
	u.retire(f, 2)
	fr := f.expect(wire.TypeFreeze)
	f.send(parkGroup("room", fr.Refs, true))
	young.expect(wire.TypeAdopt)
	u.settle(young)
	var held []wire.Held
	var there wire.Held
	u.s.call(func() { // it dies between the commits
		for _, try := range fr.Refs {
			ss := u.s.sessions[try.ID]
			held = append(held, wire.Held{Ref: wire.Ref{ID: try.ID, Epoch: ss.Epoch}, Phase: wire.PhaseParked, Attempt: try.Epoch, Group: "room"})
			if try.ID == ref.ID {
				there = wire.Held{Ref: try, Phase: wire.PhaseAdopted, Group: "room"}
				e := ss.slotEntry()
				e.Owner, e.Epoch, e.Phase, e.RXBase = young.w.ID, ss.Try.Epoch, slotOwned, u.s.led.keys(int(ss.slot), ktls.Receiving).gen
				u.s.led.put(int(ss.slot), e)
			}
		}
	})
	u.crash()
	f.reply(held...)
	young.reply(there)
	u.recovered()
	f.expect(wire.TypeThaw)
	f.expect(wire.TypeFreeze) // the move goes on by itself
	f.send(rekeyMessage(wire.TypeKeyUpdate, wire.Rekey{Ref: ref, Count: 3}))
	f.expectRekey(wire.TypeRekeyed, ref)
	if n, _ := k.generation(ktls.Receiving); n != 3 {
		t.Errorf("generation %d", n)
	}
}
