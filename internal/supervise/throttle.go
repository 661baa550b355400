package supervise

import "time"

// throttle keeps the moves of a pool to so many sessions a second, as the operator wants
// them: moving takes processor time from sessions that are being served. It belongs to
// the ledger's goroutine.
type throttle struct {
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
	if t.filled.IsZero() {
		t.tokens = batch
	} else {
		t.tokens = min(2*batch, t.tokens+float64(rate)*now.Sub(t.filled).Seconds())
	}
	t.filled = now
	if t.tokens < batch {
		return 0, time.Duration((batch-t.tokens)/float64(rate)*float64(time.Second)) + time.Microsecond
	}
	return min(n, int(t.tokens)), 0
}

// moveRate is how many sessions of a pool may move in a second; 0: as many as can.
func (p *pool) moveRate() int {
	if p.op != nil && p.op.opts.rate > 0 {
		return p.op.opts.rate
	}
	return p.cfg.MoveRate
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
	if room == 0 && !t.waiting {
		t.waiting = true
		time.AfterFunc(again, func() { s.post(func() { t.waiting = false }) })
	}
	return room
}

// asked notes that n sessions of a pool were asked to move.
func (p *pool) asked(n int) { p.throttle.tokens -= float64(n) }
