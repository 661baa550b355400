package supervise

import (
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/config"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// poisonable gives a unit a limit of two crashes, and a clock that only the test moves.
// No quarantine worker is started but by ward.
func poisonable(t *testing.T) (u *unit, pass func(d time.Duration)) {
	t.Helper()
	u = newUnit(t)
	now := time.Now()
	u.s.call(func() {
		u.s.now = func() time.Time { return now }
		u.pool.cfg.Poison, u.pool.cfg.PoisonReset = 2, config.Duration(time.Minute)
		u.pool.ward.starting = true
	})
	return u, func(d time.Duration) {
		for ; d > 0; d -= 100 * time.Millisecond {
			u.s.call(func() {
				now = now.Add(100 * time.Millisecond)
				u.s.onTick(now)
				u.s.pump()
			})
		}
	}
}

// marked adds a worker that says what it is handling.
func (u *unit) marked() *fake {
	u.t.Helper()
	f := u.worker(1)
	u.s.call(func() {
		fd, err := sys.SharedMemfd("marks", 8*65)
		if err == nil {
			f.w.marks, err = openMarks(fd)
		}
		if err != nil {
			u.t.Error(err)
		}
	})
	return f
}

// ward adds the quarantine worker.
func (u *unit) ward() *fake {
	u.t.Helper()
	var f *fake
	// In one step, so that it is never a worker like any other.
	u.s.call(func() { u.pool.serving = 9 })
	f = u.marked()
	u.s.call(func() {
		f.w.quarantine, u.pool.ward.worker = true, f.w
		u.pool.serving = 1
	})
	return f
}

// dies has a worker die while it is handling sessions. Nothing waits for its answer.
func (u *unit) dies(f *fake, handling ...wire.Ref) {
	u.t.Helper()
	u.s.call(func() {
		for i, r := range handling {
			f.w.marks.words[i+1].Store(r.ID | wire.MarkHandling)
			f.w.marks.words[0].Store(uint64(i + 1))
		}
	})
	f.kill()
	u.until(func() bool {
		for _, e := range u.s.estates {
			if e.busy {
				return false // its sessions are still looked at
			}
		}
		return u.s.workers[f.w.ID] == nil
	})
}

// quarantined is a unit whose only worker died over its session, which is in quarantine.
func quarantined(t *testing.T) (u *unit, pass func(d time.Duration), ward *fake) {
	t.Helper()
	u, pass = poisonable(t)
	f := u.marked()
	u.dies(f, u.owned(f, false))
	ward = u.ward() // not before: without a suspect it would be stopped
	pass(200 * time.Millisecond)
	ward.adopts(1)
	return u, pass, ward
}

// adopts takes n sessions, in any number of messages.
func (f *fake) adopts(n int) (got []wire.Ref) {
	f.t.Helper()
	for len(got) < n {
		m := f.expect(wire.TypeAdopt)
		var list []wire.Ref
		for _, it := range m.Items {
			list = append(list, it.Ref)
		}
		f.send(&wire.Message{Type: wire.TypeAdopted, Refs: list})
		f.expect(wire.TypeResume)
		got = append(got, list...)
	}
	if len(got) > n {
		f.t.Fatalf("%d sessions, want %d", len(got), n)
	}
	return got
}

func (u *unit) poisoned() (n uint64) {
	u.s.call(func() { n = u.s.led.reasons()[wire.ReasonPoison.String()] })
	return n
}

func ids(refs []wire.Ref) map[uint64]bool {
	m := map[uint64]bool{}
	for _, r := range refs {
		m[r.ID] = true
	}
	return m
}

// The session over which a worker died goes into quarantine, alone, and the others to
// other workers; when the quarantine worker dies over it as well, it is closed.
func TestPoisonIsQuarantinedAndThenClosed(t *testing.T) {
	u, pass := poisonable(t)
	f := u.marked()
	bad, well1, well2 := u.owned(f, false), u.owned(f, false), u.owned(f, false)
	other := u.marked()
	u.dies(f, bad)
	ward := u.ward() // not before: without a suspect it would be stopped
	if got := ids(other.adopts(2)); !got[well1.ID] || !got[well2.ID] {
		t.Fatalf("the bystanders went elsewhere: %v", got)
	}
	pass(200 * time.Millisecond)
	got := ward.adopts(1)
	if got[0].ID != bad.ID {
		t.Fatalf("in quarantine: %v", got)
	}
	if _, e := u.owner(bad.ID); e.Crashes != 1 {
		t.Errorf("the ledger says %d crashes", e.Crashes)
	}
	u.dies(ward, got...)
	u.peerSeesEnd(bad.ID)
	if u.poisoned() != 1 {
		t.Error("not closed as poison")
	}
	if c := u.counters(); c.lost != 0 || c.interrupted != 3 {
		t.Errorf("counters %+v", c)
	}
}

// A new session never goes to the quarantine worker.
func TestQuarantineTakesSuspectsOnly(t *testing.T) {
	u, _, ward := quarantined(t)
	id := u.session(false)
	u.silent(ward)
	if m := u.worker(1).expect(wire.TypeAdopt); m.Items[0].ID != id {
		t.Fatalf("ADOPT %+v", m.Items)
	}
}

// A session that is served for poison_reset without a crash goes back to the others,
// and its count begins anew. The quarantine worker then stops.
func TestSuspectIsAcquitted(t *testing.T) {
	u, pass := poisonable(t)
	f := u.marked()
	own := u.owned(f, false)
	other := u.marked()
	u.dies(f, own)
	ward := u.ward() // not before: without a suspect it would be stopped
	pass(200 * time.Millisecond)
	ward.adopts(1)
	pass(59 * time.Second)
	u.silent(ward)
	pass(2 * time.Second)
	fr := ward.expect(wire.TypeFreeze)
	ward.send(parkedItem(fr.Refs[0], "parked"))
	if got := other.adopts(1); got[0].ID != own.ID {
		t.Fatalf("ADOPT %v", got)
	}
	ward.expect(wire.TypeRelease)
	if _, e := u.owner(own.ID); e.Crashes != 0 {
		t.Errorf("the ledger still says %d crashes", e.Crashes)
	}
	pass(200 * time.Millisecond)
	if m := ward.expect(wire.TypeStop); !m.Drain {
		t.Errorf("STOP %+v", m)
	}
}

// When the quarantine worker dies while several are handled, none is closed: they are
// tried one after the other, and only the one that kills is.
func TestSeveralSuspectsAreTriedOneByOne(t *testing.T) {
	u, pass := poisonable(t)
	f := u.marked()
	bad, slow, well := u.owned(f, false), u.owned(f, false), u.owned(f, false)
	other := u.marked()
	u.dies(f, bad, slow, well)
	ward := u.ward() // not before: without a suspect it would be stopped
	pass(200 * time.Millisecond)
	ward.adopts(3)
	u.dies(ward, slow, bad) // well was not being handled this time
	if got := other.adopts(1); got[0].ID != well.ID {
		t.Fatalf("the one that was not handled: %v", got)
	}
	if u.poisoned() != 0 {
		t.Fatal("closed although two were being handled")
	}
	first := bad // they come in the order of their ids
	if slow.ID < bad.ID {
		first = slow
	}
	ward = u.ward()
	pass(200 * time.Millisecond)
	got := ward.adopts(1)
	if got[0].ID != first.ID {
		t.Fatalf("on trial: %v", got)
	}
	pass(time.Second)
	u.silent(ward)
	u.dies(ward, got...)
	if u.poisoned() != 1 {
		t.Fatal("the one that kills is not closed")
	}
	ward = u.ward()
	pass(200 * time.Millisecond)
	if got = ward.adopts(1); got[0].ID != slow.ID {
		t.Fatalf("the next on trial: %v", got)
	}
	pass(trialTime + 300*time.Millisecond)
	fr := ward.expect(wire.TypeFreeze)
	ward.send(parkedItem(fr.Refs[0], "parked"))
	if got := other.adopts(1); got[0].ID != slow.ID || u.poisoned() != 1 {
		t.Fatalf("the bystander was not acquitted: %v", got)
	}
}

// A worker that does not say what it handles: all of its sessions are suspects, and one
// is closed only when it was alone.
func TestPoisonWithoutMarks(t *testing.T) {
	u, pass := poisonable(t)
	f := u.worker(1)
	list := []wire.Ref{u.owned(f, false), u.owned(f, false)}
	bad := list[1]
	nomarks := func() *fake {
		w := u.ward()
		u.s.call(func() { w.w.marks.close(); w.w.marks = nil })
		pass(200 * time.Millisecond)
		return w
	}
	other := u.worker(1)
	u.dies(f)
	ward := nomarks()
	ward.adopts(2)
	u.dies(ward)
	ward = nomarks()
	if got := ward.adopts(1); got[0].ID != list[0].ID {
		t.Fatalf("on trial: %v", got)
	}
	pass(trialTime + 300*time.Millisecond)
	ward.send(parkedItem(ward.expect(wire.TypeFreeze).Refs[0], "parked"))
	other.adopts(1)
	ward.expect(wire.TypeRelease)
	pass(200 * time.Millisecond)
	if got := ward.adopts(1); got[0].ID != bad.ID || u.poisoned() != 0 {
		t.Fatalf("on trial: %v", got)
	}
	u.dies(ward)
	if u.poisoned() != 1 || u.counters().lost != 0 {
		t.Error("the last suspect is not closed, or another was")
	}
}

// What a worker writes into its marks counts for its own sessions only, and deaths that
// the supervisor wants are nobody's fault.
func TestMarksThatCountForNothing(t *testing.T) {
	u, _ := poisonable(t)
	f, g := u.marked(), u.marked()
	a := u.owned(f, false)
	b := u.owned(g, false)
	u.s.call(func() {
		f.w.marks.words[0].Store(1 << 60) // more words than there are
		for i := range f.w.marks.words[1:] {
			f.w.marks.words[i+1].Store(b.ID | wire.MarkHandling)
		}
		f.w.marks.words[5].Store(a.ID | wire.MarkHandling | wire.MarkWriting)
	})
	u.dies(f)
	g.adopts(1)
	u.s.call(func() {
		g.w.marks.words[0].Store(2)
		g.w.marks.words[1].Store(a.ID | wire.MarkHandling)
		g.w.marks.words[2].Store(b.ID | wire.MarkHandling)
		u.s.kill(g.w, "the test wants it")
	})
	h := u.marked()
	_ = g.ch.Close()
	_ = g.cmd.Wait()
	h.adopts(2)
	u.s.call(func() {
		if n := u.s.led.counter(cntQuarantined); n != 0 || len(u.pool.ward.suspects) != 0 {
			t.Errorf("%d suspects", n)
		}
	})
}

// A group goes into quarantine with its suspect, and comes back as a whole.
func TestGroupOfASuspect(t *testing.T) {
	u, pass := poisonable(t)
	f := u.marked()
	var ms []wire.Ref
	for range 3 {
		ms = append(ms, u.owned(f, false))
		u.join(f, ms[len(ms)-1], "room")
	}
	alone := u.owned(f, false)
	other := u.marked()
	u.dies(f, ms[1])
	ward := u.ward() // not before: without a suspect it would be stopped
	if got := other.adopts(1); got[0].ID != alone.ID {
		t.Fatalf("ADOPT %v", got)
	}
	pass(200 * time.Millisecond)
	if got := ids(ward.adopts(3)); !got[ms[0].ID] || !got[ms[1].ID] || !got[ms[2].ID] {
		t.Fatalf("in quarantine: %v", got)
	}
	pass(61 * time.Second)
	fr := ward.expect(wire.TypeFreeze)
	if fr.Group != "room" || len(fr.Refs) != 3 {
		t.Fatalf("FREEZE %+v", fr)
	}
}

// A successor knows the suspects from the ledger.
func TestSuspectsOutliveTheSupervisor(t *testing.T) {
	u, _ := poisonable(t)
	f := u.marked()
	own := u.owned(f, false)
	u.dies(f, own)
	u.until(func() bool { return u.pool.parked[own.ID] != nil })
	u.crash()
	u.s.call(func() {
		if sp := u.pool.ward.suspects[own.ID]; sp == nil || sp.ss.crashes != 1 {
			t.Errorf("the successor knows of %v", u.pool.ward.suspects)
		}
	})
}

// A worker that was the quarantine of a generation, and is not any more, is emptied when
// that generation serves again.
func TestFormerQuarantineIsNotKept(t *testing.T) {
	u, pass, ward := quarantined(t)
	u.s.call(func() { u.s.serve(u.pool, 2, u.pool.command) })
	pass(100 * time.Millisecond)
	u.s.call(func() { u.s.serve(u.pool, 1, u.pool.command) })
	u.worker(1)
	pass(100 * time.Millisecond)
	ward.expect(wire.TypeFreeze)
}
