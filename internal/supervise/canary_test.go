package supervise

import (
	"strings"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/state"
)

// watched begins an upgrade with these options; its new worker is ready.
func (u *unit) watched(o upgradeOptions) (young *fake, ch <-chan *admin.PoolReport) {
	u.t.Helper()
	young = u.worker(2)
	return young, u.upgradingWith(opStarting, 1, o)
}

func (u *unit) awaitPhase(ph opPhase) {
	u.t.Helper()
	u.until(func() bool { return u.pool.op != nil && u.pool.op.phase == ph })
}

// dead waits until a worker's process is seen dead by the supervisor.
func (u *unit) dead(f *fake) {
	u.t.Helper()
	u.until(func() bool { return u.s.workers[f.w.ID] == nil })
}

const long = time.Hour

// A canary gets its share of the sessions, and of those that are new; the rest moves
// when its time is over.
func TestCanaryGetsItsShareThenTheRest(t *testing.T) {
	u := newUnit(t)
	old := u.worker(1)
	old.play()
	u.sessions(10)
	young, ch := u.watched(upgradeOptions{canary: 20, soak: long})
	p := young.play()
	u.awaitPhase(opSoaking)
	wantLoads(t, u.loadOf(old, young), 8, 2)
	u.sessions(10) // of which the canary gets 20 percent, too
	wantLoads(t, u.loadOf(old, young), 16, 4)
	if u.pool.serving != 1 {
		t.Errorf("generation %d serves", u.pool.serving)
	}
	u.s.call(func() { u.pool.op.deadline = u.s.now() })
	u.until(func() bool { return u.pool.serving == 2 && u.pool.op.phase == opEnding })
	old.kill()
	r, o := u.report(ch)
	if o != admin.OutcomeMoved || r.Moved != 18 || r.Returned+r.Stayed+r.Lost != 0 {
		t.Errorf("report %+v, outcome %d", r, o)
	}
	if ever, now := p.has(); ever != 20 || now != 20 {
		t.Errorf("the new worker had %d sessions and has %d", ever, now)
	}
}

// Whatever is wrong with a canary: all of it goes back, and the old generation serves.
func TestCanaryThatFailsGoesBack(t *testing.T) {
	for name, c := range map[string]struct {
		fails func(u *unit, young *fake, p *player)
		says  string
		gone  int // sessions that ended over it
	}{
		"dies": {func(u *unit, young *fake, _ *player) { young.kill() }, "died", 0},
		"breaks the protocol": {func(_ *unit, young *fake, p *player) {
			p.set(func() { young.send(nonsense) })
		}, "broke the protocol", 5},
		"says it is not well": {func(u *unit, young *fake, _ *player) {
			u.s.call(func() { young.w.beat.sick = "no database" })
		}, "no database", 0},
		"ends sessions with errors": {func(u *unit, _ *fake, p *player) { p.fail(3) }, "ended 3 of its 5 sessions with an error", 3},
		"ends one, which the end of the soak sees": {func(u *unit, _ *fake, p *player) {
			p.fail(1)
			u.until(func() bool { return len(u.s.sessions) == 9 && u.pool.op.phase == opSoaking })
			u.s.call(func() { u.pool.op.deadline = u.s.now() })
		}, "ended 1 of its 5 sessions with an error", 1},
		"turns sessions down": {func(u *unit, young *fake, p *player) {
			p.set(func() { p.refuse = true })
			u.session(false)
			u.session(false)
		}, "turned down 1 of 6", 0},
		"is taken back by the operator": {func(u *unit, _ *fake, _ *player) {
			u.s.call(func() { u.s.abortOperation(u.pool) })
		}, "aborted by the operator", 0},
	} {
		t.Run(name, func(t *testing.T) {
			u, old := serving(t, 10)
			young, ch := u.watched(upgradeOptions{canary: 50, soak: long})
			p := young.play()
			u.awaitPhase(opSoaking)
			wantLoads(t, u.loadOf(old, young), 5, 5)
			u.surePlayed(young) // it knows of all five, and the supervisor that it does
			c.fails(u, young, p)
			u.until(func() bool { return u.pool.op == nil || u.pool.op.phase > opBack })
			if name != "dies" && c.gone != 5 {
				young.kill() // as told: it has nothing left to do
			}
			r, o := u.report(ch)
			if o != admin.OutcomeRefused || !strings.Contains(r.Error, c.says) || r.Lost != 0 {
				t.Errorf("outcome %d, report %+v; want one that says %q", o, r, c.says)
			}
			if u.pool.serving != 1 {
				t.Errorf("generation %d serves", u.pool.serving)
			}
			if name == "dies" && r.Interrupted != 5 {
				t.Errorf("%d interrupted, want the 5 of the worker that died", r.Interrupted)
			}
			if name == "turns sessions down" {
				c.gone = -2 // those are new
			}
			u.until(func() bool { return len(old.w.Sessions) == 10-c.gone })
		})
	}
}

