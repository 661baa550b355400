package supervise

import (
	"fmt"
	"slices"
	"sort"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/state"
)

// defaultWait is how long an upgrade asks sessions at no safe point again.
const defaultWait = 30 * time.Second

// opPhase is where the upgrade of a pool stands.
//
//	starting --all ready, state compatible--> moving --old workers empty--> ending --> done
//	    |                                        |  \--time is up: some stay--^
//	    |                                        +--a new worker died--> back --empty--> failed
//	    +--any failure--> failed (the new ones are killed; nothing was touched)
type opPhase uint8

const (
	opStarting opPhase = iota
	opMoving
	opBack
	opEnding
	opFailed
)

// upgrade moves a pool from one generation to the next.
type upgrade struct {
	pool       *pool
	from, to   uint32
	command    []string // of the new generation
	oldCommand []string
	phase      opPhase
	began      time.Time
	deadline   time.Time // of the phase moving or back
	err        error
	report     admin.PoolReport
	trouble    string    // the last refusal of the new generation
	stalls     []float64 // milliseconds, FREEZE to commit
	progress   func(admin.Progress)
	finished   func(*admin.PoolReport)
	lastWord   time.Time
}

func (op *upgrade) say(format string, args ...any) {
	if op.progress != nil {
		op.progress(admin.Progress{Text: fmt.Sprintf(format, args...)})
	}
}

func (op *upgrade) reason(why string) {
	if op.report.Reasons == nil {
		op.report.Reasons = map[string]int{}
	}
	if _, ok := op.report.Reasons[why]; ok || len(op.report.Reasons) < 32 {
		op.report.Reasons[why]++
	}
}

// committed counts one session's move.
func (op *upgrade) committed(a *attempt, now time.Time) {
	switch op.to {
	case a.to.gen:
		op.report.Moved++
	case a.from.gen:
		op.report.Returned++
	default: // parked for the new generation, which then failed: it never was there
	}
	op.stalls = append(op.stalls, float64(now.Sub(a.began).Microseconds())/1000)
}

// beginUpgrade starts generation n+1 of a pool; the rest follows in stepUpgrade.
func (s *Supervisor) beginUpgrade(p *pool, command []string, wait time.Duration, progress func(admin.Progress), finished func(*admin.PoolReport)) {
	if wait <= 0 {
		wait = defaultWait
	}
	p.newest++
	op := &upgrade{pool: p, from: p.serving, to: p.newest, command: command, oldCommand: p.command,
		began: s.now(), progress: progress, finished: finished}
	op.deadline = op.began.Add(wait)
	op.report = admin.PoolReport{Pool: p.name, From: op.from, To: op.to}
	for _, w := range sortedWorkers(p.workers) {
		op.report.OldPIDs = append(op.report.OldPIDs, w.pid)
	}
	p.op = op
	s.log.Info("upgrade begins", "pool", p.name, "from", op.from, "to", op.to)
	op.say("pool %s: starting %d workers of generation %d", p.name, p.cfg.Workers, op.to)
	for range p.cfg.Workers {
		s.spawn(p, op.to, command, func(w *worker, err error) {
			if err != nil && p.op == op {
				s.failUpgrade(op, err)
			}
		})
	}
	s.savePools()
}

// failUpgrade ends an upgrade before anything was moved, or begins to bring
// everything back.
func (s *Supervisor) failUpgrade(op *upgrade, err error) {
	if op.err == nil {
		op.err = err
	}
	switch op.phase {
	case opStarting:
		op.phase = opFailed
		s.log.Error("upgrade refused; the old generation goes on", "pool", op.pool.name, "error", err)
		op.say("pool %s: %v; the old generation goes on", op.pool.name, err)
		for _, w := range op.pool.workers {
			if w.gen == op.to {
				s.kill(w, "its generation is given up")
			}
		}
	case opMoving:
		old := false
		for _, w := range op.pool.workers {
			old = old || w.gen == op.from && w.usable()
		}
		if !old {
			op.reason(err.Error())
			return // nothing to go back to: what is left of the new generation serves on
		}
		s.log.Error("upgrade fails; its sessions go back to the old generation", "pool", op.pool.name, "error", err)
		op.say("pool %s: %v; bringing everything back", op.pool.name, err)
		op.phase, op.deadline = opBack, s.now().Add(defaultWait)
		s.serve(op.pool, op.from, op.oldCommand)
	default:
	}
}

