package supervise

import (
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// Whatever happens to a session, its record state, which has its keys, is in no log: a
// move that fails, one that comes to its end, deaths, and a worker that speaks nonsense.
func TestRecordStateIsNotLogged(t *testing.T) {
	u, old, young, own, try := offered(t, true)
	young.send(&wire.Message{Type: wire.TypeRefused, Refused: []wire.Refused{{Ref: try, Why: "no"}}})
	young.expect(wire.TypeAbort)
	old.expect(wire.TypeThaw)
	u.s.call(func() { u.s.sessions[own.ID].retryAt = 0 })
	try = old.expect(wire.TypeFreeze).Refs[0]
	old.send(parkedItem(try, "parked "+secretText))
	young.expect(wire.TypeAdopt)
	old.kill()
	u.dead(old)
	young.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(try)})
	young.expect(wire.TypeResume)
	bystander := u.session(true)
	young.expect(wire.TypeAdopt)
	young.send(parkedItem(wire.Ref{ID: bystander, Epoch: try.Epoch}, secretText)) // it does not own it
	u.dead(young)
	u.until(func() bool { return len(u.s.estates) == 0 }) // until then the ledger says where to look for what it left
	if owner, _ := u.owner(own.ID); owner != 0 {
		t.Errorf("a dead worker owns it: %d", owner)
	}
}
