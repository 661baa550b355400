package supervise

import (
	"bytes"
	"fmt"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/ownership"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

const (
	// window is how many sessions of one worker are under way at once, at most: pace
	// decides. It bounds the state in flight (the protocol's credit).
	window = 128
	// adoptTimeout bounds how long a worker may take to answer ADOPT.
	adoptTimeout = 10 * time.Second
	// retryAfter is when a session that reached no safe point is asked again.
	retryAfter = 2 * time.Second
	// maxRefusals is how many workers may refuse a session that has no owner to
	// go back to.
	maxRefusals = 8
)

// freeze asks the owner of sessions to bring them to a safe point. dest is the
// wanted new owner; nil leaves the choice for when they are parked.
func (s *Supervisor) freeze(from *worker, list []*session, dest *worker) {
	for _, ss := range list {
		s.freezeOne(from, ss, dest, nil)
	}
}

func (s *Supervisor) freezeOne(from *worker, ss *session, dest *worker, joins *ownership.GroupKey) bool {
	t := s.m.Freeze(&ss.Session, joins)
	if t == nil {
		return false
	}
	t.Began = s.now()
	t.Deadline = t.Began.Add(time.Duration(from.pool.cfg.FreezeTimeout))
	if dest != nil {
		t.Dest = &dest.Worker
	}
	return true
}

// emptyRetiring moves sessions away from workers that are to go, a window's worth
// at a time.
func (s *Supervisor) emptyRetiring(p *pool) {
	now, retiring := s.now(), false
	for _, w := range sortedWorkers(p.workers) {
		if w.state != workerRetiring {
			continue
		}
		retiring = true
		if len(w.Sessions) == 0 && w.Incoming == 0 {
			if p.op == nil {
				s.stopWorker(w, "all its sessions have moved")
			}
			continue
		}
		if !w.usable() || p.target() == nil {
			continue
		}
		// In batches: what every message costs is much more than what a session in it does.
		room := s.pace.window() - s.leaving(w)
		if room < s.pace.window()/2 && room < len(w.Sessions) || now.Before(w.scanAt) {
			continue
		}
		if room = s.throttled(p, room); room <= 0 {
			continue
		}
		before := room
		var list []*session
		for _, ls := range w.Sessions {
			if room <= 0 {
				break
			}
			ss := sessionOf(ls)
			if ss.Try != nil || ss.waits(now) {
				continue
			}
			if g := ss.Group; g != nil {
				if s.freezeStray(w, ss) {
					room--
				} else {
					room -= s.freezeGroup(g)
				}
				continue
			}
			list = append(list, ss)
			room--
		}
		s.freeze(w, list, nil)
		p.asked(before - room)
		if room > 0 { // the rest is to be asked again later: not to be looked through at every event
			w.scanAt = now.Add(tick / 2)
		}
	}
	if !retiring && p.op == nil {
		p.restRate = 0
	}
}

// leaving is how many sessions of a worker are on their way to another.
func (s *Supervisor) leaving(w *worker) (n int) {
	for t := range s.m.Tries() {
		if t.From == &w.Worker {
			n++
		}
	}
	return n
}

// placeParked gives sessions without an owner to workers.
func (s *Supervisor) placeParked(p *pool) {
	if len(p.parked) == 0 {
		return
	}
	now := s.now()
	for _, ss := range p.parked {
		if ss.waits(now) || ss.Try != nil {
			continue
		}
		to := p.targetFor(ss)
		if g := ss.Group; g != nil {
			if g.Home == nil {
				if to != nil {
					s.holdGroup(g)
				}
				continue
			}
			to = workerOf(g.Home)
		}
		if to == nil || !to.usable() || to.Incoming >= 2*window {
			continue
		}
		t := s.m.Offer(&ss.Session, &to.Worker)
		if t == nil {
			continue
		}
		delete(p.parked, ss.ID)
		t.Began, t.Deadline = now, now.Add(adoptTimeout)
	}
}

// onParked takes sessions that reached their safe point and offers them to their
// new owner.
func (s *Supervisor) onParked(w *worker, m *wire.Message) error {
	if m.Group != "" {
		return s.onGroupParked(w, m)
	}
	s.pace.parked(m, s.now())
	for i := range m.Items {
		it := &m.Items[i]
		ss := s.sessions[it.ID]
		if ss == nil || ss.Owner != &w.Worker {
			return fmt.Errorf("%w: PARKED for session %s, which it does not own", wire.ErrProtocol, sid(it.ID))
		}
		if err := s.parkedKeys(ss); err != nil {
			return err
		}
		if s.m.Parked(&w.Worker, it.Ref) != ownership.Fine {
			continue // of an attempt that was given up; its THAW is under way
		}
		ss.edit().cargo = wire.Cargo{Record: it.Cargo.Record, App: it.Cargo.App}
		ss.flags = wire.FlagRestored | it.Flags&wire.FlagResting
		s.offerParked(w, ss)
	}
	return nil
}

// offerParked gives a session that w has parked to another worker.
func (s *Supervisor) offerParked(w *worker, ss *session) {
	t := ss.Try
	if !s.joinable(t, workerOf(t.Dest)) {
		s.giveUp(t, "the group it wants to join has moved")
		return
	}
	to := workerOf(t.Dest)
	if to == nil || !to.usable() {
		to = w.pool.targetFor(ss)
	}
	if to == nil || to == w || s.m.Offer(&ss.Session, &to.Worker) == nil {
		s.refuse(t, "no worker can take it")
		return
	}
	t.Deadline = s.now().Add(adoptTimeout)
}

// onAdopted passes on what a worker can take; with it moves are committed.
func (s *Supervisor) onAdopted(w *worker, m *wire.Message) error {
	s.pace.adopted(m, s.now())
	for _, ref := range m.Refs {
		ss := s.sessions[ref.ID]
		if ss == nil {
			continue // it has ended
		}
		if t := ss.Try; t != nil && t.Move == nil && t.Epoch == ref.Epoch && t.To == &w.Worker && !s.joinable(t, w) {
			s.giveUp(t, "the group it wants to join has moved")
			continue
		}
		s.m.Adopted(&w.Worker, ref)
	}
	return nil
}

// voidParked makes sure that nothing of a parked state is ever used again: from
// here on only the owner knows which bytes and sequence numbers are spent (I5). The
// entry with the owner says so already, unless an earlier supervisor wrote it.
func (s *Supervisor) voidParked(ss *session) {
	if ss.kept != 0 {
		ss.kept = 0
		s.led.put(int(ss.slot), ss.slotEntry())
	}
}

func (s *Supervisor) onRefused(w *worker, m *wire.Message) error {
	for _, r := range m.Refused {
		ss := s.sessions[r.ID]
		if ss == nil || ss.Try == nil || ss.Try.Epoch != r.Epoch || ss.Try.To != &w.Worker {
			continue
		}
		s.refuse(ss.Try, fmt.Sprintf("worker (pid %d): %s", w.pid, printable([]byte(r.Why))))
	}
	return nil
}

// refuse ends an attempt whose target cannot take the session: back to the old
// owner if there is one, else to another worker.
func (s *Supervisor) refuse(t *attempt, why string) {
	if t.Move != nil {
		s.abortGroup(t.Move, why)
		return
	}
	ss := sessionOf(t.Session)
	s.log.Warn("session stays", "session", sid(ss.ID), "pool", ss.pool.name, "why", why)
	s.giveUp(t, why)
}

// giveUp is refuse for one session, without its group.
func (s *Supervisor) giveUp(t *attempt, why string) {
	s.noteRefusal(t, why)
	s.m.Undo(t.Session)
}

// noteRefusal remembers what follows from an attempt that comes to nothing.
func (s *Supervisor) noteRefusal(t *attempt, why string) {
	ss := sessionOf(t.Session)
	ss.pool.stayed(t, why, s.now())
	if t.Step == ownership.Offered {
		m := ss.edit()
		m.refusedBy = append(m.refusedBy, t.To.ID)
	}
	ss.retryAt = momentOf(s.now().Add(retryAfter))
	if t.Joins != nil {
		ss.edit().joinFails++
	}
	if t.From == nil {
		ss.edit().refused = why
	}
}

// park keeps a session without an owner until a worker takes it.
func (s *Supervisor) park(ss *session, c wire.Cargo, flags wire.Flags) {
	ss.edit().cargo, ss.flags = c, flags
	ss.pool.parked[ss.ID] = ss
}

func (s *Supervisor) attemptTimedOut(t *attempt) {
	switch {
	case t.Move != nil: // the group has its own limit
	case t.Step != ownership.Offered:
		s.giveUp(t, "no safe point within freeze_timeout")
	default:
		to := workerOf(t.To)
		to.deaf = true
		s.refuse(t, "the new worker did not answer in time")
		if op := to.pool.op; op != nil && to.gen == op.to && op.phase == opMoving && to.pool.target() == nil {
			s.failUpgrade(op, fmt.Errorf("worker (pid %d) of generation %d does not answer, and there is no other", to.pid, to.gen))
		}
	}
}

// refuseFor ends the attempts whose target is dead or cannot be reached.
func (s *Supervisor) refuseFor(w *worker, why string) {
	s.noteOffered(w)
	for gm := range s.m.Moves() {
		if gm.To == &w.Worker {
			s.abortGroup(gm, why)
		}
	}
	for t := range s.m.Tries() {
		if t.Move == nil && t.To == &w.Worker {
			s.refuse(t, why)
		}
	}
}

// settle finds out what has become of a session whose owner has been seen dead while
// it served: what the owner left behind says how far it came, see estate.go.
func (s *Supervisor) settle(ss *session, owner uint64) {
	switch {
	case ss.Ended:
	case ss.away:
		s.m.SettledLost(&ss.Session, goneWithWorker)
	default:
		s.inherit(ss, owner)
	}
}

// putParked records a session without an owner, with the record state that it
// was parked with, so that it outlives the supervisor as well.
func (s *Supervisor) putParked(ss *session, rec []byte) {
	ss.kept = 0
	if len(rec) == 0 {
		return
	}
	if !ss.software {
		b, err := s.led.base(int(ss.slot))
		if err == nil && bytes.Equal(b, rec) {
			return // the ledger has it
		}
	}
	var err error
	if ss.kept, err = s.led.keepRecord(ss.ID, rec); err != nil {
		s.log.Warn("the state of a parked session is not kept over a restart of the supervisor", "session", sid(ss.ID), "error", err)
	}
}
