package supervise

import (
	"fmt"
	"slices"
	"sort"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
)

// wanted is how many workers of the serving generation there are to be.
func (p *pool) wanted() int {
	n := p.cfg.Workers
	if op := p.op; op != nil && op.kind == opDrain && op.phase == opStarting {
		n++ // the one to be drained serves until the other is ready
	}
	return n
}

// newTask is an operation that stays in one generation.
func (s *Supervisor) newTask(kind opKind, p *pool, wait time.Duration, progress func(admin.Progress), finished func(*operation)) *operation {
	if wait <= 0 {
		wait = defaultWait
	}
	op := &operation{kind: kind, pool: p, from: p.serving, before: p.cfg.Workers, began: s.now(), wait: wait,
		progress: progress, finished: finished, leaving: map[*worker]bool{}}
	op.deadline = op.began.Add(wait)
	op.report = admin.PoolReport{Pool: p.name, From: op.from, To: op.from}
	for _, w := range sortedWorkers(p.workers) {
		op.report.OldPIDs = append(op.report.OldPIDs, w.pid)
	}
	p.op = op
	s.log.Info(kind.String()+" begins", "pool", p.name, "workers", p.cfg.Workers)
	return op
}

// beginScale changes how many workers a pool has.
func (s *Supervisor) beginScale(p *pool, n int, wait time.Duration, progress func(admin.Progress), finished func(*operation)) {
	op := s.newTask(opScale, p, wait, progress, finished)
	p.cfg.Workers = n
	s.savePools()
	if n >= op.before {
		op.say("pool %s: from %d to %d workers", p.name, op.before, n)
		p.failures = 0
		s.fill(p)
		return // starting
	}
	s.retireSurplus(op)
}

// retireSurplus begins to empty the workers that are more than wanted: those with the
// fewest sessions.
func (s *Supervisor) retireSurplus(op *operation) {
	p := op.pool
	op.phase, op.deadline = opMoving, s.now().Add(op.wait)
	surplus := p.surplus()
	n := 0
	for _, w := range surplus {
		op.leaving[w] = true
		n += len(w.Sessions)
		if w.state == workerStarting {
			s.kill(w, "the pool is scaled down")
			continue
		}
		w.state = workerRetiring
		s.setLeaving(w, true)
	}
	op.say("pool %s: %d workers are to go, moving %d sessions", p.name, len(surplus), n)
}

// surplus are the workers of the serving generation that are more than wanted.
func (p *pool) surplus() []*worker {
	var list []*worker
	for _, w := range sortedWorkers(p.workers) {
		if w.gen == p.serving && !w.quarantine && (w.state == workerReady || w.state == workerStarting) {
			list = append(list, w)
		}
	}
	// Those that take no sessions first, then those with the fewest.
	rank := func(w *worker) int {
		if !p.takes(w, p.serving) {
			return -1
		}
		return w.load()
	}
	sort.SliceStable(list, func(i, j int) bool { return rank(list[i]) < rank(list[j]) })
	return list[:max(0, len(list)-p.cfg.Workers)]
}

// dropSurplus is for a supervisor that takes over in the middle of a scale or a
// drain: the pool gets to its number of workers.
func (s *Supervisor) dropSurplus(p *pool) {
	if p.op != nil {
		return
	}
	for _, w := range p.surplus() {
		s.log.Info("worker is more than the pool is to have; its sessions move away", "pool", p.name, "pid", w.pid)
		w.state = workerRetiring
		s.setLeaving(w, true)
	}
}

// beginDrain empties one worker and has it replaced.
func (s *Supervisor) beginDrain(w *worker, wait time.Duration, progress func(admin.Progress), finished func(*operation)) {
	p := w.pool
	op := s.newTask(opDrain, p, wait, progress, finished)
	op.leaving[w] = true
	s.setLeaving(w, true)
	if w.gen != p.serving || w.state == workerRetiring {
		s.retireDrained(op)
		return
	}
	op.say("pool %s: starting a worker in the place of pid %d", p.name, w.pid)
	s.fill(p)
}

// setLeaving notes that a worker is to go, or is not, for the next supervisor as well: one
// that is drained, or too many, gets no sessions again, also when it takes long.
func (s *Supervisor) setLeaving(w *worker, leaving bool) {
	if w.leaving == leaving {
		return
	}
	w.leaving = leaving
	if w.ch == nil {
		return
	}
	if err := s.keepChannel(w); err != nil {
		s.log.Warn("the next supervisor would not know whether a worker is to go", "pid", w.pid, "error", err)
	}
}

// drainable says why a worker cannot be drained, or nil.
func drainable(w *worker) error {
	switch w.state {
	case workerReady, workerRetiring:
		if w.quarantine {
			return fmt.Errorf("worker (pid %d) is the quarantine; it ends by itself when nobody is under suspicion", w.pid)
		}
		return nil
	case workerDetached:
		return fmt.Errorf("worker (pid %d) cannot be reached: %w; it ends when its %d sessions have ended", w.pid, w.broke, len(w.Sessions))
	default:
		return fmt.Errorf("worker (pid %d) is %s", w.pid, w.state)
	}
}

