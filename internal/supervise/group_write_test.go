package supervise

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// stalled makes the keeper take no states of groups until the function is called.
func (u *unit) stalled() (goOn func()) {
	gate := make(chan struct{})
	u.store.mu.Lock()
	defer u.store.mu.Unlock()
	u.store.hold = func(e keeper.Entry) {
		if e.Key.Kind == keeper.KindGroup {
			<-gate
		}
	}
	return sync.OnceFunc(func() { close(gate) })
}

func descriptors(t *testing.T) int {
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// A worker that makes checkpoints without end, while the keeper is slow, costs a bounded
// number of goroutines and descriptors and a bounded amount of memory; each is answered,
// and the newest is the one that is kept.
func TestCheckpointsWithoutEnd(t *testing.T) {
	u := newUnit(t)
	home := u.worker(1)
	const rooms, each = maxStateWrites + 4, 100
	var ms []wire.Ref
	for i := range rooms {
		ms = append(ms, u.members(home, 1, fmt.Sprint("room", i))...)
	}
	goOn := u.stalled()
	goroutines, fds := runtime.NumGoroutine(), descriptors(t)
	nonce := uint64(0)
	for n := range each {
		for i, ref := range ms {
			nonce++
			name := fmt.Sprint("room", i)
			home.send(&wire.Message{Type: wire.TypeCheckpoint, Nonce: nonce, Group: name, Refs: refs(ref),
				Blobs: []wire.Blob{{Group: name, Data: fmt.Append(nil, "state ", n)}}})
		}
	}
	// Every one of them has been seen: all but those being written wait, as one of each.
	u.until(func() bool {
		asked := u.s.writes
		for _, st := range u.s.groupStates {
			if st.next != nil {
				asked += len(st.next.then)
			}
		}
		return asked == rooms*each
	})
	u.s.call(func() {
		if u.s.writes != maxStateWrites || len(u.s.groupStates) != rooms {
			t.Errorf("%d are being written, of %d groups", u.s.writes, len(u.s.groupStates))
		}
		if n := home.w.waitingStates; n > rooms*len("state 100") {
			t.Errorf("%d bytes wait", n)
		}
	})
	if n := runtime.NumGoroutine() - goroutines; n > maxStateWrites {
		t.Errorf("%d goroutines more than before", n)
	}
	if n := descriptors(t) - fds; n > maxStateWrites {
		t.Errorf("%d descriptors more than before", n)
	}
	goOn()
	answered := map[uint64]bool{}
	for range rooms * each {
		m := home.expect(wire.TypeCheckpointed)
		if m.Text != "" || answered[m.Nonce] {
			t.Fatalf("CHECKPOINTED %+v", m)
		}
		answered[m.Nonce] = true
	}
	u.s.call(func() {
		if u.s.writes != 0 || home.w.waitingStates != 0 || len(u.s.writeQueue) != 0 {
			t.Errorf("left behind: %d, %d bytes, %v", u.s.writes, home.w.waitingStates, u.s.writeQueue)
		}
	})
	kept, err := u.store.Get(t.Context(), keeper.KindGroup)
	if err != nil || len(kept) != rooms {
		t.Fatalf("%d states are kept, %v", len(kept), err)
	}
	for _, e := range kept {
		if b, err := sys.ReadSealedMemfd(e.FDs[0], wire.MaxCargo); string(b) != fmt.Sprint("state ", each-1) {
			t.Errorf("%s: %q is kept, %v", e.Key.Name, b, err)
		}
		closeFDs(e.FDs)
	}
}

// What waits of one worker's checkpoints is bounded in bytes and in number; what is more
// is refused with a word, and the others are kept.
func TestCheckpointsAreRefusedWhenTooManyWait(t *testing.T) {
	u := newUnit(t)
	home := u.worker(1)
	ref := u.members(home, 1, "room")[0]
	goOn := u.stalled()
	send := func(nonce uint64) {
		home.send(&wire.Message{Type: wire.TypeCheckpoint, Nonce: nonce, Group: "room", Refs: refs(ref),
			Blobs: []wire.Blob{{Group: "room", Data: []byte("state")}}})
	}
	send(0)
	u.until(func() bool { return u.s.writes == 1 })
	for n := range uint64(maxStateAsked + 1) {
		send(n + 1)
	}
	if m := home.expect(wire.TypeCheckpointed); m.Text == "" || m.Nonce != maxStateAsked+1 {
		t.Fatalf("CHECKPOINTED %+v, want a refusal of the last", m)
	}
	u.s.call(func() {
		w := &worker{waitingStates: maxStateWaiting - 10}
		if w.mayCheckpoint(nil, 11) || !w.mayCheckpoint(nil, 10) || !w.mayCheckpoint(&stateWrite{by: w, blob: make([]byte, 5)}, 15) {
			t.Error("the limit in bytes is not kept")
		}
	})
	goOn()
	for range maxStateAsked + 1 {
		if m := home.expect(wire.TypeCheckpointed); m.Text != "" {
			t.Fatalf("CHECKPOINTED %+v", m)
		}
	}
}

// Checkpoints that wait for their turn when their group ends are let go of, and answered.
func TestCheckpointOfAGroupThatEnds(t *testing.T) {
	u := newUnit(t)
	home := u.worker(1)
	ref := u.members(home, 1, "room")[0]
	goOn := u.stalled()
	for n := range uint64(3) {
		home.send(&wire.Message{Type: wire.TypeCheckpoint, Nonce: n, Group: "room", Refs: refs(ref),
			Blobs: []wire.Blob{{Group: "room", Data: []byte("state")}}})
	}
	u.until(func() bool { return u.s.writes == 1 && home.w.waitingStates > 0 })
	home.send(&wire.Message{Type: wire.TypeClosed, Closed: []wire.Closed{{Ref: ref, Reason: wire.ReasonPeer}}})
	u.until(func() bool { return len(u.s.groupStates) == 0 })
	goOn()
	u.until(func() bool { return u.s.writes == 0 && home.w.waitingStates == 0 })
	u.until(func() bool {
		list, err := u.store.List(t.Context(), keeper.KindGroup)
		return err == nil && len(list) == 0
	})
}

// A worker dies while checkpoints of its are on their way to the keeper: the next home gets
// the newest of them, and none comes to the keeper after it has begun from an older one.
func TestNextHomeWaitsForCheckpointsUnderWay(t *testing.T) {
	u := newUnit(t)
	home := u.worker(1)
	ms := u.kernelMembers(home, 1, "room")
	next := u.worker(1)
	goOn := u.stalled()
	for nonce := uint64(1); nonce <= 2; nonce++ {
		home.send(&wire.Message{Type: wire.TypeCheckpoint, Nonce: nonce, Group: "room", Refs: ms,
			Blobs: []wire.Blob{{Group: "room", Data: fmt.Append(nil, "state ", nonce)}}})
	}
	u.until(func() bool {
		for _, st := range u.s.groupStates {
			return st.writing && st.next != nil
		}
		return false
	})
	u.dies(home)
	time.AfterFunc(50*time.Millisecond, goOn) // it could have begun from what there was
	ad := next.expect(wire.TypeAdopt)
	if len(ad.Blobs) != 1 || string(ad.Blobs[0].Data) != "state 2" {
		t.Errorf("ADOPT with %+v", ad.Blobs)
	}
}

// A planned successor takes the states of groups from the keeper: it is not started while
// one is on its way there, nor when the only one who has it is this supervisor.
func TestSuccessorWaitsForStatesOfGroups(t *testing.T) {
	u := newUnit(t)
	home := u.worker(1)
	ms := u.kernelMembers(home, 1, "room")
	checkpoint := func(nonce uint64) {
		home.send(&wire.Message{Type: wire.TypeCheckpoint, Nonce: nonce, Group: "room", Refs: ms,
			Blobs: []wire.Blob{{Group: "room", Data: fmt.Append(nil, "state ", nonce)}}})
	}
	goOn := u.stalled()
	t.Cleanup(func() { goOn() })
	checkpoint(1)
	checkpoint(2)
	u.until(func() bool { return u.s.writes == 1 && home.w.waitingStates > 0 })
	resume, held := make(chan bool, 1), make(chan error, 1)
	var paused []*worker
	go func() {
		var err error
		paused, err = u.s.holdLedger(context.Background(), resume)
		held <- err
	}()
	for waits := false; !waits; time.Sleep(time.Millisecond) {
		asked := make(chan bool, 1)
		u.s.post(func() { asked <- u.s.hold != nil })
		select {
		case waits = <-asked:
		case <-held:
			resume <- false
			t.Fatal("the ledger was given away while checkpoints were being written")
		}
	}
	goOn()
	if err := <-held; err != nil {
		t.Fatal(err)
	}
	if e := u.keptState(); string(e) != "state 2" {
		t.Errorf("the successor would find %q", e)
	}
	resume <- false // there is none after all
	u.s.call(func() {
		for _, w := range paused {
			u.s.unpause(w)
		}
	})
	for nonce := uint64(1); nonce <= 2; nonce++ {
		if m := home.expect(wire.TypeCheckpointed); m.Nonce != nonce || m.Text != "" {
			t.Fatalf("CHECKPOINTED %+v", m)
		}
	}
	// The same when the home is dead and nobody else could have it.
	goOn = u.stalled()
	checkpoint(3)
	u.until(func() bool { return u.s.writes == 1 })
	u.dies(home)
	u.until(func() bool { return u.pool.parked[ms[0].ID] != nil })
	idle := func() (ok bool) { u.s.call(func() { ok = u.s.isIdle() }); return ok }
	if idle() {
		t.Error("nothing is said to be under way while the state of a group without a home is being written")
	}
	goOn()
	u.until(u.s.isIdle)
	// The keeper could not take what its last home parked it with.
	u.store.mu.Lock()
	u.store.hold, u.store.full = nil, true
	u.store.mu.Unlock()
	k := u.pool.groupKey("room")
	u.s.call(func() { u.s.keepGroup(k, []byte("state 4")) })
	u.until(func() bool { return u.s.writes == 0 })
	if idle() {
		t.Error("nothing is said to be under way, and only this supervisor has the state of a group")
	}
}

// keptState is the only state of a group that the keeper has.
func (u *unit) keptState() []byte {
	u.t.Helper()
	kept, err := u.store.Get(u.t.Context(), keeper.KindGroup)
	if err != nil || len(kept) != 1 {
		u.t.Fatalf("%d states are kept, %v", len(kept), err)
	}
	b, err := sys.ReadSealedMemfd(kept[0].FDs[0], wire.MaxCargo)
	if err != nil {
		u.t.Fatal(err)
	}
	closeFDs(kept[0].FDs)
	return b
}
