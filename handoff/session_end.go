package handoff

import (
	"errors"
	"net"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

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
