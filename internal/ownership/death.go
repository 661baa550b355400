package ownership

// Cut says that a worker can no longer be talked to: its channel has ended. It may be
// alive; then it goes on with what it owns and forgets what it had parked or adopted.
// read says that everything it had sent was handled. One of which nobody knows any more
// what it serves is to be killed.
func (m *Machine) Cut(w *Worker, read bool) {
	if w.cut || w.dead {
		return
	}
	unsure := w.unsure(read)
	w.cut = true
	for _, gm := range m.sortedMoves() {
		switch {
		case gm.To == w:
			m.UndoGroup(gm)
		case gm.From != w:
		case gm.Offered:
			m.goOnWithout(gm)
		default:
			m.UndoGroup(gm)
		}
	}
	for _, t := range m.sortedTries() {
		switch {
		case t.Move != nil:
		case t.To == w, t.From == w && t.Step == Freezing:
			m.undo(t, nil, false)
		case t.From == w:
			t.From = nil
			m.unowned(t.Session)
		}
	}
	// Members that it parked are held now; they need not wait for it to end.
	for _, g := range m.groups {
		if g.Home == w && g.hasHeld() {
			g.rehome(w)
		}
	}
	if unsure {
		m.emit(Effect{Kind: Kill, Worker: w})
	}
	m.emit(Effect{Kind: Detached, Worker: w})
	m.resumeWithheld(false)
}

func (g *Group) hasHeld() bool {
	for _, s := range g.Members {
		if s.Owner == nil {
			return true
		}
	}
	return false
}

// goOnWithout continues the move of a group whose owner has parked all of it and
// can no longer take it back.
func (m *Machine) goOnWithout(gm *GroupMove) {
	gm.From = nil
	gm.Group.Home = nil
	m.keepBlob(gm.Group, gm.Blob)
	for _, s := range sorted(gm.Members) {
		s.Try.From = nil
		m.unowned(s)
	}
}

// Dead says that a worker has been seen dead and that everything it had sent was
// handled. Only now may its sessions get another owner (I1).
func (m *Machine) Dead(w *Worker) {
	if w.dead {
		return
	}
	m.Cut(w, true)
	w.dead = true
	for _, g := range m.groups {
		if g.Home == w {
			g.rehome(w)
		}
	}
	for _, s := range sorted(w.Sessions) {
		m.settleWithheld(s)
		m.give(s, nil)
		s.Doubt = true
		m.emit(Effect{Kind: Settle, Session: s, Worker: w})
	}
	m.resumeWithheld(false)
}

// SettledHeld says that a session in doubt can go on: the driver has its record
// state.
func (m *Machine) SettledHeld(s *Session) {
	if s.Ended || !s.Doubt {
		return
	}
	s.Doubt = false
	m.emit(Effect{Kind: Keep, Session: s})
	m.emit(Effect{Kind: Put, Session: s})
	if g := s.Group; g != nil && g.Move != nil {
		m.progress(g.Move)
	} else if g != nil && g.Home != nil && !g.Home.Reachable() {
		g.rehome(g.Home)
	}
}

// SettledGone says that the connection of a session in doubt has ended.
func (m *Machine) SettledGone(s *Session) { m.end(s, Effect{How: Gone}) }

// SettledLost says that a session in doubt cannot go on.
func (m *Machine) SettledLost(s *Session, why string) { m.end(s, Effect{How: Lost, Why: why}) }
