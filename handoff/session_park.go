package handoff

import (
	"errors"
	"net"
	"slices"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

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
	k.app = slices.Clone(k.app) // PARKED has these very bytes, and may still be on its way
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
