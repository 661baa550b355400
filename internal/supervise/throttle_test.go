package supervise

import (
	"testing"
	"time"
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