// serve makes a generation the one that gets sessions; the others are to go.
func (s *Supervisor) serve(p *pool, gen uint32, command []string) {
	p.serving, p.command = gen, command
	for _, w := range p.workers {
		switch {
		case w.gen == gen && w.state == workerRetiring:
			w.state = workerReady
		case w.gen != gen && w.state == workerReady:
			w.state = workerRetiring
		case w.gen != gen && w.state == workerStarting:
			s.kill(w, "its generation is given up")
		}
		for _, ss := range w.sessions {
			ss.retryAt = time.Time{}
		}
	}
	s.savePools()
}

// stepUpgrade looks whether an upgrade can go on. It runs after every event.
func (s *Supervisor) stepUpgrade(p *pool) {
	op := p.op
	if op == nil {
		return
	}
	now := s.now()
	switch op.phase {
	case opStarting:
		if p.count(op.to, workerReady) < p.cfg.Workers {
			return
		}
		if err := s.compatible(op); err != nil {
			s.failUpgrade(op, err)
			return
		}
		op.phase = opMoving
		op.say("pool %s: generation %d is ready, moving %d sessions", p.name, op.to, s.poolSessions(p))
		s.serve(p, op.to, op.command)
	case opMoving, opBack:
		left, detached := 0, 0
		for _, w := range p.workers {
			if w.gen == p.serving {
				continue
			}
			if w.state == workerDetached {
				detached += len(w.sessions)
				continue
			}
			left += len(w.sessions) + w.incoming
		}
		if left > 0 && now.Sub(op.lastWord) > time.Second {
			if !op.lastWord.IsZero() {
				op.say("pool %s: %d sessions still to move", p.name, left)
			}
			op.lastWord = now
		}
		if left > 0 && now.Before(op.deadline) {
			return
		}
		if op.phase == opMoving && op.report.Moved == 0 && op.trouble != "" {
			s.failUpgrade(op, fmt.Errorf("the new generation took no session: %s", op.trouble))
			if op.phase == opBack {
				return
			}
		}
		op.report.Stayed = left + detached
		if detached > 0 {
			op.reason("its worker broke the protocol and cannot be reached")
		}
		op.phase = opEnding
		for _, w := range sortedWorkers(p.workers) {
			if w.gen != p.serving && w.state == workerRetiring && len(w.sessions)+w.incoming == 0 {
				s.stopWorker(w, "all its sessions have moved")
			}
		}
	case opEnding, opFailed:
		for _, w := range p.workers {
			if w.gen > p.serving && op.phase == opFailed && w.state != workerDetached {
				s.kill(w, "its generation is given up") // also one that was still being started
			}
			if w.gen != p.serving && (w.state == workerStopping || w.killed || w.state == workerStarting) {
				return // its death is awaited
			}
		}
		if p.starting > 0 || s.undecided(p, now) {
			return
		}
		s.endUpgrade(op)
	}
}

// deathAfterEOF is how long the death of a worker that closed its channel may take
// to be seen.
const deathAfterEOF = time.Second

// undecided says whether the fate of sessions is still being found out, without
// which the report would be wrong: a worker that is most likely dead, or sessions of
// a dead one whose connections are being looked at.
func (s *Supervisor) undecided(p *pool, now time.Time) bool {
	for _, w := range p.workers {
		if w.state == workerDetached && len(w.sessions) > 0 && now.Sub(w.closedAt) < deathAfterEOF {
			return true
		}
	}
	for _, ss := range s.sessions {
		if ss.pool == p && ss.owner == nil && ss.attempt == nil && p.parked[ss.id] == nil {
			return true
		}
	}
	return false
}

