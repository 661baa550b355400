package supervise

import (
	"fmt"
	"slices"
	"sort"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// defaultWait is how long an operation asks sessions at no safe point again.
const defaultWait = 30 * time.Second

// opKind is what an operation is for.
type opKind uint8

const (
	opUpgrade opKind = iota
	opScale
	opDrain
	opRebalance
)

func (k opKind) String() string {
	return [...]string{"upgrade", "scale", "drain", "rebalance"}[k]
}

// opPhase is where the operation on a pool stands. An upgrade:
//
//	starting --all ready, state compatible--> canary --share moved--> soaking
//	    |           \                            |                       |
//	    |            \--no canary--> moving <----|-----time is up, well--+
//	    |                              |         |                       |
//	    |   old empty, or time is up --+--> probation --time is up--> ending --> done
//	    |                              |         |
//	    |                              v         v
//	    |     (from canary and soaking, too)   trouble, or aborted
//	    |                                        |
//	    |                                        +--> back --new empty--> ending --> done
//	    +--any failure--> failed (the new ones are killed; nothing was touched)
//
// The pool's serving generation is the old one up to soaking and in back, the new
// one from moving on; it is what the keeper remembers. Without a probation, and once
// there is no old worker left to go back to, moving leads to ending.
//
// The others, which stay in one generation:
//
//	scale up:    starting --ready--> spreading --even--> ending --> done
//	scale down:  moving --surplus workers empty--> ending --> done
//	drain:       starting --replacement ready--> moving --empty--> ending --> done
//	rebalance:   spreading --even--> ending --> done
//
// A new worker that fails in starting takes a scale back to the former count, by
// way of moving.
type opPhase uint8

const (
	opStarting opPhase = iota
	opCanary
	opSoaking
	opMoving
	opSpreading
	opProbation
	opBack
	opEnding
	opFailed
)

func (ph opPhase) String() string {
	return [...]string{"starting", "moving the canary", "soaking", "moving", "spreading", "probation", "going back", "ending", "failed"}[ph]
}

// operation is what an operator has asked a pool for. There is one at a time.
type operation struct {
	kind  opKind
	pool  *pool
	phase opPhase
	began time.Time
	// deadline ends canary, moving, spreading and back; soaking and probation last
	// until then.
	deadline time.Time
	wait     time.Duration
	err      error
	report   admin.PoolReport
	stalls   []float64 // milliseconds, FREEZE to commit
	progress func(admin.Progress)
	finished func(*operation)
	lastWord time.Time
	scanAt   time.Time // when sessions that could not be asked are looked through again

	firstMove, lastMove time.Time // for the rate

	// Of an upgrade.
	from, to   uint32   // to is 0 in other operations: no generation
	command    []string // of the new generation
	oldCommand []string
	opts       upgradeOptions
	trouble    string // the last refusal of the new generation
	forward    bool   // it failed, and there is no way back
	oneWay     error  // why the old generation cannot restore what the new one writes
	share      share

	// Of the others.
	before  int // workers, before a scale
	leaving map[*worker]bool
	started []int // pids
	stopped []int
	uneven  int // sessions that were to be spread, when the time was over
}

// upgradeOptions are what an upgrade was asked for besides its command.
type upgradeOptions struct {
	canary    float64 // percent of the sessions; 0: everything at once
	soak      time.Duration
	probation time.Duration
	noReturn  bool
	rate      int // sessions a second; 0: the pool's own
}

func (op *operation) say(format string, args ...any) {
	if op.progress != nil {
		op.progress(admin.Progress{Text: fmt.Sprintf(format, args...)})
	}
}

func (op *operation) reason(why string) {
	if op.report.Reasons == nil {
		op.report.Reasons = map[string]int{}
	}
	if _, ok := op.report.Reasons[why]; ok || len(op.report.Reasons) < 32 {
		op.report.Reasons[why]++
	}
}

// committed counts one session's move.
func (op *operation) committed(a *attempt, now time.Time) {
	from, to := workerOf(a.From), workerOf(a.To)
	switch {
	case op.kind != opUpgrade:
		op.report.Moved++
	case to.gen == from.gen: // to its group's home
	case to.gen == op.to:
		op.report.Moved++
	case from.gen == op.to:
		op.report.Returned++
	default: // parked for the new generation, which then failed: it never was there
	}
	if op.firstMove.IsZero() {
		op.firstMove = a.Began
	}
	op.lastMove = now
	op.stalls = append(op.stalls, float64(now.Sub(a.Began).Microseconds())/1000)
}

// ended counts a session that came to its end by itself meanwhile.
func (op *operation) ended(ss *session, w *worker, r wire.Reason) {
	op.share.ended(w.gen == op.to, r)
	switch _, asked := op.pool.stays[ss.ID]; {
	case asked:
		op.report.Drained++
	case ss.Try != nil:
		op.report.Closed++
	}
}

// fills says whether workers of the serving generation that die meanwhile are
// replaced at once, and not only at the end.
func (op *operation) fills() bool {
	return op.kind != opUpgrade || op.phase == opCanary || op.phase == opSoaking || op.phase == opBack || op.forward
}

// stay is why a session did not move when it was last asked.
type stay struct {
	why string
	at  time.Time
}

// stayed notes that an attempt was given up. The note lasts until the session has
// moved or ended.
func (p *pool) stayed(a *attempt, why string, now time.Time) {
	if a.From != nil && a.Joins == nil {
		if p.stays == nil {
			p.stays = map[uint64]stay{}
		}
		p.stays[a.Session.ID] = stay{why, now}
	}
	op := p.op
	if op == nil {
		return
	}
	if a.Move == nil { // of a group one word is enough
		op.reason(why)
	}
	if a.To != nil && workerOf(a.To).gen == op.to {
		op.trouble = why
		if a.Joins == nil {
			op.share.refused++
		}
	}
}

// busy is the error for whoever wants to begin another operation.
func (op *operation) busy() error {
	return &admin.BusyError{Pool: op.pool.name, What: op.kind.String(), Since: op.began}
}

// queued is an operation that waits for the one before it.
type queued struct {
	start  func() error
	refuse func(error)
}

// maxQueue bounds how many operations wait for one pool.
const maxQueue = 16

// stepOperation looks whether an operation can go on. It runs after every event.
func (s *Supervisor) stepOperation(p *pool) {
	switch op := p.op; {
	case op == nil:
	case op.phase == opEnding || op.phase == opFailed:
		s.stepEnding(op)
	case op.kind == opUpgrade:
		s.stepUpgrade(op)
	default:
		s.stepTask(op)
	}
}

// abortOperation takes an operation back as far as it can be. One that is at its end
// anyway is left alone.
func (s *Supervisor) abortOperation(p *pool) {
	op := p.op
	if op.phase == opBack || op.phase == opEnding || op.phase == opFailed {
		return
	}
	s.log.Warn("operation is aborted by the operator", "pool", p.name, "operation", op.kind.String(), "phase", op.phase.String())
	op.report.Aborted = true
	if op.kind == opUpgrade {
		s.failUpgrade(op, errAborted)
	} else {
		s.failTask(op, errAborted)
	}
}

// describe says in a few words what is under way.
func (op *operation) describe(now time.Time) string {
	text := op.kind.String() + ": " + op.phase.String()
	if op.phase == opSoaking || op.phase == opProbation {
		text += fmt.Sprintf(", %s to go", max(0, op.deadline.Sub(now)).Round(time.Second))
	}
	if n := len(op.pool.queue); n > 0 {
		text += fmt.Sprintf(", %d more waiting", n)
	}
	return text
}

// left counts the sessions that are still with workers that are to go: those that
// can be asked, and those of workers that cannot be reached.
func (op *operation) left() (left, detached int) {
	for _, w := range op.pool.workers {
		switch {
		case !op.leaves(w):
		case w.state == workerDetached:
			detached += len(w.Sessions)
		default:
			left += len(w.Sessions) + w.Incoming
		}
	}
	return left, detached
}

// leaves says whether a worker is to go.
func (op *operation) leaves(w *worker) bool {
	if op.kind == opUpgrade {
		return w.gen != op.pool.serving
	}
	return op.leaving[w]
}

// sayLeft says once a second how much there is still to do.
func (op *operation) sayLeft(left int, now time.Time) {
	if left == 0 || now.Sub(op.lastWord) <= time.Second {
		return
	}
	if !op.lastWord.IsZero() {
		op.say("pool %s: %d sessions still to move", op.pool.name, left)
	}
	op.lastWord = now
}

// sayUntil says every few seconds how long a watch still lasts.
func (op *operation) sayUntil(what string, now time.Time) {
	if now.Sub(op.lastWord) < 5*time.Second {
		return
	}
	op.lastWord = now
	op.say("pool %s: %s, %s to go", op.pool.name, what, op.deadline.Sub(now).Round(time.Second))
}

// conclude begins the end: workers without sessions that are to go are stopped.
func (s *Supervisor) conclude(op *operation) {
	p := op.pool
	op.phase = opEnding
	for _, w := range sortedWorkers(p.workers) {
		if w.state == workerRetiring && len(w.Sessions)+w.Incoming == 0 {
			op.stopped = append(op.stopped, w.pid)
			s.stopWorker(w, "all its sessions have moved")
		}
	}
}

// stepEnding waits for the end of the processes that are to go, and until it is known
// what became of every session.
func (s *Supervisor) stepEnding(op *operation) {
	p := op.pool
	for _, w := range p.workers {
		if op.kind == opUpgrade && w.gen > p.serving && op.phase == opFailed && w.state != workerDetached {
			s.kill(w, "its generation is given up") // also one that was still being started
		}
		if op.leaves(w) && (w.state == workerStopping || w.killed || w.state == workerStarting) {
			return // its death is awaited
		}
	}
	if p.starting > 0 || s.undecided(p, s.now()) {
		return
	}
	s.endOperation(op)
}

// deathAfterEOF is how long the death of a worker that closed its channel may take
// to be seen.
const deathAfterEOF = time.Second

// undecided says whether the fate of sessions is still being found out, without
// which the report would be wrong: a worker that is most likely dead, or sessions of
// a dead one whose connections are being looked at.
func (s *Supervisor) undecided(p *pool, now time.Time) bool {
	for _, w := range p.workers {
		if w.state == workerDetached && len(w.Sessions) > 0 && now.Sub(w.closedAt) < deathAfterEOF {
			return true
		}
	}
	for _, ss := range s.sessions {
		if ss.pool == p && ss.owner() == nil && ss.Try == nil && p.parked[ss.ID] == nil {
			return true
		}
	}
	return false
}

func (s *Supervisor) endOperation(op *operation) {
	p, r := op.pool, &op.report
	rate := p.moveRate()
	p.op, p.restRate = nil, 0
	r.Stayed = op.uneven // of the others some may have moved, or died, since the time was up
	for _, w := range p.workers {
		if op.leaves(w) {
			r.Stayed += len(w.Sessions)
			op.notAsked(w, rate)
		}
	}
	if r.Stayed > 0 {
		p.restRate = op.opts.rate
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
	if took := op.lastMove.Sub(op.firstMove); len(op.stalls) >= rateSample && took > 0 && op.opts.rate == 0 && p.cfg.MoveRate == 0 {
		p.rate = float64(len(op.stalls)) / took.Seconds()
	}
	if op.err != nil {
		r.Error = op.err.Error()
	}
	s.savePools()
	s.replaceLater(p) // deaths meanwhile
	s.log.Info(op.kind.String()+" ended", "pool", p.name, "serving", p.serving, "moved", r.Moved, "stayed", r.Stayed,
		"returned", r.Returned, "drained", r.Drained, "interrupted", r.Interrupted, "lost", r.Lost, "error", r.Error,
		"seconds", s.now().Sub(op.began).Seconds())
	if op.finished != nil {
		op.finished(op)
	}
	for _, f := range p.ended {
		f(op)
	}
	p.ended = nil
	for len(p.queue) > 0 && p.op == nil {
		q := p.queue[0]
		p.queue = p.queue[1:]
		if err := q.start(); err != nil {
			q.refuse(err)
		}
	}
}

// stopWorker retires a worker that has no sessions.
func (s *Supervisor) stopWorker(w *worker, why string) {
	s.send(w, &wire.Message{Type: wire.TypeStop, Drain: true, Text: why})
	w.state = workerStopping
	w.deadline = s.now().Add(time.Duration(w.pool.cfg.StopTimeout))
}
