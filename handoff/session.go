package handoff

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"slices"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// phase is what this process does with a session. What the supervisor was told
// follows from it and from the epochs.
//
//	         ADOPT            RESUME         handler starts
//	(none) --------> adopted --------> idle ----------------> running
//	                    |                ^ \                    |  |
//	              ABORT |   handler gave |  \ FREEZE in force   |  | handler gave anything
//	                    v   ErrMoving    |   v                  |  | else, CLOSE, STOP
//	                 (none)              |  parking <-----------+  |
//	                                     |   |    (by way of idle) v
//	                       THAW: imported|   v PARKED sent       closing --> (tombstone)
//	                         importing --+  parked                  CLOSED sent   | CLOSED_ACK
//	                                  ^      | | RELEASE                          v
//	                                  +------+ +------> (none)                  (none)
//	                                    THAW
//
// FREEZE only notes the attempt, THAW only clears it; step moves the session from
// where it is towards what is wanted. So either may come at any point.
type phase uint8

const (
	phaseAdopted   phase = iota + 1 // imported, not ours yet
	phaseIdle                       // ours, between two runs of the handler
	phaseRunning                    // the handler runs
	phaseParking                    // being taken off its Conn
	phaseParked                     // only kept
	phaseImporting                  // being put back on its Conn
	phaseClosing                    // close_notify, shutdown
)

var phaseNames = [...]string{"", "adopted", "idle", "running", "parking", "parked", "importing", "closing"}

func (p phase) String() string { return phaseNames[p] }

// session belongs to the worker's loop.
type session struct {
	id      uint64
	owner   wire.Epoch // of the adoption
	attempt wire.Epoch // of the FREEZE in force; 0: none
	sent    wire.Epoch // of the last PARKED
	next    wire.Epoch // of a FREEZE that waits until its group's last attempt is undone
	seen    wire.Epoch // the highest ever; what is not above is stale
	phase   phase
	conn    *Conn
	resting bool  // its handler was asked to return for a rest, or has
	asleep  bool  // it waits for input; see rest.go
	watched bool  // it may still be in the set of rest.go although it does not rest
	kept    *kept // in phaseParked
	group   string
	join    *join
	batch   *batch   // the group's attempt that it belongs to
	barrier *barrier // for the next run of the handler; nil: the Conn's goes on
	cancel  context.CancelFunc
	frozen  bool // a FREEZE came during this run of the handler
	kicked  bool // the operator closed it

	// Changes of keys: see rekey.go.
	pause     bool   // asked for while the session was not on its Conn
	pausing   bool   // from PAUSE to CONTINUE
	parkLater bool   // it is to be parked when the change of keys is over
	updates   uint64 // the client's KeyUpdates since the adoption
	base      uint64 // of them, before the session's present Conn
}

// step brings s nearer to what is wanted of it.
func (w *worker) step(s *session) {
	switch s.phase {
	case phaseIdle:
		w.startPause(s)
		switch {
		case s.kicked:
			w.end(s, wire.ReasonOperator, nil)
		case s.batch != nil:
			w.advance(s.batch)
		case s.attempt != 0:
			w.park(s)
		case w.stopping && s.resting: // for a last word, as those that are asleep already
			w.start(s)
		case w.stopping:
			w.end(s, wire.ReasonOperator, nil)
		case s.asleep || s.resting && w.sleep(s):
		default:
			w.start(s)
		}
	case phaseParked:
		switch {
		case s.batch != nil:
			w.advance(s.batch)
		case s.attempt == 0:
			w.unpark(s)
		case s.sent != s.attempt:
			w.parked(s)
		}
	}
}

// start runs the handler.
func (w *worker) start(s *session) {
	ctx, cancel := context.WithCancel(w.base)
	s.resting = false
	b, c := s.barrier, s.conn
	s.phase, s.frozen, s.barrier, s.cancel = phaseRunning, false, nil, cancel
	c.begin(b)
	w.handlers++
	go func() {
		var err error
		returned := false
		defer func() { // also when the handler panics or calls runtime.Goexit
			if !returned {
				err = w.accident(c, recover())
			}
			c.returns()
			cancel()
			w.in.post(func() {
				w.handlers--
				if s.phase == phaseRunning {
					w.returned(s, err, !returned)
				}
			})
		}()
		c.begins()
		c.rewind()
		err = w.handler.Serve(ctx, c)
		returned = true
	}()
}

// accident reports a handler that did not return: v is what it panicked with.
func (w *worker) accident(c *Conn, v any) error {
	if v == nil {
		return errors.New("the handler ended its goroutine (runtime.Goexit)")
	}
	w.log.Error("handler panicked; its session is closed", "session", c.id, "panic", v, "stack", string(debug.Stack()))
	return fmt.Errorf("handler panicked: %v", v)
}

