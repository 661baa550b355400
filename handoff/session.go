package handoff

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"

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
