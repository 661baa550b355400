package ownership

import "github.com/ktlsvisor/ktlsvisor/internal/wire"

func (m *Machine) enter(s *Session, key GroupKey) {
	g := m.groups[key]
	if g == nil {
		g = &Group{Key: key, Home: s.Owner, Members: map[uint64]*Session{}}
		m.groups[key] = g
	}
	g.Members[s.ID] = s
	s.Group = g
	if g.Home == nil {
		g.Home = s.Owner
	}
}

func (m *Machine) leave(s *Session) {
	g := s.Group
	if g == nil {
		return
	}
	s.Group = nil
	delete(g.Members, s.ID)
	if g.Move == nil && g.Home != nil && !g.hasOwnedBy(g.Home) {
		g.rehome(g.Home)
	}
	m.dropEmpty(g)
}

// rehome finds a group whose home has none of it any more another one: whoever has some
// of it, if it was split; else it is lost.
func (g *Group) rehome(lost *Worker) {
	for _, s := range sorted(g.Members) {
		if w := s.Owner; w != nil && w != lost && w.Reachable() {
			g.Home = w
			return
		}
	}
	g.Home = lost
	if lost != nil && (lost.dead || g.hasHeld()) {
		g.Home = nil
	}
}

func (g *Group) hasOwnedBy(w *Worker) bool {
	for _, s := range g.Members {
		if s.Owner == w {
			return true
		}
	}
	return false
}

// dropEmpty forgets a group without members.
func (m *Machine) dropEmpty(g *Group) {
	if len(g.Members) == 0 && g.Move == nil && m.groups[g.Key] == g {
		delete(m.groups, g.Key)
		m.emit(Effect{Kind: GroupDone, Move: &GroupMove{Group: g}})
	}
}

// Join enters a session, at the group's home or as its first member, into a group.
func (m *Machine) Join(s *Session, key GroupKey) {
	m.leave(s)
	m.enter(s, key)
	m.emit(Effect{Kind: Put, Session: s})
}

// Leave takes a session out of its group.
func (m *Machine) Leave(s *Session) {
	if s.Group == nil {
		return
	}
	m.leave(s)
	m.emit(Effect{Kind: Put, Session: s})
}

// FreezeGroup begins to move a group away from its home: those members that are
// there. It returns nil if that cannot be now.
func (m *Machine) FreezeGroup(g *Group) *GroupMove {
	from := g.Home
	if g.Move != nil || from == nil || !from.Usable() {
		return nil
	}
	list := make([]*Session, 0, len(g.Members))
	for _, s := range sorted(g.Members) {
		if s.Try != nil || s.Withheld { // also one that is on its way to the home
			return nil
		}
		if s.Owner == from {
			list = append(list, s)
		}
	}
	if len(list) == 0 {
		return nil
	}
	gm := &GroupMove{Group: g, From: from, Members: make(map[uint64]*Session, len(list))}
	g.Move = gm
	m.moves[gm] = struct{}{}
	for i, s := range list {
		t := m.begin(&Try{Session: s, From: from, Step: Freezing, Move: gm})
		gm.Members[s.ID] = s
		m.send(SendFreeze, from, s, t.Epoch, g, i == len(list)-1)
	}
	return gm
}

// GroupParked handles a part of a group's PARKED: all of it or, when it breaks the
// protocol, nothing. blob is the shared state, nil if this part has none; last says
// that no more members come.
func (m *Machine) GroupParked(w *Worker, key GroupKey, refs []wire.Ref, blob []byte, last bool) Verdict {
	var gm *GroupMove
	if g := m.groups[key]; g != nil {
		gm = g.Move
	}
	ours := gm != nil && gm.From == w && !gm.Offered
	for _, r := range refs {
		s := m.lookup(r.ID)
		if s == nil || s.Owner != w {
			return Wrong
		}
		ours = ours && s.Try != nil && s.Try.Move == gm && s.Try.Epoch == r.Epoch && s.Try.Step == Freezing
	}
	if !ours {
		return Late
	}
	for _, r := range refs {
		m.lookup(r.ID).Try.Step = Parked
	}
	if blob != nil {
		gm.Blob = blob
	}
	gm.Last = gm.Last || last
	m.progress(gm)
	return Fine
}