// retireDrained lets the sessions of the worker to be drained move away.
func (s *Supervisor) retireDrained(op *operation) {
	op.phase, op.deadline = opMoving, s.now().Add(op.wait)
	for w := range op.leaving {
		if w.state == workerReady {
			w.state = workerRetiring
		}
		op.say("pool %s: moving %d sessions away from pid %d", op.pool.name, len(w.Sessions), w.pid)
	}
}

// beginRebalance spreads the sessions of a pool evenly over its workers.
func (s *Supervisor) beginRebalance(p *pool, wait time.Duration, progress func(admin.Progress), finished func(*operation)) {
	s.beginSpreading(s.newTask(opRebalance, p, wait, progress, finished))
}

func (s *Supervisor) beginSpreading(op *operation) {
	op.phase, op.deadline, op.lastWord = opSpreading, s.now().Add(op.wait), time.Time{}
	op.say("pool %s: spreading %d sessions over %d workers", op.pool.name, s.poolSessions(op.pool), op.pool.count(op.pool.serving, workerReady))
}

// failTask takes an operation other than an upgrade back as far as it can be.
func (s *Supervisor) failTask(op *operation, err error) {
	if op.err == nil {
		op.err = err
	}
	p := op.pool
	if op.kind == opRebalance {
		s.conclude(op)
		return
	}
	p.cfg.Workers = op.before
	s.log.Error("operation fails; the pool goes back", "pool", p.name, "operation", op.kind.String(), "workers", op.before, "error", err)
	op.say("pool %s: %v; the pool stays at %d workers", p.name, err, op.before)
	for w := range op.leaving {
		s.setLeaving(w, false)
		if w.state == workerRetiring && w.gen == p.serving {
			w.state = workerReady
		}
	}
	clear(op.leaving)
	s.savePools()
	s.retireSurplus(op) // what was started for it
}

// stepTask takes an operation other than an upgrade to its next phase when it can go
// on.
func (s *Supervisor) stepTask(op *operation) {
	p, now := op.pool, s.now()
	switch op.phase {
	case opStarting:
		if op.kind == opDrain && !op.drainsLiving() {
			s.conclude(op) // it has died, and is replaced
			return
		}
		if p.count(p.serving, workerReady) < p.wanted() {
			if p.starting == 0 && p.count(p.serving, workerStarting, workerReady) < p.wanted() && p.restartAt.IsZero() {
				s.fill(p) // one died meanwhile
			}
			return
		}
		if op.kind == opDrain {
			s.retireDrained(op)
			return
		}
		s.beginSpreading(op)
	case opMoving:
		left, _ := op.left()
		op.sayLeft(left, now)
		if left > 0 && now.Before(op.deadline) {
			return
		}
		s.conclude(op)
	case opSpreading:
		if s.quiescing || now.Before(op.scanAt) {
			return
		}
		more := false
		if now.Before(op.deadline) {
			more = s.spread(op)
		} else if op.uneven = s.uneven(p); op.uneven > 0 {
			op.reason("the time was over before the workers were even")
		}
		if more {
			loads, _ := s.loads(p)
			op.sayLeft(gap(loads), now)
			return
		}
		s.conclude(op)
	default:
	}
}

// drainsLiving says whether the worker to be drained is still there.
func (op *operation) drainsLiving() bool {
	for w := range op.leaving {
		if op.pool.workers[w.ID] == w && w.usable() {
			return true
		}
	}
	return false
}

// uneven is how many sessions had to move yet for the workers to be even.
func (s *Supervisor) uneven(p *pool) int {
	loads, _ := s.loads(p)
	total := 0
	for _, n := range loads {
		total += n
	}
	if most, fewest := extremes(p, loads, nil); most == nil || loads[most]-loads[fewest] <= even(total/len(loads)) {
		return 0
	}
	return gap(loads)
}

// gap is how many sessions are with the wrong worker.
func gap(loads map[*worker]int) (n int) {
	if len(loads) == 0 {
		return 0
	}
	total := 0
	for _, k := range loads {
		total += k
	}
	for _, k := range loads {
		n += max(0, k-total/len(loads))
	}
	return n
}

// taskReport is what an operation other than an upgrade did.
func (s *Supervisor) taskReport(op *operation) *admin.TaskReport {
	p, r := op.pool, &op.report
	out := &admin.TaskReport{Operation: op.kind.String(), Pool: p.name, WorkersBefore: op.before, Workers: p.cfg.Workers,
		Moved: r.Moved, Stayed: r.Stayed, Drained: r.Drained, Interrupted: r.Interrupted, Lost: r.Lost, Closed: r.Closed,
		Reasons: r.Reasons, StallP50: r.StallP50, StallP99: r.StallP99, StallMax: r.StallMax, Error: r.Error, Aborted: r.Aborted,
		StoppedPIDs: op.stopped}
	for _, w := range sortedWorkers(p.workers) {
		if !slices.Contains(r.OldPIDs, w.pid) {
			out.StartedPIDs = append(out.StartedPIDs, w.pid)
		}
		out.Spread = append(out.Spread, admin.WorkerStatus{PID: w.pid, Generation: w.gen, State: w.state.String(), Sessions: len(w.Sessions)})
	}
	switch {
	case r.Lost > 0:
		out.Outcome = admin.OutcomeLost
	case r.Error != "":
		out.Outcome = admin.OutcomeRefused
	case r.Stayed > 0:
		out.Outcome = admin.OutcomeStay
	}
	return out
}
