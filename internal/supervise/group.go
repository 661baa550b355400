package supervise

import (
	"fmt"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// group is a set of sessions that share application state. They live in one
// worker and move as a unit.
type group struct {
	key     groupKey
	home    *worker // nil while its members wait for a worker
	members map[uint64]*session
	move    *groupMove
	waiters []*session // asked to join while the group was under way
}

type groupKey struct {
	pool *pool
	name string
}

// groupMove is an attempt to move a whole group: all of its members, or none.
type groupMove struct {
	g         *group
	from, to  *worker
	dest      *worker // wanted target; nil: least loaded
	members   map[uint64]*attempt
	blob      []byte
	hasBlob   bool
	last      bool // the old worker said that no more members come
	allParked bool
	deadline  time.Time
}

func (s *Supervisor) groupOf(ss *session) *group {
	if ss.group == "" {
		return nil
	}
	return s.groups[groupKey{ss.pool, ss.group}]
}

// joinGroup enters a session, whose group field is set, into its group.
func (s *Supervisor) joinGroup(ss *session) {
	k := groupKey{ss.pool, ss.group}
	g := s.groups[k]
	if g == nil {
		g = &group{key: k, home: ss.owner, members: map[uint64]*session{}}
		s.groups[k] = g
	}
	g.members[ss.id] = ss
	if g.home == nil {
		g.home = ss.owner
	}
}

func (s *Supervisor) leaveGroup(ss *session) {
	g := s.groupOf(ss)
	ss.group = ""
	if g == nil {
		return
	}
	delete(g.members, ss.id)
	s.dropGroupIfEmpty(g)
}

// dropGroupIfEmpty forgets a group without members; who waits to join makes a new
// one.
func (s *Supervisor) dropGroupIfEmpty(g *group) {
	if len(g.members) == 0 && g.move == nil && s.groups[g.key] == g {
		delete(s.groups, g.key)
		s.wakeWaiters(g)
	}
}

// onGroup handles a wish to join or leave a group. A group lives where its first
// member was; others are moved there.
func (s *Supervisor) onGroup(w *worker, m *wire.Message) error {
	ref := m.Refs[0]
	ss := s.sessions[ref.ID]
	if ss == nil || ss.owner != w {
		return fmt.Errorf("%w: GROUP for session %s, which it does not own", wire.ErrProtocol, sid(ref.ID))
	}
	if ss.epoch != ref.Epoch || ss.attempt != nil {
		return nil // it is on its way elsewhere, and asks again there
	}
	if s.quiescing {
		// A successor will be asked again, after its INVENTORY; if none comes about,
		// this supervisor has to answer.
		s.unanswered = append(s.unanswered, func() {
			if s.sessions[ref.ID] == ss && ss.owner == w {
				if err := s.onGroup(w, m); err != nil {
					s.detach(w, err)
				}
			}
		})
		return nil
	}
	if ss.group != m.Group {
		s.leaveGroup(ss)
		s.led.put(ss.slot, ss.slotEntry())
	}
	if m.Group == "" {
		s.grouped(ss, "", "")
		return nil
	}
	s.tryJoin(ss, m.Group)
	return nil
}

func (s *Supervisor) tryJoin(ss *session, name string) {
	w := ss.owner
	k := groupKey{ss.pool, name}
	g := s.groups[k]
	switch {
	case g == nil || g.home == w && g.move == nil:
		ss.group, ss.joinFails = name, 0
		s.joinGroup(ss)
		s.led.put(ss.slot, ss.slotEntry())
		s.grouped(ss, name, "")
	case g.home != nil && g.home.state == workerDetached:
		s.grouped(ss, name, "the worker that has the group cannot be reached any more")
	case g.move != nil || g.home == nil || g.home.state != workerReady:
		ss.wants = name
		g.waiters = append(g.waiters, ss)
	case ss.joinFails >= 3:
		ss.joinFails = 0
		s.grouped(ss, name, "the session could not be moved to the worker that has the group")
	default:
		s.freeze(w, []*session{ss}, g.home)
		ss.attempt.joins = name
	}
}

// joinable says whether an attempt that brings a session to its group still goes
// the right way.
func (s *Supervisor) joinable(a *attempt, to *worker) bool {
	if a.joins == "" {
		return true
	}
	g := s.groups[groupKey{a.s.pool, a.joins}]
	return g == nil || g.home == to && g.move == nil && to.state == workerReady
}

func (s *Supervisor) grouped(ss *session, name, refusal string) {
	s.send(ss.owner, &wire.Message{Type: wire.TypeGrouped, Group: name, Text: wire.Clip(refusal),
		Refs: []wire.Ref{{ID: ss.id, Epoch: ss.epoch}}})
}

// wakeWaiters asks again for those that wanted to join while a group moved.
func (s *Supervisor) wakeWaiters(g *group) {
	s.dropGroupIfEmpty(g)
	list := g.waiters
	g.waiters = nil
	for _, ss := range list {
		name := ss.wants
		ss.wants = ""
		if s.sessions[ss.id] == ss && ss.owner != nil && ss.attempt == nil && name != "" {
			s.tryJoin(ss, name)
		}
	}
}

// freezeGroup begins to move a group away from its home; it returns the number of
// sessions under way.
func (s *Supervisor) freezeGroup(g *group) int {
	from := g.home
	if g.move != nil || from == nil || !from.usable() {
		return 0
	}
	now := s.now()
	for _, ss := range g.members {
		if ss.attempt != nil || ss.owner != from || now.Before(ss.retryAt) {
			return 0
		}
	}
	gm := &groupMove{g: g, from: from, members: map[uint64]*attempt{}, deadline: now.Add(time.Duration(from.pool.cfg.FreezeTimeout))}
	g.move = gm
	s.groupMoves[gm] = struct{}{}
	refs := make([]wire.Ref, 0, len(g.members))
	for _, ss := range g.members {
		a := &attempt{s: ss, from: from, step: stepFreezing, gm: gm, deadline: gm.deadline.Add(time.Hour)}
		s.addAttempt(a)
		gm.members[ss.id] = a
		refs = append(refs, wire.Ref{ID: ss.id, Epoch: a.epoch})
	}
	s.sendGroup(from, wire.TypeFreeze, g.key.name, refs)
	return len(refs)
}

// sendGroup sends refs of one group; Last marks the end.
func (s *Supervisor) sendGroup(w *worker, t wire.Type, name string, refs []wire.Ref) {
	batches := wire.BatchRefs(refs)
	for i, b := range batches {
		s.send(w, &wire.Message{Type: t, Group: name, Refs: b, Last: i == len(batches)-1})
	}
}

func (s *Supervisor) onGroupParked(w *worker, m *wire.Message) error {
	g := s.groups[groupKey{w.pool, m.Group}]
	var gm *groupMove
	if g != nil {
		gm = g.move
	}
	for i := range m.Items {
		it := &m.Items[i]
		ss := s.sessions[it.ID]
		if ss == nil || ss.owner != w {
			return fmt.Errorf("%w: PARKED for session %s, which it does not own", wire.ErrProtocol, sid(it.ID))
		}
		a := ss.attempt
		if gm == nil || gm.from != w || a == nil || a.gm != gm || a.epoch != it.Epoch || a.step != stepFreezing {
			return nil // of an attempt that was given up
		}
		if err := s.parkedKeys(ss); err != nil {
			return err
		}
	}
	if gm == nil || gm.from != w {
		return nil
	}
	for i := range m.Items {
		it := &m.Items[i]
		a := s.sessions[it.ID].attempt
		a.cargo = wire.Cargo{Record: it.Cargo.Record, App: it.Cargo.App}
		a.flags, a.step = wire.FlagRestored, stepParked
	}
	for i := range m.Blobs {
		if m.Blobs[i].Group == m.Group {
			gm.blob, gm.hasBlob = m.Blobs[i].Data, true
		}
	}
	gm.last = gm.last || m.Last
	s.groupProgress(gm)
	return nil
}

// groupProgress takes a group's move to its next step when all members are there.
func (s *Supervisor) groupProgress(gm *groupMove) {
	if _, ok := s.groupMoves[gm]; !ok {
		return
	}
	if len(gm.members) == 0 { // all ended meanwhile
		s.endGroupMove(gm)
		return
	}
	if !gm.allParked {
		for _, a := range gm.members {
			if a.step != stepParked {
				return
			}
		}
		if gm.last {
			s.offerGroup(gm)
		}
		return
	}
	for _, a := range gm.members {
		if !a.adopted {
			return
		}
	}
	s.commitGroup(gm)
}

func (s *Supervisor) offerGroup(gm *groupMove) {
	to := gm.target()
	if to == nil || to == gm.from {
		s.abortGroup(gm, "no worker can take the group")
		return
	}
	gm.to, gm.allParked, gm.deadline = to, true, s.now().Add(adoptTimeout)
	items := make([]wire.Item, 0, len(gm.members))
	for _, a := range gm.members {
		a.to, a.step = to, stepAdopting
		to.incoming++
		items = append(items, s.item(a))
	}
	batches := wire.BatchItems(items)
	for i, b := range batches {
		m := &wire.Message{Type: wire.TypeAdopt, Group: gm.g.key.name, Items: b, Last: i == len(batches)-1}
		if m.Last && gm.hasBlob {
			m.Blobs = []wire.Blob{{Group: gm.g.key.name, Data: gm.blob}}
		}
		s.send(to, m)
	}
}

// commitGroup records every member before any RESUME is sent: a successor that
// finds one member uncommitted knows that none has been resumed.
func (s *Supervisor) commitGroup(gm *groupMove) {
	refs := make([]wire.Ref, 0, len(gm.members))
	for _, a := range gm.members {
		refs = append(refs, wire.Ref{ID: a.s.id, Epoch: a.epoch})
		a.gm = nil
		s.commit(a)
	}
	clear(gm.members)
	gm.g.home = gm.to
	s.sendGroup(gm.to, wire.TypeResume, gm.g.key.name, refs)
	if gm.from != nil {
		s.sendRefs(gm.from, wire.TypeRelease, refs)
	}
	s.endGroupMove(gm)
}

// abortGroup gives the move of a group up: all members go on where they were. If
// that worker is dead, those it parked go on from their parked state elsewhere.
func (s *Supervisor) abortGroup(gm *groupMove, why string) {
	if _, ok := s.groupMoves[gm]; !ok {
		return
	}
	s.log.Warn("group stays", "group", gm.g.key.name, "pool", gm.g.key.pool.name, "sessions", len(gm.members), "why", why)
	if op := gm.g.key.pool.op; op != nil {
		op.reason(why)
	}
	members := make([]*attempt, 0, len(gm.members))
	refs := make([]wire.Ref, 0, len(gm.members))
	for _, a := range gm.members {
		members = append(members, a)
		refs = append(refs, wire.Ref{ID: a.s.id, Epoch: a.epoch})
	}
	clear(gm.members)
	retry := s.now().Add(retryAfter)
	for _, a := range members {
		gm.g.key.pool.stayed(a, why, s.now())
		a.gm = nil
		a.s.retryAt = retry
		s.dropAttempt(a)
		// One that cannot be thawed any more goes on from its parked state.
		if o := a.s.owner; a.step != stepFreezing && (o == nil || o.state == workerDead || o.ch == nil) {
			if o != nil {
				delete(o.sessions, a.s.id)
				a.s.owner, a.s.flags = nil, a.flags
				s.putParked(a.s, a.cargo.Record)
			}
			s.park(a.s, a.cargo, a.flags)
		}
	}
	if gm.to != nil {
		s.sendRefs(gm.to, wire.TypeAbort, refs)
	}
	if gm.from != nil && gm.from.state != workerDead {
		s.sendGroup(gm.from, wire.TypeThaw, gm.g.key.name, refs)
	}
	s.endGroupMove(gm)
}

func (s *Supervisor) endGroupMove(gm *groupMove) {
	delete(s.groupMoves, gm)
	gm.g.move = nil
	s.wakeWaiters(gm.g)
}
