package supervise

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/ownership"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// A group is a set of sessions that share application state. They live in one worker
// and move as a unit; internal/ownership sees to that. Here is who may join, and when
// and where to a group goes.

func (p *pool) groupKey(name string) ownership.GroupKey {
	return ownership.GroupKey{Pool: p.name, Name: name}
}

// onGroup handles a wish to join or leave a group. A group lives where its first
// member was; others are moved there.
func (s *Supervisor) onGroup(w *worker, m *wire.Message) error {
	ref := m.Refs[0]
	ss := s.sessions[ref.ID]
	if ss == nil || ss.Owner != &w.Worker {
		return fmt.Errorf("%w: GROUP for session %s, which it does not own", wire.ErrProtocol, sid(ref.ID))
	}
	if ss.Epoch != ref.Epoch || ss.Try != nil || ss.Withheld {
		return nil // it is on its way elsewhere, and asks again there
	}
	if s.quiescing {
		// A successor will be asked again, after its INVENTORY; if none comes about,
		// this supervisor has to answer.
		if s.unanswered == nil {
			s.unanswered = map[uint64]func(){}
		}
		s.unanswered[ref.ID] = func() { // the last one counts
			if s.sessions[ref.ID] == ss && ss.Owner == &w.Worker {
				if err := s.onGroup(w, m); err != nil {
					s.detach(w, err)
				}
			}
		}
		return nil
	}
	if ss.rare().wants != m.Group {
		s.waitNoMore(ss)
	}
	if ss.groupName() != m.Group {
		s.m.Leave(&ss.Session)
	}
	if m.Group == "" {
		s.grouped(ss, "", "")
		return nil
	}
	s.tryJoin(ss, m.Group)
	return nil
}

func (s *Supervisor) tryJoin(ss *session, name string) {
	w, k := ss.owner(), ss.pool.groupKey(name)
	g := s.m.Groups()[k]
	var home *worker
	if g != nil {
		home = workerOf(g.Home)
	}
	switch {
	case g == nil || home == w && g.Move == nil && !s.m.Split(g):
		if ss.more != nil {
			ss.more.joinFails = 0
			ss.slim()
		}
		if ss.Group == nil {
			s.m.Join(&ss.Session, k)
		}
		s.carryOut() // it is a member before it is told so
		s.grouped(ss, name, "")
	case home != nil && home.state == workerDetached:
		s.grouped(ss, name, "the worker that has the group cannot be reached any more")
	case !s.atRest(g) || !w.Usable():
		s.waitFor(ss, name)
	case ss.rare().joinFails >= 3:
		ss.edit().joinFails = 0
		s.grouped(ss, name, "the session could not be moved to the worker that has the group")
	default:
		if !s.freezeOne(w, ss, home, &k) {
			s.waitFor(ss, name) // for other members on their way there
		}
	}
}

// atRest says whether others can be moved to a group.
func (s *Supervisor) atRest(g *ownership.Group) bool {
	home := workerOf(g.Home)
	return g.Move == nil && !s.m.Split(g) && home != nil && home.state == workerReady && home.usable()
}

// joinable says whether an attempt that brings a session to the group it wants to join
// still goes the right way.
func (s *Supervisor) joinable(t *attempt, to *worker) bool {
	if t.Joins == nil {
		return true
	}
	return s.m.Groups()[*t.Joins] == nil || to.state == workerReady && s.m.Joinable(t, &to.Worker)
}

func (s *Supervisor) grouped(ss *session, name, refusal string) {
	s.send(ss.owner(), &wire.Message{Type: wire.TypeGrouped, Group: name, Text: wire.Clip(refusal),
		Refs: []wire.Ref{{ID: ss.ID, Epoch: ss.Epoch}}})
}

// waitFor has a session wait until a group has come to rest: for one at a time.
func (s *Supervisor) waitFor(ss *session, name string) {
	if ss.rare().wants == name {
		return // it waits already
	}
	s.waitNoMore(ss)
	ss.edit().wants = name
	k := ss.pool.groupKey(name)
	if s.waiters[k] == nil {
		s.waiters[k] = map[uint64]*session{}
	}
	s.waiters[k][ss.ID] = ss
}

// waitNoMore forgets that a session wanted to join a group: it wants something else now,
// has ended, or has another owner, who asks by itself.
func (s *Supervisor) waitNoMore(ss *session) {
	name := ss.rare().wants
	if name == "" {
		return
	}
	k := ss.pool.groupKey(name)
	delete(s.waiters[k], ss.ID)
	if len(s.waiters[k]) == 0 {
		delete(s.waiters, k)
	}
	ss.more.wants = ""
	ss.slim()
}

// wakeWaiters asks again for those that wanted to join while a group was under way.
func (s *Supervisor) wakeWaiters(k ownership.GroupKey) {
	list := s.waiters[k]
	for _, id := range slices.Sorted(maps.Keys(list)) {
		ss := list[id]
		if ss == nil {
			continue // it ended over another one's
		}
		s.waitNoMore(ss)
		if ss.Owner != nil && ss.Try == nil {
			s.tryJoin(ss, k.Name)
		}
	}
}