// An error of the new generation that the old one makes as often is nothing new.
func TestCanaryNoWorseThanTheOld(t *testing.T) {
	u := newUnit(t)
	old := u.worker(1)
	po := old.play()
	u.sessions(20)
	young, ch := u.watched(upgradeOptions{canary: 50, soak: long})
	p := young.play()
	u.awaitPhase(opSoaking)
	u.surePlayed(old) // it knows of those that it has no more
	po.fail(4)
	u.until(func() bool { return len(u.s.sessions) == 16 })
	u.surePlayed(young)
	p.fail(4)
	u.until(func() bool { return len(u.s.sessions) == 12 })
	u.s.call(func() { u.pool.op.deadline = u.s.now() })
	u.until(func() bool { return u.pool.op.phase == opEnding })
	old.kill()
	if r, o := u.report(ch); o != admin.OutcomeMoved {
		t.Errorf("outcome %d, report %+v", o, r)
	}
}

// A canary without any session to move is watched with the new ones it gets.
func TestCanaryOfNothing(t *testing.T) {
	u := newUnit(t)
	u.worker(1).play()
	young, ch := u.watched(upgradeOptions{canary: 50, soak: long})
	p := young.play()
	u.awaitPhase(opSoaking)
	u.sessions(8)
	u.surePlayed(young)
	p.fail(3)
	u.until(func() bool { return u.pool.op.phase == opEnding })
	young.kill()
	if r, o := u.report(ch); o != admin.OutcomeRefused || r.Returned != 1 {
		t.Errorf("outcome %d, report %+v", o, r)
	}
}

// Sessions at no safe point are no part of a canary; a canary that gets nothing at
// all tells nothing.
func TestCanaryThatGetsNothingIsGivenUp(t *testing.T) {
	u := newUnit(t)
	old := u.worker(1)
	po := old.play()
	u.sessions(4)
	po.set(func() { po.stubborn = true })
	u.s.call(func() { u.pool.cfg.FreezeTimeout = 20 * 1e6 })
	young, ch := u.watched(upgradeOptions{canary: 50, soak: long})
	young.play()
	u.awaitPhase(opCanary)
	u.until(func() bool { return len(u.pool.stays) > 0 })
	u.s.call(func() { u.pool.op.deadline = u.s.now() })
	u.until(func() bool { return u.pool.op.phase > opBack })
	young.kill()
	if r, o := u.report(ch); o != admin.OutcomeRefused || !strings.Contains(r.Error, "none of its sessions reached a safe point") {
		t.Errorf("outcome %d, report %+v", o, r)
	}
}

// Groups are whole in a canary, also one that is larger than the share when there is
// nothing else.
func TestCanaryMovesGroupsWhole(t *testing.T) {
	u := newUnit(t)
	old := u.worker(1)
	u.members(old, 4, "room")
	old.play()
	young, ch := u.watched(upgradeOptions{canary: 25, soak: long})
	young.play()
	u.awaitPhase(opSoaking)
	wantLoads(t, u.loadOf(old, young), 0, 4)
	u.s.call(func() { u.s.abortOperation(u.pool) })
	u.until(func() bool { return u.pool.op.phase == opEnding })
	wantLoads(t, u.loadOf(old, young), 4, 0)
	young.kill()
	if r, _ := u.report(ch); r.Moved != 4 || r.Returned != 4 {
		t.Errorf("report %+v", r)
	}
	// With single sessions at hand the room stays, for it is too large.
	u.s.call(func() { u.pool.newest = 1 })
	u.sessions(4)
	young, ch = u.watched(upgradeOptions{canary: 25, soak: long})
	young.play()
	u.awaitPhase(opSoaking)
	u.s.call(func() {
		for _, ls := range young.w.Sessions {
			ss := sessionOf(ls)
			if ss.groupName() != "" {
				t.Error("the room is split")
			}
		}
	})
	wantLoads(t, u.loadOf(old, young), 6, 2)
	u.s.call(func() { u.s.abortOperation(u.pool) })
	u.until(func() bool { return u.pool.op.phase == opEnding })
	young.kill()
	u.report(ch)
}

// After everything has moved the old generation is kept, and gets it all back when the
// new one dies or is not well; when it is well, the old one ends.
func TestProbation(t *testing.T) {
	for name, c := range map[string]struct {
		happens  func(u *unit, young *fake)
		serving  uint32
		returned int
	}{
		"dies":    {func(u *unit, young *fake) { young.kill() }, 1, 0},
		"is sick": {func(u *unit, young *fake) { u.s.call(func() { young.w.beat.sick = "no database" }) }, 1, 6},
		"aborted": {func(u *unit, young *fake) { u.s.call(func() { u.s.abortOperation(u.pool) }) }, 1, 6},
		"is well": {func(u *unit, young *fake) { u.s.call(func() { u.pool.op.deadline = u.s.now() }) }, 2, 0},
	} {
		t.Run(name, func(t *testing.T) {
			u, old := serving(t, 6)
			young, ch := u.watched(upgradeOptions{probation: long})
			young.play()
			u.awaitPhase(opProbation)
			wantLoads(t, u.loadOf(old, young), 0, 6)
			u.session(false)
			u.allOwned()
			wantLoads(t, u.loadOf(old, young), 0, 7) // a new one is the new generation's
			c.happens(u, young)
			u.until(func() bool { return u.pool.op == nil || u.pool.op.phase == opEnding })
			if c.serving == 1 {
				young.kill()
				u.allOwned()
				wantLoads(t, u.loadOf(old), 7)
			} else {
				old.kill()
			}
			r, o := u.report(ch)
			if u.pool.serving != c.serving || r.Lost != 0 || (o == admin.OutcomeRefused) != (c.serving == 1) {
				t.Errorf("generation %d serves, outcome %d, report %+v", u.pool.serving, o, r)
			}
			if name == "dies" && r.Interrupted != 7 || c.returned > 0 && r.Returned != 7 {
				t.Errorf("report %+v", r)
			}
		})
	}
}

