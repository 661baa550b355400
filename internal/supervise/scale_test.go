package supervise

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
)

func (u *unit) backend() *backend { return &backend{s: u.s} }

type taskAnswer struct {
	rep *admin.TaskReport
	err error
}

func (u *unit) task(f func(b *backend) (*admin.TaskReport, error)) <-chan taskAnswer {
	c := make(chan taskAnswer, 1)
	go func() {
		rep, err := f(u.backend())
		c <- taskAnswer{rep, err}
	}()
	return c
}

func (u *unit) taskReport(c <-chan taskAnswer) *admin.TaskReport {
	u.t.Helper()
	select {
	case a := <-c:
		if a.err != nil {
			u.t.Fatal(a.err)
		}
		return a.rep
	case <-time.After(patience):
		u.t.Fatal("the operation does not end")
		return nil
	}
}

func rebalance(b *backend) (*admin.TaskReport, error) {
	return b.Rebalance(context.Background(), admin.RebalanceRequest{}, nil)
}

// Sessions are spread until no worker has more than one more than another; a group
// goes whole, or not at all.
func TestRebalance(t *testing.T) {
	u := newUnit(t)
	a := u.worker(1)
	u.members(a, 4, "room")
	a.play()
	u.sessions(8)
	b, c := u.worker(1), u.worker(1)
	b.play()
	c.play()
	r := u.taskReport(u.task(rebalance))
	if r.Outcome != admin.OutcomeMoved || r.Stayed+r.Lost+r.Interrupted != 0 || r.Moved < 8 {
		t.Errorf("report %+v", r)
	}
	wantLoads(t, u.loadOf(a, b, c), 4, 4, 4)
	u.s.call(func() {
		for _, g := range u.s.m.Groups() {
			for _, ss := range g.Members {
				if ss.Owner != g.Home {
					t.Errorf("%s of group %s is not at its home", sid(ss.ID), g.Key.Name)
				}
			}
		}
	})
	if r = u.taskReport(u.task(rebalance)); r.Moved != 0 {
		t.Errorf("it moves what is even: %+v", r)
	}
}

// A group larger than the difference stays where it is, and that is the end of it.
func TestRebalanceOfOneLargeGroup(t *testing.T) {
	u := newUnit(t)
	a, b := u.worker(1), (*fake)(nil)
	u.members(a, 5, "room")
	a.play()
	b = u.worker(1)
	b.play()
	if r := u.taskReport(u.task(rebalance)); r.Moved != 0 || r.Outcome != admin.OutcomeMoved {
		t.Errorf("report %+v", r)
	}
}

// Whatever is where, and however much of it is stubborn: rebalancing comes to an end
// with loads closer than before, and every group whole.
func TestRebalanceComesToAnEnd(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		p := &pool{workers: map[uint64]*worker{}, parked: map[uint64]*session{}, serving: 1}
		loads := map[*worker]int{}
		sizes := map[*worker][]int{} // of groups; singles are groups of one
		n := rapid.IntRange(2, 5).Draw(rt, "workers")
		total := 0
		for i := range n {
			w := &worker{gen: 1}
			w.ID = uint64(i)
			p.workers[w.ID] = w
			sizes[w] = rapid.SliceOfN(rapid.IntRange(1, 7), 0, 12).Draw(rt, fmt.Sprint("groups of ", i))
			for _, k := range sizes[w] {
				loads[w] += k
				total += k
			}
		}
		spread := func() int {
			lo, hi := total, 0
			for _, w := range p.workers {
				lo, hi = min(lo, loads[w]), max(hi, loads[w])
			}
			return hi - lo
		}
		before := spread()
		for moves := 0; ; moves++ {
			if moves > 1000 {
				rt.Fatalf("no end: %v", loads)
			}
			most, fewest := extremes(p, loads, nil)
			diff := loads[most] - loads[fewest]
			if most == fewest || diff <= even(total/n) {
				break
			}
			i := slices.IndexFunc(sizes[most], func(k int) bool { return helps(k, 0, diff) })
			if i < 0 {
				break
			}
			k := sizes[most][i]
			sizes[most] = slices.Delete(sizes[most], i, i+1)
			sizes[fewest] = append(sizes[fewest], k)
			loads[most] -= k
			loads[fewest] += k
		}
		if after := spread(); after > before {
			rt.Fatalf("spread %d before, %d after", before, after)
		}
	})
}