func (s *Supervisor) poolSessions(p *pool) (n int) {
	for _, w := range p.workers {
		n += len(w.sessions)
	}
	return n + len(p.parked)
}

// compatible checks that the new generation can restore all that the old writes,
// before any socket is touched.
func (s *Supervisor) compatible(op *upgrade) error {
	var old, young *worker
	for _, w := range sortedWorkers(op.pool.workers) {
		if w.gen == op.to {
			young = w
			continue
		}
		if w.state == workerReady || w.state == workerRetiring {
			old = w
			if young == nil {
				continue
			}
		}
	}
	if old == nil || young == nil {
		return nil
	}
	for _, w := range sortedWorkers(op.pool.workers) {
		if w.gen == op.to || len(w.schemas) == 0 {
			continue
		}
		if err := state.Compatible(w.schemas, young.schemas); err != nil {
			return fmt.Errorf("the new program cannot restore the state of the old one: %w", err)
		}
	}
	return nil
}

// upgradeWorkerDied decides what a death means for the upgrade of its pool.
func (s *Supervisor) upgradeWorkerDied(p *pool, op *upgrade, w *worker, was workerState) {
	if op.phase == opEnding || op.phase == opFailed || was == workerStopping && !w.killed {
		return
	}
	if w.gen == op.to && op.phase != opBack {
		what := "ended before it was ready: look at what it printed"
		switch {
		case w.broke != nil:
			what = "broke the protocol: " + w.broke.Error()
		case w.killed && was == workerStopping && op.phase == opStarting:
			what = "was not ready in time (ready_timeout)"
		case op.phase != opStarting:
			what = "died"
		}
		s.failUpgrade(op, fmt.Errorf("worker (pid %d) of generation %d %s", w.pid, w.gen, what))
	}
}

func (s *Supervisor) endUpgrade(op *upgrade) {
	p, r := op.pool, &op.report
	p.op = nil
	r.Stayed = 0 // some may have moved, or died, since the time was up
	for _, w := range p.workers {
		if w.gen != p.serving {
			r.Stayed += len(w.sessions)
		}
	}
	for _, w := range sortedWorkers(p.workers) {
		if w.gen == p.serving && !slices.Contains(r.OldPIDs, w.pid) {
			r.NewPIDs = append(r.NewPIDs, w.pid)
		}
	}
	sort.Float64s(op.stalls)
	if n := len(op.stalls); n > 0 {
		r.StallP50, r.StallP99, r.StallMax = op.stalls[n/2], op.stalls[n*99/100], op.stalls[n-1]
	}
	if op.err != nil {
		r.Error = op.err.Error()
	}
	s.savePools()
	s.replaceLater(p) // deaths meanwhile
	s.log.Info("upgrade ended", "pool", p.name, "serving", p.serving, "moved", r.Moved, "stayed", r.Stayed,
		"returned", r.Returned, "interrupted", r.Interrupted, "lost", r.Lost, "seconds", s.now().Sub(op.began).Seconds())
	if op.finished != nil {
		op.finished(r)
	}
}

// stopWorker retires a worker that has no sessions.
func (s *Supervisor) stopWorker(w *worker, why string) {
	s.send(w, &wire.Message{Type: wire.TypeStop, Drain: true, Text: why})
	w.state = workerStopping
	w.deadline = s.now().Add(time.Duration(w.pool.cfg.StopTimeout))
}

// outcome is the exit code for a set of reports.
func outcome(pools []admin.PoolReport) admin.Outcome {
	out := admin.OutcomeMoved
	for i := range pools {
		r := &pools[i]
		switch {
		case r.Lost > 0:
			return admin.OutcomeLost
		case r.Error != "":
			out = admin.OutcomeRefused
		case r.Stayed > 0 && out == admin.OutcomeMoved:
			out = admin.OutcomeStay
		}
	}
	return out
}