// A program whose state the old one cannot restore has no way back: what promises one
// is refused before anything moves, unless the operator says otherwise.
func TestOneWayUpgrade(t *testing.T) {
	v1 := []state.Info{{Name: "chat", Writes: 1, Restores: []uint32{1}}}
	v2 := []state.Info{{Name: "chat", Writes: 2, Restores: []uint32{1, 2}}}
	begin := func(t *testing.T, o upgradeOptions) (*unit, *fake, *fake, *player, <-chan *admin.PoolReport) {
		u := newUnit(t)
		old := u.worker(1)
		u.s.call(func() { old.w.schemas = v1 })
		p := old.play()
		u.sessions(4)
		young := u.worker(2)
		u.s.call(func() { young.w.schemas = v2 })
		young.play()
		return u, old, young, p, u.upgradingWith(opStarting, 1, o)
	}
	for name, o := range map[string]upgradeOptions{"canary": {canary: 50, soak: long}, "probation": {probation: long}} {
		t.Run(name+" is refused", func(t *testing.T) {
			u, old, young, _, ch := begin(t, o)
			u.dead(young)
			r, code := u.report(ch)
			if code != admin.OutcomeRefused || r.Moved != 0 || !strings.Contains(r.Error, `schema "chat" version 2`) || !strings.Contains(r.Error, "--no-return") {
				t.Errorf("outcome %d, report %+v", code, r)
			}
			wantLoads(t, u.loadOf(old), 4)
		})
	}
	t.Run("without such a promise it goes on, and says so", func(t *testing.T) {
		u, old, _, _, ch := begin(t, upgradeOptions{})
		u.awaitPhase(opEnding)
		old.kill()
		if r, o := u.report(ch); o != admin.OutcomeMoved || r.Moved != 4 || r.OneWay == "" {
			t.Errorf("outcome %d, report %+v", o, r)
		}
	})
	t.Run("with --no-return what is there stays", func(t *testing.T) {
		u, _, young, old, ch := begin(t, upgradeOptions{canary: 50, soak: long, noReturn: true})
		u.awaitPhase(opSoaking)
		old.set(func() { old.refuse = true }) // its program cannot restore what the new one wrote
		u.s.call(func() { young.w.beat.sick = "no database" })
		r, o := u.report(ch)
		if u.pool.serving != 1 {
			t.Errorf("generation %d serves", u.pool.serving)
		}
		if o != admin.OutcomeRefused || r.Stayed != 2 || r.Reasons[r.OneWay] == 0 || r.Lost != 0 {
			t.Errorf("outcome %d, report %+v", o, r)
		}
	})
}

// A supervisor that dies over a canary: its successor brings it back. One that dies
// in a probation: its successor goes on with it, and can still go back.
func TestSupervisorDiesOverAnUpgrade(t *testing.T) {
	begin := func(t *testing.T, o upgradeOptions, ph opPhase) (*unit, *fake, *fake) {
		u := newUnit(t)
		old := u.worker(1)
		po := old.play()
		u.sessions(4)
		young, _ := u.watched(o)
		py := young.play()
		u.awaitPhase(ph)
		var oh, yh []wire.Held
		u.s.call(func() {
			u.s.savePools()
			for _, ss := range u.s.sessions {
				h := wire.Held{Ref: wire.Ref{ID: ss.ID, Epoch: ss.Epoch}, Phase: wire.PhaseActive}
				if ss.owner() == old.w {
					oh = append(oh, h)
				} else {
					yh = append(yh, h)
				}
			}
		})
		po.set(func() { po.holds = oh })
		py.set(func() { py.holds = yh })
		return u, old, young
	}
	t.Run("canary", func(t *testing.T) {
		u, old, young := begin(t, upgradeOptions{canary: 50, soak: long}, opSoaking)
		u.crash()
		u.recovered()
		u.until(func() bool { return len(u.workerOf(old).Sessions) == 4 && u.workerOf(young).state == workerStopping })
	})
	t.Run("probation", func(t *testing.T) {
		u, _, young := begin(t, upgradeOptions{probation: long}, opProbation)
		u.crash()
		u.recovered()
		u.s.call(func() {
			if op := u.pool.op; op == nil || op.phase != opProbation || op.deadline.Sub(u.s.now()) > long {
				t.Errorf("operation %+v", op)
			}
		})
		young.kill()
		u.until(func() bool { return u.pool.serving == 1 && u.pool.op == nil })
	})
}
