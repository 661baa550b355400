package supervise

import (
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
)

// Over any time, no more are asked to move than the rate allows, and hardly fewer; after a
// group that was larger than that, others wait for as long as it should have taken.
func TestThrottle(t *testing.T) {
	for _, rate := range []int{1, 100, 5000, 200000} {
		var th throttle
		now, asked := time.Unix(1000, 0), 0
		began := now
		for now.Sub(began) < 10*time.Second {
			n, again := th.room(128, rate, now)
			if n == 0 && again <= 0 {
				t.Fatalf("rate %d: nothing to do, and nothing to wait for", rate)
			}
			th.tokens -= float64(n)
			asked += n
			now = now.Add(max(again, 50*time.Microsecond))
		}
		// A batch more, for the beginning.
		if got, most := float64(asked)/10, float64(rate)*1.01+1; got > most || got < float64(rate)*.9-1 {
			t.Errorf("rate %d: %.1f sessions a second", rate, got)
		}
		th.tokens -= float64(rate) // a group of a second's worth
		if n, again := th.room(128, rate, now); n != 0 || again < time.Second-2*throttleStep {
			t.Errorf("rate %d: after a large group %d, again after %v", rate, n, again)
		}
	}
}

// A pool with a rate asks its sessions at that rate, and not all that it could.
func TestMoveRate(t *testing.T) {
	u, old := serving(t, 40)
	var now time.Time
	u.s.call(func() {
		now = u.s.now()
		u.s.now = func() time.Time { return now }
		u.pool.cfg.MoveRate = 1000 // four at a time
	})
	young := u.worker(2)
	young.play()
	u.retire(old, 2)
	step := func(want int) {
		t.Helper()
		u.until(func() bool { return len(young.w.Sessions) >= want })
		u.allOwned()
		u.s.call(func() { u.s.onTick(now) })
		if n := u.loadOf(young)[0]; n != want {
			t.Fatalf("%d sessions have moved, want %d", n, want)
		}
	}
	step(4)
	u.s.call(func() { now = now.Add(4 * time.Millisecond) })
	step(8)
	u.s.call(func() { now = now.Add(time.Hour) }) // what was not used is not made up for
	step(16)
	u.s.call(func() { u.pool.cfg.MoveRate = 0 })
	step(40)
}

// rated begins an upgrade of a unit with so many sessions, at a rate.
func rated(t *testing.T, n int, o upgradeOptions) (u *unit, old, young *fake, ch <-chan *admin.PoolReport) {
	t.Helper()
	u, old = serving(t, n)
	young = u.worker(2)
	young.play()
	return u, old, young, u.upgradingWith(opStarting, 1, o)
}

// A canary at a rate gets its whole share, and not only what may be asked at once.
func TestMoveRateOfCanary(t *testing.T) {
	u, old, young, _ := rated(t, 40, upgradeOptions{canary: 25, soak: long, rate: 50})
	u.awaitPhase(opSoaking)
	wantLoads(t, u.loadOf(old, young), 30, 10)
}

// Nor is a pool even when no more may be asked for the moment.
func TestMoveRateOfRebalance(t *testing.T) {
	u, a := serving(t, 40)
	u.s.call(func() { u.pool.cfg.MoveRate = 250 })
	b := u.worker(1)
	b.play()
	if r := u.taskReport(u.task(rebalance)); r.Outcome != admin.OutcomeMoved || r.Moved != 20 {
		t.Errorf("report %+v", r)
	}
	wantLoads(t, u.loadOf(a, b), 20, 20)
}

// When the time was too short for that, the report says how many stay.
func TestMoveRateTooLowToRebalance(t *testing.T) {
	u, a := serving(t, 40)
	u.s.call(func() { u.pool.cfg.MoveRate = 1 })
	b := u.worker(1)
	b.play()
	answer := u.task(rebalance)
	u.until(func() bool { return u.pool.op != nil && u.pool.op.report.Moved > 0 })
	u.s.call(func() { u.pool.op.deadline = u.s.now() })
	if r := u.taskReport(answer); r.Outcome != admin.OutcomeStay || r.Stayed+r.Moved != 20 || len(r.Reasons) == 0 {
		t.Errorf("report %+v", r)
	}
	if n := u.loadOf(a, b)[0]; n < 36 {
		t.Errorf("%d sessions are where they were, at one move a second", n)
	}
}

// What an upgrade leaves behind when its time is over still goes at its rate, also with
// the next supervisor; that nobody else waits longer for it.
func TestMoveRateOutlivesUpgrade(t *testing.T) {
	u, old, young, ch := rated(t, 40, upgradeOptions{rate: 1})
	u.awaitPhase(opMoving)
	u.s.call(func() { u.pool.op.deadline = u.s.now() }) // one has been asked, at most two
	r, o := u.report(ch)
	if o != admin.OutcomeStay || r.Stayed < 38 || r.Reasons["not asked in time: no more than 1 may move in a second"] < 38 {
		t.Errorf("outcome %d, report %+v", o, r)
	}
	var rate int
	u.s.call(func() {
		u.s.onTick(u.s.now())
		rate = u.pool.moveRate()
	})
	u.allOwned()
	if n := u.loadOf(young)[0]; rate != 1 || n > 4 {
		t.Errorf("%d sessions moved after the upgrade at a rate of %d", n, rate)
	}
	u.until(func() bool { // what the next supervisor finds
		e, err := u.s.keeper.Get(t.Context(), poolsKey.Kind)
		for i := range e {
			if e[i].Key == poolsKey && err == nil {
				defer func() { u.s.pools["p"] = u.pool }()
				err = u.s.restorePools(e[i].Meta)
				return err == nil && u.s.pools["p"].moveRate() == 1
			}
		}
		return false
	})
	u.s.call(func() { u.pool.restRate = 0 })
	u.until(func() bool { return len(old.w.Sessions) == 0 })
}

// Moves without a rate, or with another one, are nothing that those with one wait for.
func TestMoveRateOwesNothingToOthers(t *testing.T) {
	p := &pool{}
	now := time.Unix(1000, 0)
	begin := func(rate int) {
		t.Helper()
		p.cfg.MoveRate = rate
		if n, _ := p.throttle.room(128, rate, now); n == 0 {
			t.Errorf("at %d a second nothing moves", rate)
		}
	}
	begin(100)
	p.cfg.MoveRate = 0
	p.asked(100000)
	now = now.Add(time.Second)
	begin(100)
	p.asked(100000) // a group
	begin(1000)
}