// returned decides what a handler's return means.
func (w *worker) returned(s *session, err error, panicked bool) {
	s.phase, s.cancel = phaseIdle, nil
	closed, cause := s.conn.ends()
	switch {
	case panicked:
		w.end(s, wire.ReasonHandler, err)
	case closed || !errors.Is(err, ErrMoving):
		reason := reasonOf(err, cause, closed, w.stopping)
		if reason == wire.ReasonHandler {
			w.log.Warn("handler failed; its session is closed", "session", s.id, "error", err)
		}
		w.end(s, reason, firstError(err, cause))
	case !s.frozen:
		w.log.Error("handler returned ErrMoving although no move was wanted; its session is closed", "session", s.id)
		w.end(s, wire.ReasonHandler, err)
	default:
		s.resting = s.resting && s.conn.isTired()
		s.conn.ranOnce()
		w.step(s)
	}
}

func firstError(err, cause error) error {
	if err != nil {
		return err
	}
	return cause
}

// maxUnread bounds the input that a handler may have pushed back, in bytes, with
// what the record layer has opened itself: the state of the record layer must stay
// within what ktls.Import takes, or nobody could continue the session.
const maxUnread = 2 << 20

// park takes an idle session off its Conn.
func (w *worker) park(s *session) {
	if s.lentOut() {
		s.parkLater = true
		return
	}
	if n := s.conn.session().Buffered(); n > maxUnread {
		w.log.Error("session stays here: too much unread input to travel", "session", s.id, "bytes", n, "limit", maxUnread)
		w.giveUp(s)
		return
	}
	rested := s.asleep
	w.leaves(s)
	s.phase = phaseParking
	if k, err, done := s.conn.tryDetach(); done { // as a rule nobody uses it any more
		w.detached(s, k, err, rested)
		return
	}
	go func() {
		k, err := s.conn.detach()
		w.in.post(func() { w.detached(s, k, err, rested) })
	}()
}

// detached goes on with what came of taking a session off its Conn; rested says that it
// was at rest.
func (w *worker) detached(s *session, k *kept, err error, rested bool) {
	if err != nil {
		w.notParked(s, err)
		return
	}
	k.rested = rested
	s.kept, s.phase = k, phaseParked
	if n := len(k.record) + len(k.app); n > wire.MaxCargo-1024 {
		w.log.Error("session stays here: its state is too large to travel", "session", s.id, "bytes", n, "limit", wire.MaxCargo-1024)
		w.giveUp(s)
		return
	}
	w.step(s)
}

// notParked reports a session that could not be taken off its Conn: it had ended
// before, which the handler, sent home, did not see, or its state is in doubt.
func (w *worker) notParked(s *session, err error) {
	reason := reasonOfError(err)
	switch {
	case s.kicked:
		reason = wire.ReasonOperator
	case errors.Is(err, net.ErrClosed):
		reason = wire.ReasonOwner
	case reason == 0:
		reason = wire.ReasonLayer
		w.log.Error("session closed: its state could not be taken", "session", s.id, "error", err)
	}
	w.closed(s, reason, err)
}

// giveUp ends an attempt of which no PARKED has left this process. The supervisor
// learns it from its own time limit; its THAW is then a stale one.
func (w *worker) giveUp(s *session) {
	if s.batch != nil {
		w.cancelBatch(s.batch)
		return
	}
	s.attempt = 0
	w.step(s)
}

// parkedItem is what PARKED says of s. It has its own copy of the record, which the
// sender wipes.
func (s *session) parkedItem() wire.Item {
	s.sent = s.attempt
	var flags wire.Flags
	if s.kept.rested {
		flags = wire.FlagResting
	}
	it := wire.Item{Ref: wire.Ref{ID: s.id, Epoch: s.attempt}, Group: s.group, Flags: flags,
		Cargo: wire.Cargo{Record: slices.Clone(s.kept.record), App: s.kept.app}}
	if s.conn.w.bare {
		it.WithSocket, it.Socket = true, s.kept.duplicate()
	}
	return it
}

// unpark puts a parked session back on its Conn.
func (w *worker) unpark(s *session) {
	k := s.kept
	s.kept, s.phase = nil, phaseImporting
	go func() {
		err := s.conn.attach(k)
		w.in.post(func() {
			if err != nil {
				w.log.Error("session closed: it could not be continued", "session", s.id, "error", err)
				w.closed(s, wire.ReasonLayer, err)
				return
			}
			s.phase, s.resting = phaseIdle, k.rested
			if w.gone != nil && s.conn.session().AwaitsKeys() {
				w.keysStay(s)
				return
			}
			w.step(s)
		})
	}()
}

// end closes a running or idle session.
func (w *worker) end(s *session, reason wire.Reason, err error) {
	w.awake(s)
	s.phase = phaseClosing
	w.leave(s)
	if s.cancel != nil {
		s.cancel()
	}
	go func() {
		s.conn.shut(net.ErrClosed)
		w.in.post(func() { w.closed(s, reason, err) })
	}()
}

