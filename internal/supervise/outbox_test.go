package supervise

import (
	"errors"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// A worker that does not read its channel holds up nobody else (I7): what it is to hear
// waits in its outbox, and when that is full it is not listened to any more. Its sessions
// stay where they are.
func TestWorkerThatDoesNotReadHoldsUpNobody(t *testing.T) {
	u := newUnit(t)
	deaf, good := u.worker(1), u.worker(1)
	var own wire.Ref
	for own.ID == 0 { // to whichever
		id := u.session(true)
		u.until(func() bool { a := u.s.sessions[id].Try; return a != nil && a.To != nil })
		to := good
		u.s.call(func() {
			if u.s.sessions[id].Try.To == &deaf.w.Worker {
				to = deaf
			}
		})
		ref := to.expect(wire.TypeAdopt).Items[0].Ref
		to.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(ref)})
		to.expect(wire.TypeResume)
		if to == deaf {
			own = ref
		}
	}
	u.sure(deaf)
	done := make(chan struct{})
	go func() {
		defer close(done)
		u.s.call(func() {
			for n := 0; deaf.w.ch != nil && n <= 2*maxQueued; n++ {
				u.s.send(deaf.w, &wire.Message{Type: wire.TypePing, Nonce: 1})
			}
		})
	}()
	select {
	case <-done:
	case <-time.After(patience):
		t.Error("the goroutine of the ledger waits for a worker that does not read")
		deaf.kill() // lets it go on
		<-done
		return
	}
	u.s.call(func() {
		if deaf.w.state != workerDetached || !errors.Is(deaf.w.broke, errWorkerStuck) {
			t.Errorf("state %v, %v", deaf.w.state, deaf.w.broke)
		}
	})
	if owner, _ := u.owner(own.ID); owner != deaf.w.ID {
		t.Errorf("owner %d of its session, want %d", owner, deaf.w.ID)
	}
	u.owned(good, true)
}
