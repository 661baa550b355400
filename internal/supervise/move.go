package supervise

import (
	"fmt"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
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

// addAttempt begins an attempt; its session has none.
func (s *Supervisor) addAttempt(a *attempt) {
	a.epoch, a.began = s.nextEpoch(), s.now()
	a.s.attempt = a
	s.attempts[a] = struct{}{}
	if a.to != nil {
		a.to.incoming++
	}
}

// dropAttempt forgets an attempt without telling anyone.
func (s *Supervisor) dropAttempt(a *attempt) {
	if a.s.attempt != a {
		return
	}
	a.s.attempt = nil
	delete(s.attempts, a)
	if a.to != nil {
		a.to.incoming--
	}
	if a.gm != nil {
		delete(a.gm.members, a.s.id)
		s.groupProgress(a.gm)
	}
}

// freeze asks the owner of sessions to bring them to a safe point. dest is the
// wanted new owner; nil leaves the choice for when they are parked.
func (s *Supervisor) freeze(from *worker, list []*session, dest *worker) {
	refs := make([]wire.Ref, 0, len(list))
	for _, ss := range list {
		a := &attempt{s: ss, from: from, step: stepFreezing, dest: dest,
			deadline: s.now().Add(time.Duration(from.pool.cfg.FreezeTimeout))}
		s.addAttempt(a)
		refs = append(refs, wire.Ref{ID: ss.id, Epoch: a.epoch})
	}
	s.sendRefs(from, wire.TypeFreeze, refs)
}

// emptyRetiring moves sessions away from workers that are to go, a window's worth
// at a time.
func (s *Supervisor) emptyRetiring(p *pool) {
	now := s.now()
	for _, w := range sortedWorkers(p.workers) {
		if w.state != workerRetiring {
			continue
		}
		if len(w.sessions) == 0 && w.incoming == 0 {
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
		if room < s.pace.window()/2 && room < len(w.sessions) || now.Before(w.scanAt) {
			continue
		}
		var list []*session
		for _, ss := range w.sessions {
			if room <= 0 {
				break
			}
			if ss.attempt != nil || now.Before(ss.retryAt) {
				continue
			}
			if g := s.groupOf(ss); g != nil {
				room -= s.freezeGroup(g)
				continue
			}
			list = append(list, ss)
			room--
		}
		if len(list) > 0 {
			s.freeze(w, list, nil)
		}
		if room > 0 { // the rest is to be asked again later: not to be looked through at every event
			w.scanAt = now.Add(tick / 2)
		}
	}
}

// leaving is how many sessions of a worker are on their way to another.
func (s *Supervisor) leaving(w *worker) (n int) {
	for a := range s.attempts {
		if a.from == w {
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
	items := map[*worker][]wire.Item{}
	for _, ss := range p.parked {
		if now.Before(ss.retryAt) {
			continue
		}
		to := p.targetFor(ss)
		if g := s.groupOf(ss); g != nil {
			if g.home == nil {
				g.home = to
			}
			to = g.home
		}
		if to == nil || !to.usable() || to.incoming >= 2*window {
			continue
		}
		a := &attempt{s: ss, to: to, step: stepAdopting, cargo: ss.cargo, flags: ss.flags, deadline: now.Add(adoptTimeout)}
		delete(p.parked, ss.id)
		ss.cargo = wire.Cargo{}
		s.addAttempt(a)
		items[to] = append(items[to], s.item(a))
	}
	for w, list := range items {
		s.adopt(w, list)
	}
}

// item is what the target of an attempt gets.
func (s *Supervisor) item(a *attempt) wire.Item {
	it := wire.Item{Ref: wire.Ref{ID: a.s.id, Epoch: a.epoch}, Group: a.s.group, Flags: a.flags,
		Cargo: wire.Cargo{Facts: a.s.facts(s.led), Record: a.cargo.Record, App: a.cargo.App}}
	if a.joins != "" {
		it.Group = a.joins
	}
	return it
}

func (s *Supervisor) adopt(to *worker, items []wire.Item) {
	for _, batch := range wire.BatchItems(items) {
		s.send(to, &wire.Message{Type: wire.TypeAdopt, Items: batch})
	}
}

// onParked takes sessions that reached their safe point and offers them to their
// new owner.
func (s *Supervisor) onParked(w *worker, m *wire.Message) error {
	if m.Group != "" {
		return s.onGroupParked(w, m)
	}
	s.pace.parked(m, s.now())
	items := map[*worker][]wire.Item{}
	for i := range m.Items {
		it := &m.Items[i]
		ss := s.sessions[it.ID]
		if ss == nil || ss.owner != w {
			return fmt.Errorf("%w: PARKED for session %s, which it does not own", wire.ErrProtocol, sid(it.ID))
		}
		if err := s.parkedKeys(ss); err != nil {
			return err
		}
		a := ss.attempt
		if a == nil || a.epoch != it.Epoch || a.step != stepFreezing || a.gm != nil {
			continue // of an attempt that was given up; its THAW is under way
		}
		a.cargo = wire.Cargo{Record: it.Cargo.Record, App: it.Cargo.App}
		a.flags = wire.FlagRestored | it.Flags&wire.FlagResting
		if !s.joinable(a, a.dest) {
			s.giveUp(a, "the group it wants to join has moved")
			continue
		}
		to := a.dest
		if to == nil || !to.usable() {
			to = w.pool.targetFor(ss)
		}
		if to == nil || to == w {
			s.refuse(a, "no worker can take it")
			continue
		}
		a.to, a.step, a.deadline = to, stepAdopting, s.now().Add(adoptTimeout)
		to.incoming++
		items[to] = append(items[to], s.item(a))
	}
	for to, list := range items {
		s.adopt(to, list)
	}
	return nil
}

// onAdopted commits: from here on the new worker owns the session, whatever dies.
func (s *Supervisor) onAdopted(w *worker, m *wire.Message) error {
	s.pace.adopted(m, s.now())
	var resume []wire.Ref
	release := map[*worker][]wire.Ref{}
	for _, ref := range m.Refs {
		ss := s.sessions[ref.ID]
		if ss == nil || ss.attempt == nil || ss.attempt.epoch != ref.Epoch || ss.attempt.to != w || ss.attempt.step != stepAdopting {
			continue // late: ABORT is under way, or the session is gone
		}
		a := ss.attempt
		if a.gm != nil {
			a.adopted = true
			s.groupProgress(a.gm)
			continue
		}
		if !s.joinable(a, w) {
			s.giveUp(a, "the group it wants to join has moved")
			continue
		}
		from := a.from
		s.commit(a)
		resume = append(resume, ref)
		if from != nil {
			release[from] = append(release[from], ref)
		}
	}
	s.sendRefs(w, wire.TypeResume, resume)
	for from, refs := range release {
		s.sendRefs(from, wire.TypeRelease, refs)
	}
	return nil
}

// commit records the new owner. After it, and only after it, RESUME may be sent.
func (s *Supervisor) commit(a *attempt) {
	ss, now := a.s, s.now()
	if a.from != nil {
		delete(a.from.sessions, ss.id)
		ss.moves++
		s.led.count(cntMoved, 1)
		if op := ss.pool.op; op != nil {
			op.committed(a, now)
		}
		if ss.pool.op != nil && a.to.gen < a.from.gen {
			s.led.count(cntReturned, 1)
		}
	}
	delete(ss.pool.stays, ss.id)
	s.settled(ss)
	ss.owner, ss.epoch, ss.refusals, ss.flags, ss.refusedBy = a.to, a.epoch, 0, 0, nil
	a.to.sessions[ss.id] = ss
	if !ss.software {
		k := s.led.keys(ss.slot, ktls.Receiving)
		ss.rxBase = k.gen
		k.wipe()
	}
	if a.joins != "" {
		ss.group = a.joins
		s.joinGroup(ss)
	}
	s.led.put(ss.slot, ss.slotEntry())
	s.voidParked(ss) // after the commit: a crash between the two must leave one or the other
	a.gm = nil
	s.dropAttempt(a)
	wipe(a.cargo.Record)
	if g := s.groupOf(ss); g != nil {
		s.joinGroup(ss)
		if g.home == ss.owner && g.move == nil && len(g.waiters) > 0 {
			s.wakeWaiters(g) // it has found a home
		}
	}
}

// voidParked makes sure that nothing of a parked state is ever used again: from
// here on only the owner knows which bytes and sequence numbers are spent (I5).
func (s *Supervisor) voidParked(ss *session) {
	if ss.software {
		s.led.voidRecord(ss.slot, ss.software)
		return
	}
	r, err := s.led.record(ss.slot, ss.software)
	if err != nil || r.Parked == nil {
		return
	}
	r.Parked = nil
	if err := s.led.putRecord(ss.slot, ss.software, r); err != nil {
		s.led.voidRecord(ss.slot, ss.software)
		s.log.Error("session cannot be adopted after a crash of its worker", "session", sid(ss.id), "error", err)
	}
}

func (s *Supervisor) onRefused(w *worker, m *wire.Message) error {
	for _, r := range m.Refused {
		ss := s.sessions[r.ID]
		if ss == nil || ss.attempt == nil || ss.attempt.epoch != r.Epoch || ss.attempt.to != w {
			continue
		}
		s.refuse(ss.attempt, fmt.Sprintf("worker (pid %d): %s", w.pid, printable([]byte(r.Why))))
	}
	return nil
}

// refuse ends an attempt whose target cannot take the session: back to the old
// owner if there is one, else to another worker.
func (s *Supervisor) refuse(a *attempt, why string) {
	if a.gm != nil {
		s.abortGroup(a.gm, why)
		return
	}
	s.log.Warn("session stays", "session", sid(a.s.id), "pool", a.s.pool.name, "why", why)
	s.giveUp(a, why)
}

// giveUp is refuse for one session, without its group: ABORT to the target, THAW
// to the owner.
func (s *Supervisor) giveUp(a *attempt, why string) {
	ss := a.s
	ss.pool.stayed(a, why, s.now())
	if a.to != nil && a.step == stepAdopting {
		s.sendRefs(a.to, wire.TypeAbort, []wire.Ref{{ID: ss.id, Epoch: a.epoch}})
		ss.refusedBy = append(ss.refusedBy, a.to.id)
	}
	ss.retryAt = s.now().Add(retryAfter)
	if a.joins != "" {
		ss.joinFails++
	}
	s.dropAttempt(a)
	if a.from != nil {
		s.sendRefs(a.from, wire.TypeThaw, []wire.Ref{{ID: ss.id, Epoch: a.epoch}})
		return
	}
	if p := ss.pool; p.starting == 0 && p.op == nil && p.restartAt.IsZero() && p.count(p.serving, workerReady) >= p.cfg.Workers {
		ss.refusals++ // nobody else is to come who might take it
	}
	if ss.refusals >= maxRefusals {
		wipe(a.cargo.Record)
		s.lose(ss, fmt.Sprintf("no worker could take it (%d tried); the last said: %s", ss.refusals, why))
		return
	}
	ss.retryAt = s.now().Add(min(100*time.Millisecond<<ss.refusals, 2*time.Second))
	s.park(ss, a.cargo, a.flags)
}

// park keeps a session without an owner until a worker takes it.
func (s *Supervisor) park(ss *session, c wire.Cargo, flags wire.Flags) {
	ss.cargo, ss.flags = c, flags
	ss.pool.parked[ss.id] = ss
}

func (s *Supervisor) attemptTimedOut(a *attempt) {
	switch {
	case a.gm != nil: // the group has its own limit
	case a.step == stepFreezing:
		s.giveUp(a, "no safe point within freeze_timeout")
	default:
		to := a.to
		to.deaf = true
		s.refuse(a, "the new worker did not answer in time")
		if op := to.pool.op; op != nil && to.gen == op.to && op.phase == opMoving && to.pool.target() == nil {
			s.failUpgrade(op, fmt.Errorf("worker (pid %d) of generation %d does not answer, and there is no other", to.pid, to.gen))
		}
	}
}

// abortAttemptsOf ends the attempts that need a worker which is dead or detached.
func (s *Supervisor) abortAttemptsOf(w *worker, why string) {
	for gm := range s.groupMoves {
		if gm.to == w || gm.from == w && !gm.allParked {
			s.abortGroup(gm, why)
		}
	}
	for a := range s.attempts {
		switch {
		case a.gm != nil:
		case a.to == w:
			s.refuse(a, why)
		case a.from == w && a.step == stepFreezing:
			s.giveUp(a, why)
		}
	}
}

// orphan takes a session from an owner that has been seen dead. One that was
// parked goes on from its parked state. Otherwise what the owner left behind says how
// far it came: see estate.go.
func (s *Supervisor) orphan(ss *session, w *worker) {
	delete(w.sessions, ss.id)
	ss.owner = nil
	if g := s.groupOf(ss); g != nil && g.home == w {
		g.home = nil
	}
	if a := ss.attempt; a != nil {
		a.from = nil // parked: the attempt goes on; its cargo is here
		ss.flags = a.flags
		s.putParked(ss, a.cargo.Record)
		return
	}
	s.inherit(ss, w.id)
}

// putParked records a session without an owner, with the record state that it
// was parked with, so that it outlives the supervisor as well.
func (s *Supervisor) putParked(ss *session, rec []byte) {
	r, err := s.led.record(ss.slot, ss.software)
	if err != nil {
		r = &record{}
	}
	r.Parked = rec
	if err := s.led.putRecord(ss.slot, ss.software, r); err != nil {
		s.log.Warn("the state of a parked session is not kept over a restart of the supervisor", "session", sid(ss.id), "error", err)
	}
	s.led.put(ss.slot, ss.slotEntry())
}