// A worker is not emptied before another can take its place: if that does not start,
// everything stays as it is.
func TestDrainWithoutReplacementChangesNothing(t *testing.T) {
	u := newUnit(t)
	a := u.worker(1)
	a.play()
	u.sessions(3)
	u.s.call(func() { u.pool.cfg.Workers = 1 })
	r := u.taskReport(u.task(func(b *backend) (*admin.TaskReport, error) {
		return b.Drain(context.Background(), admin.DrainRequest{PID: a.w.pid}, nil)
	}))
	u.s.call(func() { u.pool.cfg.Workers = 0 })
	if r.Outcome != admin.OutcomeRefused || r.Moved != 0 || !strings.Contains(r.Error, "/nonexistent") {
		t.Errorf("report %+v", r)
	}
	u.s.call(func() {
		if a.w.state != workerReady {
			t.Errorf("the worker is %s", a.w.state)
		}
	})
	wantLoads(t, u.loadOf(a), 3)
	if _, err := u.backend().Drain(context.Background(), admin.DrainRequest{PID: 1}, nil); !errors.Is(err, admin.ErrBadRequest) {
		t.Errorf("a pid of no worker: %v", err)
	}
}

// A drained worker's sessions go to the others; one at no safe point stays with it,
// and goes later.
func TestDrain(t *testing.T) {
	u := newUnit(t)
	a := u.worker(1)
	pa := a.play()
	u.sessions(4)
	b := u.worker(1)
	b.play()
	pa.set(func() { pa.stubborn = true })
	u.s.call(func() { u.pool.cfg.FreezeTimeout = 20 * 1e6 })
	c := u.task(func(b *backend) (*admin.TaskReport, error) {
		return b.Drain(context.Background(), admin.DrainRequest{PID: a.w.pid, Wait: 100 * time.Millisecond}, nil)
	})
	r := u.taskReport(c)
	if r.Outcome != admin.OutcomeStay || r.Stayed != 4 || r.Moved != 0 || r.Reasons["no safe point within freeze_timeout"] == 0 {
		t.Errorf("report %+v", r)
	}
	pa.set(func() { pa.stubborn = false })
	u.until(func() bool { return len(b.w.Sessions) == 4 && a.w.state == workerStopping })
}

// Scaling up that fails leaves the pool as it was; scaling down moves the sessions of
// the workers with the fewest.
func TestScale(t *testing.T) {
	u := newUnit(t)
	a, b := u.worker(1), u.worker(1)
	a.play()
	b.play()
	u.s.call(func() { u.pool.cfg.Workers = 2 })
	u.sessions(6)
	scale := func(n int) func(*backend) (*admin.TaskReport, error) {
		return func(b *backend) (*admin.TaskReport, error) {
			return b.Scale(context.Background(), admin.ScaleRequest{Workers: n}, nil)
		}
	}
	r := u.taskReport(u.task(scale(4)))
	if r.Outcome != admin.OutcomeRefused || r.Workers != 2 || !strings.Contains(r.Error, "/nonexistent") || r.Moved != 0 {
		t.Errorf("report %+v", r)
	}
	wantLoads(t, u.loadOf(a, b), 3, 3)
	c := u.task(scale(1))
	u.until(func() bool {
		return len(a.w.Sessions)+len(b.w.Sessions) == 6 && (len(a.w.Sessions) == 6 || len(b.w.Sessions) == 6)
	})
	gone := a
	u.s.call(func() {
		if len(a.w.Sessions) == 6 {
			gone = b
		}
	})
	u.until(func() bool { return gone.w.state == workerStopping })
	gone.kill()
	if r = u.taskReport(c); r.Outcome != admin.OutcomeMoved || r.Moved != 3 || r.Workers != 1 || r.WorkersBefore != 2 || len(r.StoppedPIDs) != 1 {
		t.Errorf("report %+v", r)
	}
	u.s.call(func() { // a successor finds the number
		if err := u.s.restorePools([]byte(`{"pools":[{"name":"p","serving":1,"newest":1,"workers":5}]}`)); err != nil || u.s.pools["p"].cfg.Workers != 5 {
			t.Errorf("%v, workers %d", err, u.s.pools["p"].cfg.Workers)
		}
		u.s.pools["p"] = u.pool
		u.pool.cfg.Workers = 0
	})
}

