package supervise

import (
	"fmt"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// Heartbeat: every worker is sent a PING from time to time, and one that does not
// answer is killed. What a PING waits is counted in time in which this process ran
// itself: a supervisor that was stopped, suspended or starved of the processor must
// not take the time it missed for silence of its workers.

const (
	// maxStep is how much time between two ticks counts: this process was running if
	// the next tick came about when it was due.
	maxStep = 5 * tick
	// stallTime between two ticks is a stall: answers given to questions from before
	// may still lie in the channels, so every worker is asked anew.
	stallTime = time.Second
	// deafAfter is how long a PING may wait before a worker is offered nothing more,
	// and what it was offered goes to others.
	deafAfter = 3 * time.Second
	// offerPing is how soon after a PING the next one follows an ADOPT.
	offerPing = time.Second
	// maxStretch bounds how long a worker that answers no PING and says other things
	// is spared, in hang timeouts.
	maxStretch = 4
	// maxStalePongs bounds the answers to PINGs of earlier supervisors: there was one
	// PING at a time.
	maxStalePongs = 64
)

// heartbeat is what is known of one worker's answers. Times are of the supervisor's
// own running.
type heartbeat struct {
	sent   uint64        // nonce of the last PING
	open   bool          // it is not answered
	silent time.Duration // since that PING, or the last message after it
	age    time.Duration // since that PING
	told   uint32        // orders to go on that it was sent before that PING
	excess int           // PINGs minus PONGs
	stale  int           // PONGs for earlier supervisors
	sick   string        // what the worker says of its health; "": well

	exposed uint64 // sessions without room in its arena, by its own word
}

// runTime measures the time in which this process ran.
type runTime struct{ last time.Time }

// step returns how much of the time since the last step counts, and whether there was
// a stall.
func (r *runTime) step(now time.Time) (ran time.Duration, stalled bool) {
	gap := now.Sub(r.last)
	first := r.last.IsZero()
	r.last = now
	if first {
		return 0, false
	}
	return min(max(gap, 0), maxStep), gap > stallTime
}

// beat looks after all workers; it runs with every tick.
func (s *Supervisor) beat(now time.Time) {
	ran, stalled := s.ranFor.step(now)
	// While a successor is about to start, channels are not read.
	stalled = stalled || s.quiescing || s.stopping
	for _, w := range s.workers {
		b, cfg := &w.beat, &w.pool.cfg
		if cfg.Heartbeat <= 0 || w.ch == nil || w.killed || w.state != workerReady && w.state != workerRetiring {
			continue
		}
		b.age += ran
		b.silent += ran
		if stalled {
			b.open, b.age = false, time.Duration(cfg.Heartbeat)
		}
		if !b.open {
			if s.quiescing || s.stopping {
				continue
			}
			// At once after RESUME and THAW: until it answers nobody knows whether it heard them.
			if b.age >= time.Duration(cfg.Heartbeat) || b.sent == 0 || w.Behind() || (w.Incoming > 0 || w.watched()) && b.age >= offerPing {
				s.ping(w)
			}
			continue
		}
		limit := time.Duration(cfg.HangTimeout)
		switch {
		case b.silent > limit || b.age > maxStretch*limit:
			s.hung(w)
		case b.silent > deafAfter && !w.deaf:
			w.deaf = true
			s.offerOthers(w)
		}
	}
}

func (s *Supervisor) ping(w *worker) {
	s.pings++
	b := &w.beat
	b.sent, b.open, b.silent, b.age = uint64(wire.NewEpoch(s.incarnation, s.pings)), true, 0, 0
	b.excess++
	b.told = w.Told()
	s.send(w, &wire.Message{Type: wire.TypePing, Nonce: b.sent})
}

// heard notes that a worker said something: it is at least not silent.
func (w *worker) heard() { w.beat.silent, w.deaf = 0, false }

// onPong takes the answer to a PING. Each PING has one; any other is a lie.
func (s *Supervisor) onPong(w *worker, m *wire.Message) error {
	b := &w.beat
	if m.Nonce>>32 < uint64(s.incarnation) {
		if b.stale++; b.stale > maxStalePongs {
			return fmt.Errorf("%w: it goes on answering PINGs of an earlier supervisor", wire.ErrProtocol)
		}
		return nil
	}
	if m.Nonce > b.sent || b.excess == 0 {
		return fmt.Errorf("%w: PONG for no PING", wire.ErrProtocol)
	}
	b.excess--
	if m.Nonce != b.sent {
		return nil // of one from before a stall
	}
	b.open = false
	w.Sure(b.told)
	if (m.Exposed > 0) != (b.exposed > 0) {
		if m.Exposed > 0 {
			s.log.Warn("sessions found no room in a worker's memory for crashes: its crash would be their end, or of what they committed; raise crash_memory", "pool", w.pool.name, "pid", w.pid, "sessions", m.Exposed)
		} else {
			s.log.Info("there is room for all sessions in a worker's memory for crashes again", "pool", w.pool.name, "pid", w.pid)
		}
	}
	b.exposed = m.Exposed
	if sick := printable([]byte(m.Text)); sick != b.sick {
		b.sick = sick
		if sick != "" {
			s.log.Warn("a worker says that it is not well", "pool", w.pool.name, "pid", w.pid, "why", sick)
		} else {
			s.log.Info("a worker says that it is well again", "pool", w.pool.name, "pid", w.pid)
		}
	}
	return nil
}

// unhealthy returns what a worker says of itself when it is not well (handoff's
// WithHealth), as of its last PONG, or that it does not answer.
func (w *worker) unhealthy() (why string, bad bool) {
	switch {
	case w.beat.open && w.beat.silent > deafAfter:
		return fmt.Sprintf("no answer for %v", w.beat.silent.Round(time.Second)), true
	case w.beat.sick != "":
		return w.beat.sick, true
	}
	return "", false
}

// offerOthers takes back what a worker that does not answer was offered.
func (s *Supervisor) offerOthers(w *worker) {
	const why = "the new worker does not answer"
	s.log.Warn("a worker does not answer; it is offered nothing until it does", "pool", w.pool.name, "pid", w.pid, "sessions", len(w.Sessions))
	for gm := range s.m.Moves() {
		if gm.To == &w.Worker {
			s.abortGroup(gm, why)
		}
	}
	for a := range s.m.Tries() {
		if a.To != &w.Worker || a.Move != nil {
			continue
		}
		ss := sessionOf(a.Session)
		s.refuse(a, why)
		s.carryOut()
		// A worker that is silent has not refused anything: the count, at whose end a
		// session is lost, is of workers that looked at it.
		if m := ss.more; m != nil && m.refusals > 0 {
			m.refusals--
		}
	}
}

// hung ends a worker that does not answer. Only when it has been seen dead do its
// sessions get another owner (I1): a stopped process can be continued by anyone.
func (s *Supervisor) hung(w *worker) {
	limit := time.Duration(w.pool.cfg.HangTimeout)
	s.led.count(cntHangs, 1)
	s.log.Error("a worker does not answer: it is killed, and its sessions go on in others", "pool", w.pool.name, "pid", w.pid,
		"generation", w.gen, "sessions", len(w.Sessions), "hang_timeout", limit)
	w.beat.open, w.beatenDead = false, true
	s.kill(w, "no answer within hang_timeout")
	if w.gen == w.pool.serving && w.pool.op == nil {
		s.replaceLater(w.pool) // now: its death may take its time
	}
}
