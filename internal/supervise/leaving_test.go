package supervise

import (
	"errors"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

func (u *unit) drain(f *fake) (op *operation) {
	u.t.Helper()
	u.s.call(func() {
		u.s.beginDrain(u.s.workers[f.w.ID], 0, func(admin.Progress) {}, nil)
		op = u.pool.op
	})
	return op
}

// takenOver crashes the supervisor and has the next one hear from two workers.
func (u *unit) takenOver(a *fake, held wire.Held, b *fake) {
	u.t.Helper()
	u.crash()
	a.reply(held)
	b.reply()
	u.recovered()
}

// A worker that is being drained when the supervisor dies goes on being drained by the next
// one, and gets no new sessions.
func TestDrainOutlivesTheSupervisor(t *testing.T) {
	u := newUnit(t)
	f := u.worker(1)
	own := u.owned(f, false)
	other := u.worker(1)
	u.drain(f)
	try := f.expect(wire.TypeFreeze).Refs[0]
	u.takenOver(f, wire.Held{Ref: own, Phase: wire.PhaseFreezing, Attempt: try.Epoch}, other)
	if m := f.expect(wire.TypeThaw); m.Refs[0] != try {
		t.Fatalf("THAW %+v", m)
	}
	if m := f.expect(wire.TypeFreeze); m.Refs[0].ID != own.ID {
		t.Fatalf("FREEZE %+v", m)
	}
	for range 3 {
		u.owned(other, false)
	}
	// And by the one after that; also when an upgrade has come to nothing meanwhile.
	u.s.call(func() { u.s.serve(u.pool, 1, u.pool.command) })
	u.until(func() bool { return u.s.workers[f.w.ID].state == workerRetiring })
}

// A drain that is given up leaves no trace for the next supervisor.
func TestDrainThatIsGivenUp(t *testing.T) {
	u := newUnit(t)
	f := u.worker(1)
	own := u.owned(f, false)
	other := u.worker(1)
	u.s.call(func() { u.pool.cfg.Workers = 2 })
	op := u.drain(f)
	u.s.call(func() {
		if op.err == nil { // there is no program to start in its place
			u.s.failTask(op, errors.New("the test wants it"))
		}
	})
	u.until(func() bool { return f.w.state == workerReady && !f.w.leaving })
	u.takenOver(f, wire.Held{Ref: own, Phase: wire.PhaseActive}, other)
	u.s.call(func() {
		if w := u.s.workers[f.w.ID]; w.state != workerReady || w.leaving {
			t.Errorf("it is %s", w.state)
		}
	})
	u.silent(f)
}
