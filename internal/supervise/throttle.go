package supervise

import (
	"cmp"
	"fmt"
	"time"
)

// throttle keeps the moves of a pool to so many sessions a second, as the operator wants
// them: moving takes processor time from sessions that are being served. It belongs to
// the ledger's goroutine.
type throttle struct {
	rate    int
	tokens  float64 // sessions that may be asked to move now; below 0 after a large group
	filled  time.Time
	waiting bool // the ledger's goroutine will be woken
}

// throttleStep is how often sessions are asked to move: so rarely that they go in batches.
const throttleStep = 4 * time.Millisecond

// room says how many of n sessions may be asked to move now at rate a second, and when to
// look again if that is none.
func (t *throttle) room(n, rate int, now time.Time) (room int, again time.Duration) {
	batch := max(1, float64(rate)*throttleStep.Seconds())
	if t.filled.IsZero() || t.rate != rate { // what was owed to another rate is owed no more
		t.tokens = batch
	} else {
		t.tokens = min(2*batch, t.tokens+float64(rate)*now.Sub(t.filled).Seconds())
	}
	t.rate, t.filled = rate, now
	if t.tokens < batch {
		return 0, time.Duration((batch-t.tokens)/float64(rate)*float64(time.Second)) + time.Microsecond
	}
	return min(n, int(t.tokens)), 0
}

// moveRate is how many sessions of a pool may move in a second; 0: as many as can. What
// an upgrade was asked for holds for those that it leaves behind, too.
func (p *pool) moveRate() int {
	rate := p.restRate
	if p.op != nil {
		rate = p.op.opts.rate
	}
	return cmp.Or(rate, p.cfg.MoveRate)
}

// notAsked gives the reason of sessions that stay with a worker because their turn has
// not come.
func (op *operation) notAsked(w *worker, rate int) {
	if rate <= 0 || !w.usable() {
		return
	}
	for id := range w.Sessions {
		if _, asked := op.pool.stays[id]; !asked {
			op.reason(fmt.Sprintf("not asked in time: no more than %d may move in a second", rate))
		}
	}
}

// throttled says how many of n sessions of a pool may be asked to move now. When it is
// none, what waits is looked at again in time.
func (s *Supervisor) throttled(p *pool, n int) int {
	rate := p.moveRate()
	if rate <= 0 || n <= 0 {
		return n
	}
	t := &p.throttle
	room, again := t.room(n, rate, s.now())
	if room == 0 && again < tick && !t.waiting { // a tick looks again anyway
		t.waiting = true
		time.AfterFunc(again, func() { s.post(func() { t.waiting = false }) })
	}
	return room
}

// asked notes that n sessions of a pool were asked to move.
func (p *pool) asked(n int) {
	if p.moveRate() > 0 {
		p.throttle.tokens -= float64(n)
	}
}