// One operation at a time; those that are queued follow in order, and are refused when
// the operator takes everything back.
func TestOneOperationAtATime(t *testing.T) {
	u := newUnit(t)
	old := u.worker(1)
	old.play()
	u.sessions(2)
	young, ch := u.watched(upgradeOptions{canary: 50, soak: long})
	young.play()
	u.awaitPhase(opSoaking)
	b, ctx := u.backend(), context.Background()
	var busy *admin.BusyError
	for name, f := range map[string]func() error{
		"upgrade":   func() error { _, err := b.Upgrade(ctx, admin.UpgradeRequest{}, nil); return err },
		"scale":     func() error { _, err := b.Scale(ctx, admin.ScaleRequest{Workers: 2}, nil); return err },
		"drain":     func() error { _, err := b.Drain(ctx, admin.DrainRequest{PID: old.w.pid}, nil); return err },
		"rebalance": func() error { _, err := rebalance(b); return err },
	} {
		if err := f(); !errors.As(err, &busy) || busy.Pool != "p" {
			t.Errorf("%s: %v", name, err)
		}
	}
	queue := func() <-chan taskAnswer {
		n := 0
		u.s.call(func() { n = len(u.pool.queue) })
		c := u.task(func(b *backend) (*admin.TaskReport, error) {
			return b.Rebalance(ctx, admin.RebalanceRequest{Queue: true}, nil)
		})
		u.until(func() bool { return len(u.pool.queue) == n+1 })
		return c
	}
	c1, c2 := queue(), queue()
	u.s.call(func() { u.s.failUpgrade(u.pool.op, errors.New("for this test")) })
	u.awaitPhase(opEnding)
	young.kill()
	u.report(ch)
	u.taskReport(c1)
	u.taskReport(c2)

	u.s.call(func() { u.pool.newest = 1 })
	young, ch = u.watched(upgradeOptions{canary: 50, soak: long})
	young.play()
	u.awaitPhase(opSoaking)
	c3 := queue()
	done := make(chan *admin.UpgradeReport, 1)
	go func() {
		rep, err := b.Abort(ctx, admin.AbortRequest{}, nil)
		if err != nil {
			t.Error(err)
		}
		done <- rep
	}()
	if a := <-c3; !errors.Is(a.err, errAborted) {
		t.Errorf("queued: %+v", a)
	}
	u.awaitPhase(opEnding)
	young.kill()
	if r, o := u.report(ch); o != admin.OutcomeRefused || !r.Aborted {
		t.Errorf("report %+v", r)
	}
	if rep := <-done; rep.Outcome != admin.OutcomeMoved || rep.Pools[0].Returned != 1 {
		t.Errorf("abort: %+v", rep)
	}
	if _, err := b.Abort(ctx, admin.AbortRequest{}, nil); err == nil {
		t.Error("nothing was aborted, and that is no error")
	}
}

