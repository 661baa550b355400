package handoff

import (
	"sync/atomic"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// While a method of Groups runs, members of that group are marked as being handled, and
// not after it. It is where a group's state kills its workers.
func TestMarksFollowGroupCallbacks(t *testing.T) {
	const members = 3
	count := func(words []atomic.Uint64, bit uint64) (n int) {
		for i := range words[1:] {
			if words[1+i].Load()&bit != 0 {
				n++
			}
		}
		return n
	}
	app, app2 := newRooms(), newRooms()
	p, q := startProc(t, app.serve, WithGroups(app)), startProc(t, app2.serve, WithGroups(app2))
	words, words2 := withMarks(t, p, members+1), withMarks(t, q, members+1)
	var inFreeze, inAdopt, inAdoptBack atomic.Int32
	app.mu.Lock()
	app.freeze = func(string) error { inFreeze.Store(int32(count(words, wire.MarkHandling))); return nil }
	app.adopt = func(string) error { inAdoptBack.Store(int32(count(words, wire.MarkHandling))); return nil }
	app.mu.Unlock()
	app2.mu.Lock()
	app2.adopt = func(string) error { inAdopt.Store(int32(count(words2, wire.MarkHandling))); return nil }
	app2.mu.Unlock()
	g := lobby(t, p, members)
	settled(t, app, members)

	e := newEpoch()
	g.parts(p, wire.TypeFreeze, e)
	g.parked(p, e)
	if n := inFreeze.Load(); n != members {
		t.Errorf("%d members are marked in FreezeGroup, want %d", n, members)
	}
	if n := count(words, wire.MarkHandling); n != 0 {
		t.Errorf("%d are marked when the group is parked", n)
	}
	if !g.adopt(q, e) {
		t.Fatal("refused")
	}
	if n := inAdopt.Load(); n < 1 { // those of the message that brought the state
		t.Error("nobody is marked in AdoptGroup")
	}
	if n := count(words2, wire.MarkHandling); n != 0 {
		t.Errorf("%d are marked when the group was adopted", n)
	}
	g.parts(q, wire.TypeAbort, e)
	g.parts(p, wire.TypeThaw, e)
	g.hearAll()
	if n := inAdoptBack.Load(); n != members {
		t.Errorf("%d members are marked in the AdoptGroup that takes the state back, want %d", n, members)
	}
}
