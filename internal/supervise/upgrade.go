package supervise

import (
	"errors"
	"fmt"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/state"
)

var errAborted = errors.New("aborted by the operator")

// beginUpgrade starts generation n+1 of a pool; the rest follows in stepUpgrade.
func (s *Supervisor) beginUpgrade(p *pool, command []string, wait time.Duration, opts upgradeOptions, progress func(admin.Progress), finished func(*operation)) {
	if wait <= 0 {
		wait = defaultWait
	}
	p.newest++
	op := &operation{kind: opUpgrade, pool: p, from: p.serving, to: p.newest, command: command, oldCommand: p.command,
		opts: opts, began: s.now(), wait: wait, progress: progress, finished: finished}
	op.share = newShare(opts.canary)
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
func (s *Supervisor) failUpgrade(op *operation, err error) {
	if op.err == nil {
		op.err = err
	}
	p := op.pool
	switch op.phase {
	case opStarting:
		op.phase = opFailed
		s.log.Error("upgrade refused; the old generation goes on", "pool", p.name, "error", err)
		op.say("pool %s: %v; the old generation goes on", p.name, err)
		for _, w := range p.workers {
			if w.gen == op.to {
				s.kill(w, "its generation is given up")
			}
		}
	case opCanary, opSoaking, opMoving, opProbation:
		old, there := false, 0
		for _, w := range p.workers {
			old = old || w.gen == op.from && w.usable()
			if w.gen == op.to {
				there += len(w.Sessions)
			}
		}
		forward := op.phase == opMoving || op.phase == opProbation
		// What has moved is in the new form, also while its worker is dead.
		there = max(there, op.report.Moved)
		if forward && (!old || op.oneWay != nil && there > 0) {
			// Nothing to go back to: what is left of the new generation serves on.
			op.forward = true
			op.reason(err.Error())
			if op.oneWay != nil {
				op.reason(op.oneWay.Error())
			}
			if !op.report.Aborted {
				op.err = nil
			}
			if op.report.Aborted || op.phase == opProbation {
				s.conclude(op)
			}
			return
		}
		s.log.Error("upgrade fails; its sessions go back to the old generation", "pool", p.name, "error", err)
		op.say("pool %s: %v; bringing everything back", p.name, err)
		op.phase, op.deadline, op.lastWord = opBack, s.now().Add(max(op.wait, defaultWait)), time.Time{}
		p.throttle.rate = 0 // a group that went there as a whole does not hold up those that come back
		if op.oneWay != nil && there > 0 {
			op.reason(op.oneWay.Error())
			op.deadline = s.now().Add(retryAfter) // those that are there stay
		}
		s.serve(p, op.from, op.oldCommand)
	default:
	}
}

// serve makes a generation the one that gets sessions; the others are to go.
func (s *Supervisor) serve(p *pool, gen uint32, command []string) {
	p.serving, p.command = gen, command
	for _, w := range p.workers {
		switch {
		case w.gen == gen && w.state == workerRetiring && w.quarantine && p.ward.worker != w:
			// It is the quarantine no more, and is emptied like any that is to go.
		case w.gen == gen && w.state == workerRetiring && w.leaving: // whatever its program
		case w.gen == gen && w.state == workerRetiring:
			w.state = workerReady
		case w.gen != gen && w.state == workerReady:
			w.state = workerRetiring
		case w.gen != gen && w.state == workerStarting:
			s.kill(w, "its generation is given up")
		}
		for _, ls := range w.Sessions {
			sessionOf(ls).retryAt = 0
		}
	}
	s.savePools()
}

// stepUpgrade takes an upgrade to its next phase when it can go on.
func (s *Supervisor) stepUpgrade(op *operation) {
	p, now := op.pool, s.now()
	switch op.phase {
	case opStarting:
		if p.count(op.to, workerReady) < p.cfg.Workers {
			return
		}
		if err := s.compatible(op); err != nil {
			s.failUpgrade(op, err)
			return
		}
		if op.opts.canary > 0 && op.opts.canary < 100 {
			s.beginCanary(op)
			return
		}
		s.moveAll(op)
	case opCanary:
		s.stepCanary(op)
	case opSoaking:
		s.stepSoaking(op)
	case opMoving, opBack:
		left, detached := op.left()
		op.sayLeft(left, now)
		if left > 0 && now.Before(op.deadline) {
			return
		}
		if op.phase == opMoving && op.report.Moved == 0 && op.trouble != "" {
			s.failUpgrade(op, fmt.Errorf("the new generation took no session: %s", op.trouble))
			if op.phase == opBack {
				return
			}
		}
		if detached > 0 {
			op.reason("its worker broke the protocol and cannot be reached")
		}
		if op.phase == opMoving && op.opts.probation > 0 && op.err == nil {
			op.phase, op.deadline, op.lastWord = opProbation, now.Add(op.opts.probation), time.Time{}
			s.savePools()
			return
		}
		s.conclude(op)
	case opProbation:
		if why := s.unwell(op); why != nil {
			s.failUpgrade(op, why)
			return
		}
		if now.Before(op.deadline) && s.canGoBack(op) {
			op.sayUntil(fmt.Sprintf("everything has moved; generation %d is kept", op.from), now)
			return
		}
		s.conclude(op)
	default:
	}
}

// moveAll makes the new generation the one that serves, so that everything moves to
// it.
func (s *Supervisor) moveAll(op *operation) {
	p := op.pool
	op.phase, op.deadline, op.lastWord = opMoving, s.now().Add(op.wait), time.Time{}
	op.say("pool %s: generation %d is ready, moving %d sessions", p.name, op.to, s.poolSessions(p))
	s.serve(p, op.to, op.command)
}

// canGoBack says whether a worker of the old generation is still there.
func (s *Supervisor) canGoBack(op *operation) bool {
	for _, w := range op.pool.workers {
		if w.gen == op.from && w.usable() {
			return true
		}
	}
	return false
}

func (s *Supervisor) poolSessions(p *pool) (n int) {
	for _, w := range p.workers {
		n += len(w.Sessions)
	}
	return n + len(p.parked)
}

// compatible checks, before any socket is touched, that the new generation can
// restore all that the old ones write, and whether the old one can restore what the
// new one writes. Without the latter there is no way back for a session that the
// new generation has served.
func (s *Supervisor) compatible(op *operation) error {
	var young *worker
	for _, w := range sortedWorkers(op.pool.workers) {
		if w.gen == op.to {
			young = w
		}
	}
	if young == nil {
		return nil
	}
	oneWay, err := op.pool.restorable(young.schemas, op.from, op.to)
	if oneWay != nil {
		op.oneWay = oneWay
	}
	if err != nil || op.oneWay == nil {
		return err
	}
	op.report.OneWay = op.oneWay.Error()
	if err := op.opts.allowOneWay(op.oneWay); err != nil {
		return err
	}
	op.say("pool %s: %v", op.pool.name, op.oneWay)
	return nil
}

// restorable compares what a new program, of generation to, writes and restores with what
// the workers do that there are: err says why it cannot take over, oneWay why generation
// from could not take back.
func (p *pool) restorable(young []state.Info, from, to uint32) (oneWay, err error) {
	for _, w := range sortedWorkers(p.workers) {
		if w.gen == to {
			continue
		}
		if len(w.schemas) > 0 {
			if err := state.Compatible(w.schemas, young); err != nil {
				return oneWay, fmt.Errorf("the new program cannot restore the state of the old one: %w", err)
			}
		}
		if w.gen != from || oneWay != nil {
			continue
		}
		if err := state.Compatible(young, w.schemas); err != nil {
			oneWay = fmt.Errorf("there is no way back: the old program cannot restore the state of the new one (%s)", schemaNames(err))
		}
	}
	return oneWay, nil
}

// allowOneWay says whether an upgrade may begin that has no way back.
func (o *upgradeOptions) allowOneWay(why error) error {
	if (o.canary > 0 || o.probation > 0) && !o.noReturn {
		return fmt.Errorf("%w; a canary or a probation promises one. Deploy a program first that restores both, or ask for --no-return", why)
	}
	return nil
}

// schemaNames says which schemas are incompatible, for people.
func schemaNames(err error) string {
	var inc *state.IncompatibleError
	if !errors.As(err, &inc) {
		return err.Error()
	}
	text := ""
	for i, sc := range inc.Schemas {
		if i > 0 {
			text += ", "
		}
		text += fmt.Sprintf("schema %q version %d", sc.Name, sc.Writes)
	}
	return printable([]byte(text))
}

// upgradeWorkerDied decides what a death means for the upgrade of its pool.
func (s *Supervisor) upgradeWorkerDied(op *operation, w *worker, was workerState) {
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