// The plan says which sessions would move, and why others would not.
func TestPlan(t *testing.T) {
	u := newUnit(t)
	u.s.call(func() { u.pool.command = []string{"/bin/sh", "-c"} })
	a := u.worker(1)
	u.members(a, 2, "room")
	pa := a.play()
	u.sessions(3)
	plan := func(r admin.UpgradeRequest) (*admin.UpgradePlan, admin.PoolPlan) {
		t.Helper()
		p, err := u.backend().Plan(context.Background(), r)
		if err != nil {
			t.Fatal(err)
		}
		return p, p.Pools[0]
	}
	p, pp := plan(admin.UpgradeRequest{})
	if p.Outcome != admin.OutcomeMoved || pp.Movable != 5 || pp.Groups != 1 || pp.To != 2 || !strings.Contains(pp.EstimateFrom, "assumed") || len(pp.NotChecked) == 0 {
		t.Errorf("plan %+v", p)
	}
	// Nothing of this has touched anything.
	wantLoads(t, u.loadOf(a), 5)

	// A member of the room reaches no safe point, and so does one other.
	pa.set(func() { pa.stubborn = true })
	u.s.call(func() { u.pool.cfg.FreezeTimeout = 20 * 1e6 })
	b := u.worker(1)
	b.play()
	c := u.task(func(b *backend) (*admin.TaskReport, error) {
		return b.Rebalance(context.Background(), admin.RebalanceRequest{Wait: 100 * time.Millisecond}, nil)
	})
	u.taskReport(c)
	asked := 0
	u.s.call(func() { asked = len(u.pool.stays) })
	p, pp = plan(admin.UpgradeRequest{})
	if asked == 0 || p.Outcome != admin.OutcomeStay || pp.AfterDrain != asked || pp.Movable != 5-asked || !strings.Contains(fmt.Sprint(pp.Reasons), "no safe point within freeze_timeout") {
		t.Errorf("%d were asked, plan %+v", asked, p)
	}
	// A worker that cannot be reached.
	u.surePlayed(a)
	pa.set(func() { a.send(nonsense) })
	u.until(func() bool { return a.w.state == workerDetached })
	p, pp = plan(admin.UpgradeRequest{})
	if pp.Never != 5 || pp.Movable != 0 || !strings.Contains(pp.Reasons[0].Why, "cannot be reached") || len(pp.Reasons[0].Examples) == 0 {
		t.Errorf("plan %+v", p)
	}
	// What cannot begin is said.
	if p, pp = plan(admin.UpgradeRequest{Command: "/nonexistent"}); p.Outcome != admin.OutcomeRefused || !strings.Contains(pp.Error, "/nonexistent") {
		t.Errorf("plan %+v", p)
	}
	if _, err := u.backend().Plan(context.Background(), admin.UpgradeRequest{Pool: "nosuch"}); !errors.Is(err, admin.ErrBadRequest) {
		t.Errorf("a pool that is not there: %v", err)
	}
}

// A scale that is taken back: workers that were to go serve on.
func TestAbortedScaleDown(t *testing.T) {
	u := newUnit(t)
	a, b := u.worker(1), u.worker(1)
	pa, pb := a.play(), b.play()
	u.sessions(4)
	for _, p := range []*player{pa, pb} {
		p.set(func() { p.stubborn = true })
	}
	u.s.call(func() { u.pool.cfg.Workers, u.pool.cfg.FreezeTimeout = 2, 20*1e6 })
	c := u.task(func(b *backend) (*admin.TaskReport, error) {
		return b.Scale(context.Background(), admin.ScaleRequest{Workers: 1}, nil)
	})
	u.awaitPhase(opMoving)
	u.until(func() bool { return len(u.pool.stays) > 0 })
	rep, err := u.backend().Abort(context.Background(), admin.AbortRequest{Pool: "p"}, nil)
	if err != nil || rep.Outcome != admin.OutcomeMoved {
		t.Fatalf("%v, %+v", err, rep)
	}
	if r := u.taskReport(c); r.Outcome != admin.OutcomeRefused || !r.Aborted || r.Stayed != 0 || r.Workers != 2 {
		t.Errorf("report %+v", r)
	}
	wantLoads(t, u.loadOf(a, b), 2, 2)
	u.s.call(func() {
		if a.w.state != workerReady || b.w.state != workerReady {
			t.Errorf("the workers are %s and %s", a.w.state, b.w.state)
		}
		u.pool.cfg.Workers = 0
	})
}