// closed forgets a session and reports its end until that is acknowledged.
func (w *worker) closed(s *session, reason wire.Reason, err error) {
	if w.sessions[s.id] != s {
		return
	}
	s.phase = phaseClosing
	w.leave(s)
	delete(w.sessions, s.id)
	w.marks.take(s.conn)
	s.conn.freePlace()
	e := wire.Closed{Ref: wire.Ref{ID: s.id, Epoch: s.owner}, Reason: reason}
	if err != nil {
		e.Text = wire.Clip(err.Error())
	}
	w.log.Debug("session ended", "session", s.id, "reason", reason, "error", err)
	if w.gone == nil {
		w.tombs[s.id] = e
		w.send(&wire.Message{Type: wire.TypeClosed, Closed: []wire.Closed{e}})
	}
}

// leave takes a session that ends, or is no longer ours, out of everything that
// waits for it.
func (w *worker) leave(s *session) {
	if j := s.join; j != nil {
		s.join = nil
		j.done(net.ErrClosed)
	}
	s.conn.leaveBarrier()
	if s.barrier != nil {
		s.barrier.leave(s.conn)
		s.barrier = nil
	}
	if b := s.batch; b != nil {
		s.batch = nil
		delete(b.members, s.id)
		delete(b.thawed, s.id)
		w.advance(b)
	}
}

// forget drops this process's copy of a session that is not ours.
func (w *worker) forget(s *session) {
	w.strand(s)
	s.conn.freePlace()
}

// strand is forget for a session of which nobody may have heard that it is not ours: its
// journal stays, for whoever sees this process dead.
func (w *worker) strand(s *session) {
	delete(w.sessions, s.id)
	w.marks.take(s.conn)
	if s.kept != nil {
		w.unwatch(s)
		s.kept.drop()
		s.kept = nil
	} else {
		s.conn.discard()
	}
	w.leave(s)
}

// stop ends the worker: handlers are asked to return, and in d made to.
func (w *worker) stop(d time.Duration) {
	w.stopping, w.deadline = true, time.Now().Add(d)
	w.cancel()
	for _, s := range w.sessions {
		if s.asleep { // for a last word
			w.awake(s)
			w.start(s)
		}
		if s.phase == phaseRunning {
			s.conn.stop()
		}
	}
}

// kickTime is what sessions get for their close_notify when the time of stop is over.
const kickTime = 2 * time.Second

// stopNow ends what is left when the time of stop is over.
func (w *worker) stopNow() {
	if w.forced {
		w.deadline = time.Time{}
		for _, s := range w.snapshot() {
			s.conn.leavePlace() // it may still be in use: nobody else is to get it
			w.closed(s, wire.ReasonOperator, errors.New("the worker stopped before the session was closed"))
		}
		return
	}
	w.forced, w.deadline = true, time.Now().Add(kickTime)
	for _, s := range w.snapshot() {
		switch s.phase {
		case phaseRunning, phaseIdle:
			w.end(s, wire.ReasonOperator, nil)
		case phaseAdopted:
			w.forget(s) // not ours
		default:
			s.kicked = true
			if s.given() {
				w.forget(s) // whoever owns it goes on
			} else if s.attempt != 0 {
				w.giveUp(s)
			}
		}
	}
}

// snapshot is for loops whose body removes sessions.
func (w *worker) snapshot() []*session {
	l := make([]*session, 0, len(w.sessions))
	for _, s := range w.sessions {
		l = append(l, s)
	}
	return l
}

// given reports that s may have a new owner: PARKED may have left, and no THAW took
// that back (one that did may wait for the THAWs of the rest of its group).
func (s *session) given() bool {
	return s.phase == phaseParked && s.attempt != 0 && s.sent == s.attempt && (s.batch == nil || !s.batch.thawed[s.id])
}

// orphan lets go of what is not ours when there is no supervisor any more, and goes
// on with the rest.
func (w *worker) orphan() {
	for _, s := range w.snapshot() {
		if j := s.join; j != nil {
			s.join = nil
			j.done(ErrSupervisorGone)
		}
		if s.attached() && (s.lentOut() || s.conn.session().AwaitsKeys()) {
			w.keysStay(s)
			continue
		}
		switch {
		case s.phase == phaseAdopted || s.given():
			w.strand(s)
		case s.batch != nil && s.batch.stage != batchParked:
			w.cancelBatch(s.batch)
		case s.batch == nil && s.attempt != 0:
			s.attempt = 0
			if s.phase == phaseRunning {
				s.conn.thaw()
			}
			w.step(s)
		case s.batch != nil:
			// What was given is forgotten, or will be; the rest goes on as if thawed.
			s.batch.thawed[s.id] = true
			w.advance(s.batch)
		}
	}
}