func (m *Machine) keepBlob(g *Group, blob []byte) {
	if blob != nil {
		g.Blob = blob
		m.emit(Effect{Kind: KeepGroup, Group: g})
	}
}

// HoldGroup begins to offer a group that nobody has: those members that are held.
// It returns nil while one of them is in doubt, or there is none.
func (m *Machine) HoldGroup(g *Group) *GroupMove {
	if g.Move != nil || g.Home != nil {
		return nil
	}
	list := make([]*Session, 0, len(g.Members))
	for _, s := range sorted(g.Members) {
		switch {
		case s.Doubt || s.Try != nil:
			return nil
		case s.Owner == nil:
			list = append(list, s)
		}
	}
	if len(list) == 0 {
		return nil
	}
	gm := &GroupMove{Group: g, Members: make(map[uint64]*Session, len(list)), Blob: g.Blob, Last: true}
	g.Move = gm
	m.moves[gm] = struct{}{}
	for _, s := range list {
		m.begin(&Try{Session: s, Step: Parked, Move: gm})
		gm.Members[s.ID] = s
	}
	m.emit(Effect{Kind: GroupReady, Move: gm})
	return gm
}

// progress takes a group's move to its next step when all members are there.
func (m *Machine) progress(gm *GroupMove) {
	if _, ok := m.moves[gm]; !ok {
		return
	}
	if len(gm.Members) == 0 { // all ended meanwhile
		m.endMove(gm)
		return
	}
	for _, s := range gm.Members {
		if gm.Offered && !s.Try.Adopted || !gm.Offered && s.Try.Step != Parked {
			return
		}
	}
	switch {
	case gm.Offered:
		m.commitGroup(gm)
	case gm.Last:
		m.emit(Effect{Kind: GroupReady, Move: gm})
	}
}

// Ready says whether a GroupReady that was emitted still holds.
func (m *Machine) Ready(gm *GroupMove) bool {
	_, ok := m.moves[gm]
	return ok && !gm.Offered && gm.Last && len(gm.Members) > 0
}

// OfferGroup gives a group whose members are all parked to a worker; false if that
// cannot be.
func (m *Machine) OfferGroup(gm *GroupMove, to *Worker) bool {
	if !m.Ready(gm) || to == gm.From || !to.Usable() {
		return false
	}
	gm.To, gm.Offered = to, true
	for _, s := range sorted(gm.Members) {
		m.offer(s.Try, to)
	}
	m.out[len(m.out)-1].Last = true
	return true
}

// commitGroup records every member before any RESUME is sent: whoever finds one
// member uncommitted knows that none has been resumed.
func (m *Machine) commitGroup(gm *GroupMove) {
	list := make([]*Try, 0, len(gm.Members))
	for _, s := range sorted(gm.Members) {
		list = append(list, s.Try)
	}
	clear(gm.Members)
	gm.Group.Home, gm.Group.Blob = gm.To, nil
	for _, t := range list {
		m.commit(t)
	}
	for i, t := range list {
		m.tell(t, gm.Group, i == len(list)-1)
	}
	m.endMove(gm)
}

// UndoGroup gives the move of a group up: all members go on where they were. Those of
// an owner that cannot take them back are held, and the shared state with them.
func (m *Machine) UndoGroup(gm *GroupMove) {
	if _, ok := m.moves[gm]; !ok {
		return
	}
	list := make([]*Try, 0, len(gm.Members))
	for _, s := range sorted(gm.Members) {
		list = append(list, s.Try)
	}
	clear(gm.Members)
	delete(m.moves, gm)
	gm.Group.Move = nil
	if gm.From == nil || !gm.From.Reachable() {
		m.keepBlob(gm.Group, gm.Blob)
	}
	for i, t := range list {
		t.Move = nil
		m.undo(t, gm.Group, i == len(list)-1)
	}
	if gm.From != nil && !gm.From.Reachable() && gm.Group.hasHeld() {
		gm.Group.Home = nil
	}
	m.dropEmpty(gm.Group)
	m.emit(Effect{Kind: GroupDone, Move: gm})
}

func (m *Machine) endMove(gm *GroupMove) {
	delete(m.moves, gm)
	gm.Group.Move = nil
	m.dropEmpty(gm.Group)
	m.emit(Effect{Kind: GroupDone, Move: gm})
}
