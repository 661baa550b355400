package supervise

import (
	"fmt"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// defaultSoak is how long a canary is watched.
const defaultSoak = 30 * time.Second

// share is the part of the sessions that a canary gets, and how it fares with them.
type share struct {
	pct     float64 // of the sessions; 0: no canary
	goal    int     // sessions to move
	arrived float64 // new sessions' claim to the canary, in percent of one

	refused    int   // offers that the new generation turned down
	young, old tally // ended since the canary began
}

// tally counts sessions that ended.
type tally struct{ ended, bad int }

func newShare(pct float64) share { return share{pct: pct} }

func (sh *share) ended(young bool, r wire.Reason) {
	t := &sh.old
	if young {
		t = &sh.young
	}
	t.ended++
	if r == wire.ReasonHandler || r == wire.ReasonLayer {
		t.bad++
	}
}

// next says whether a new session is the canary's. It goes by the sessions that
// arrive, not by those that are there: a canary that ends its sessions at once must
// not attract all others.
func (sh *share) next() bool {
	sh.arrived += sh.pct
	if sh.arrived < 100 {
		return false
	}
	sh.arrived -= 100
	return true
}

// canarying says whether both generations get new sessions.
func (p *pool) canarying() bool {
	return p.op != nil && p.op.kind == opUpgrade && (p.op.phase == opCanary || p.op.phase == opSoaking)
}

func (s *Supervisor) beginCanary(op *operation) {
	p, now := op.pool, s.now()
	n := s.poolSessions(p)
	op.share.goal = 0
	if n > 0 {
		op.share.goal = max(1, int(float64(n)*op.share.pct/100))
	}
	op.share.young, op.share.old, op.share.refused = tally{}, tally{}, 0
	op.phase, op.deadline, op.lastWord = opCanary, now.Add(op.wait), time.Time{}
	op.say("pool %s: generation %d is ready, moving %d of %d sessions to it", p.name, op.to, op.share.goal, n)
	s.savePools()
	s.stepCanary(op)
}

// stepCanary moves the share, whole groups at a time.
func (s *Supervisor) stepCanary(op *operation) {
	p, now := op.pool, s.now()
	if now.Before(op.scanAt) {
		return
	}
	underway := 0
	for a := range s.m.Tries() {
		if to := heading(a); sessionOf(a.Session).pool == p && a.From != nil && to != nil && to.gen == op.to {
			underway++
		}
	}
	missing := op.share.goal - op.report.Moved - underway
	if missing > 0 && now.Before(op.deadline) && !s.quiescing {
		asked, full := s.askShare(op, missing, func(size, done int) bool { return size <= missing-done })
		if asked == 0 && !full && underway == 0 && op.report.Moved == 0 {
			asked, full = s.askShare(op, 1, func(size, done int) bool { return done == 0 }) // a group larger than the share
		}
		if asked == 0 && !full { // all sessions were looked through, and that not at every event
			op.scanAt = now.Add(tick / 2)
		}
		if asked > 0 || full || underway > 0 || s.someoneLater(op, now) {
			op.sayLeft(missing+underway, now)
			return
		}
	}
	if underway > 0 {
		return
	}
	if op.share.goal > 0 && op.report.Moved == 0 && s.poolSessions(p) > 0 {
		why := "none of its sessions reached a safe point"
		if op.trouble != "" {
			why = op.trouble
		}
		s.failUpgrade(op, fmt.Errorf("the canary got no session: %s", why))
		return
	}
	op.phase, op.deadline, op.lastWord = opSoaking, now.Add(op.opts.soak), time.Time{}
	s.log.Info("canary serves", "pool", p.name, "sessions", op.report.Moved, "soak", op.opts.soak.String())
}

// askShare freezes up to n sessions for the canary, spread over the old workers. full says
// that more may be asked later.
func (s *Supervisor) askShare(op *operation, n int, fits func(size, done int) bool) (asked int, full bool) {
	var from []*worker
	for _, w := range sortedWorkers(op.pool.workers) {
		if w.gen == op.from && w.usable() && !w.quarantine { // suspects stay where they do no harm
			from = append(from, w)
		}
	}
	for i, w := range from {
		each := (n - asked + len(from) - i - 1) / (len(from) - i)
		to := op.pool.least(op.to, nil)
		if to == nil {
			return asked, full
		}
		before := asked
		n, more := s.shift(w, to, each, func(size, done int) bool { return fits(size, before+done) })
		asked, full = asked+n, full || more
	}
	return asked, full
}

// someoneLater says whether a session that might still be the canary's will be asked
// again.
func (s *Supervisor) someoneLater(op *operation, now time.Time) bool {
	for _, w := range op.pool.workers {
		if w.gen != op.from || !w.usable() || w.quarantine {
			continue
		}
		for _, ls := range w.Sessions {
			ss := sessionOf(ls)
			if ss.waits(now) {
				return true
			}
		}
	}
	return false
}

// stepSoaking watches the canary until its time is over.
func (s *Supervisor) stepSoaking(op *operation) {
	p, now := op.pool, s.now()
	over := !now.Before(op.deadline)
	why := s.unwell(op)
	if why == nil {
		why = s.failing(op, over)
	}
	switch {
	case why != nil:
		s.failUpgrade(op, why)
	case over:
		op.say("pool %s: the canary is well after %s", p.name, op.opts.soak)
		s.moveAll(op)
	default:
		op.sayUntil(fmt.Sprintf("%d sessions soak in generation %d", p.held(op.to), op.to), now)
	}
}

// watched says whether a worker is on probation or a canary; it is asked more often
// how it is.
func (w *worker) watched() bool {
	op := w.pool.op
	return op != nil && w.gen == op.to && (op.phase == opCanary || op.phase == opSoaking || op.phase == opProbation)
}

// unwell is the first word of a new worker about its own ill health, or that the new
// generation turns down what it is given: more than 1 in 20.
func (s *Supervisor) unwell(op *operation) error {
	for _, w := range sortedWorkers(op.pool.workers) {
		if w.gen != op.to {
			continue
		}
		if word, bad := w.unhealthy(); bad {
			return fmt.Errorf("worker (pid %d) of generation %d says that it is not well: %s", w.pid, w.gen, printable([]byte(word)))
		}
	}
	if sh := &op.share; op.phase != opProbation && sh.refused > 0 && sh.refused*20 > op.report.Moved+sh.refused {
		return fmt.Errorf("the new generation turned down %d of %d sessions: %s", sh.refused, op.report.Moved+sh.refused, op.trouble)
	}
	return nil
}

// earlyErrors is how many sessions a canary has to end with an error to be judged
// before its time is over.
const earlyErrors = 3

// failing compares the part of its sessions that each generation has ended with an
// error: a failing handler, or a record state in doubt. The new one may have twice the
// part of the old one, and 1 in 100 besides.
func (s *Supervisor) failing(op *operation, over bool) error {
	sh := &op.share
	if sh.young.bad == 0 || !over && sh.young.bad < earlyErrors {
		return nil
	}
	young := float64(sh.young.bad) / float64(sh.young.ended+op.pool.held(op.to))
	old := 0.0
	if n := sh.old.ended + op.pool.held(op.from); n > 0 {
		old = float64(sh.old.bad) / float64(n)
	}
	if young <= 2*old+0.01 {
		return nil
	}
	return fmt.Errorf("the new generation ended %d of its %d sessions with an error (%.1f %%), the old one %.1f %%",
		sh.young.bad, sh.young.ended+op.pool.held(op.to), 100*young, 100*old)
}

// held counts the sessions of a generation.
func (p *pool) held(gen uint32) (n int) {
	for _, w := range p.workers {
		if w.gen == gen {
			n += len(w.Sessions)
		}
	}
	return n
}