// wakeLater has those asked again whose group came to rest without a move: its home was
// to be emptied and is not any more, or cannot be reached now.
func (s *Supervisor) wakeLater() {
	if s.recovery != nil || s.quiescing {
		return
	}
	for k := range s.waiters {
		g := s.m.Groups()[k]
		if g == nil || s.atRest(g) || g.Home != nil && workerOf(g.Home).state == workerDetached {
			s.awake = append(s.awake, k)
		}
	}
}

// freezeStray moves a member that is not at its group's home, as after a move that was
// committed in part, to it. It says whether it is one.
func (s *Supervisor) freezeStray(w *worker, ss *session) bool {
	g := ss.Group
	if g.Home == nil || g.Home == &w.Worker {
		return false
	}
	if s.atRest(g) {
		s.freezeOne(w, ss, workerOf(g.Home), &g.Key)
	}
	return true
}

// freezeGroup begins to move a group away from its home; it returns the number of
// sessions under way.
func (s *Supervisor) freezeGroup(g *ownership.Group) int {
	from := workerOf(g.Home)
	if g.Move != nil || from == nil || !from.usable() {
		return 0
	}
	now := s.now()
	for _, ls := range g.Members {
		if sessionOf(ls).waits(now) {
			return 0
		}
	}
	gm := s.m.FreezeGroup(g)
	if gm == nil {
		return 0
	}
	gm.Deadline = now.Add(time.Duration(from.pool.cfg.FreezeTimeout))
	for _, ls := range gm.Members {
		ls.Try.Began = now
	}
	return len(gm.Members)
}

// holdGroup offers a group that no worker has, as a unit like any other, with the
// shared state that the last one left.
func (s *Supervisor) holdGroup(g *ownership.Group) {
	now := s.now()
	for _, ls := range g.Members {
		if ss := sessionOf(ls); ss.Owner == nil && !ss.Doubt && ss.pool.parked[ss.ID] == nil {
			return // the keeper does not have it yet
		}
	}
	if !s.stateReady(g) {
		return
	}
	gm := s.m.HoldGroup(g)
	if gm == nil {
		return
	}
	s.stateOffered(g)
	gm.Deadline = now.Add(adoptTimeout)
	for id, ls := range gm.Members {
		ls.Try.Began = now
		delete(sessionOf(ls).pool.parked, id)
	}
}

func (s *Supervisor) onGroupParked(w *worker, m *wire.Message) error {
	refs := make([]wire.Ref, 0, len(m.Items))
	for i := range m.Items {
		it := &m.Items[i]
		ss := s.sessions[it.ID]
		if ss == nil || ss.Owner != &w.Worker {
			return fmt.Errorf("%w: PARKED for session %s, which it does not own", wire.ErrProtocol, sid(it.ID))
		}
		if t := ss.Try; t != nil && t.Epoch == it.Epoch && t.Step == ownership.Freezing {
			if err := s.parkedKeys(ss); err != nil {
				return err
			}
		}
		refs = append(refs, it.Ref)
	}
	var blob []byte
	for i := range m.Blobs {
		if m.Blobs[i].Group == m.Group {
			blob = m.Blobs[i].Data
			if blob == nil {
				blob = []byte{}
			}
		}
	}
	if s.m.GroupParked(&w.Worker, w.pool.groupKey(m.Group), refs, blob, m.Last) != ownership.Fine {
		return nil // of an attempt that was given up
	}
	if k := w.pool.groupKey(m.Group); blob != nil && s.groupStates[k] != nil {
		s.keepGroup(k, blob)
	}
	for i := range m.Items {
		it := &m.Items[i]
		ss := s.sessions[it.ID]
		ss.edit().cargo = wire.Cargo{Record: it.Cargo.Record, App: it.Cargo.App}
		ss.flags = wire.FlagRestored | it.Flags&wire.FlagResting
	}
	return nil
}

// offerGroup gives a group whose members are all parked to a worker.
func (s *Supervisor) offerGroup(gm *ownership.GroupMove) {
	if !s.m.Ready(gm) {
		return
	}
	to := s.groupTarget(gm)
	if to == nil || !s.m.OfferGroup(gm, &to.Worker) {
		s.abortGroup(gm, "no worker can take the group")
		return
	}
	gm.Deadline = s.now().Add(adoptTimeout)
}

// groupTarget is the worker that a group goes to.
func (s *Supervisor) groupTarget(gm *ownership.GroupMove) *worker {
	for _, ls := range gm.Members { // what one was refused by, all were
		ss := sessionOf(ls)
		if w := workerOf(gm.Dest); w != nil && ss.pool.takes(w, w.gen) {
			return w
		}
		return ss.pool.targetFor(ss)
	}
	return nil
}

// abortGroup gives the move of a group up: all members go on where they were. If
// that worker is dead, those it parked go on from their parked state elsewhere.
func (s *Supervisor) abortGroup(gm *ownership.GroupMove, why string) {
	s.log.Warn("group stays", "group", gm.Group.Key.Name, "pool", gm.Group.Key.Pool, "sessions", len(gm.Members), "why", why)
	first := true
	for _, ls := range gm.Members {
		ss := sessionOf(ls)
		if op := ss.pool.op; first && op != nil { // one word is enough
			op.reason(why)
		}
		first = false
		s.noteRefusal(ls.Try, why)
	}
	s.m.UndoGroup(gm)
}
