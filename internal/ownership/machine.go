package ownership

import "github.com/ktlsvisor/ktlsvisor/internal/wire"

// Verdict is what an answer of a worker was.
type Verdict uint8

// Fine changed something. Late is of an attempt that is no longer in force: nothing
// changed, and whoever sent it will be told or was told already. Wrong breaks the
// protocol: the worker speaks about a session that it does not own.
const (
	Fine Verdict = iota
	Late
	Wrong
)

// Machine is the ledger. It is not safe for concurrent use: one goroutine owns it.
type Machine struct {
	lookup      func(id uint64) *Session
	before      func(id uint64) (owner uint64, epoch wire.Epoch)
	withheld    map[uint64]*Session // see split.go
	strays      int                 // attempts that move one member of a group without the others
	groups      map[GroupKey]*Group
	tries       map[*Try]struct{}
	moves       map[*GroupMove]struct{}
	incarnation uint32
	epochs      uint32
	out         []Effect
	head        int
}

// New makes an empty machine. incarnation is a number that no earlier machine over
// the same sessions had, higher than theirs. lookup finds a session that was entered
// with Admit or Restore and has not ended, nil for any other. before says what the Put
// before the last one of such a session said: the owner, 0 for nobody or if that is not
// known, and the epoch.
func New(incarnation uint32, lookup func(id uint64) *Session, before func(id uint64) (owner uint64, epoch wire.Epoch)) *Machine {
	return &Machine{incarnation: incarnation, lookup: lookup, before: before,
		groups: map[GroupKey]*Group{}, tries: map[*Try]struct{}{}, moves: map[*GroupMove]struct{}{}}
}

// Groups returns the groups that have members.
func (m *Machine) Groups() map[GroupKey]*Group { return m.groups }

// Tries returns the attempts under way.
func (m *Machine) Tries() map[*Try]struct{} { return m.tries }

// Moves returns the moves of groups under way.
func (m *Machine) Moves() map[*GroupMove]struct{} { return m.moves }

// Idle says whether no attempt is under way.
func (m *Machine) Idle() bool { return len(m.tries) == 0 && len(m.moves) == 0 }

func (m *Machine) nextEpoch() wire.Epoch {
	m.epochs++
	return wire.NewEpoch(m.incarnation, m.epochs)
}

// Admit enters a new session, which nobody owns, with the record state of its
// handshake.
func (m *Machine) Admit(s *Session) {
	s.Epoch = m.nextEpoch()
	m.emit(Effect{Kind: Put, Session: s})
}

// Restore enters a session as an earlier machine left it: owner is who the last Put
// named, nil if nobody or if it is dead.
func (m *Machine) Restore(s *Session, owner *Worker, group *GroupKey) {
	if owner != nil {
		m.give(s, owner)
	}
	if group != nil {
		m.enter(s, *group)
	}
}

// Orphan says that the recorded owner of a restored session is dead.
func (m *Machine) Orphan(s *Session, owner *Worker) {
	s.Doubt = true
	m.emit(Effect{Kind: Settle, Session: s, Worker: owner})
}

func (m *Machine) give(s *Session, w *Worker) {
	if s.Owner != nil {
		delete(s.Owner.Sessions, s.ID)
	}
	s.Owner = w
	if w != nil {
		if w.Sessions == nil {
			w.Sessions = map[uint64]*Session{}
		}
		w.Sessions[s.ID] = s
	}
}

func (m *Machine) begin(t *Try) *Try {
	t.Epoch = m.nextEpoch()
	t.Session.Try = t
	m.tries[t] = struct{}{}
	return t
}

// drop forgets an attempt; nobody is told.
func (m *Machine) drop(t *Try) {
	if t.Session.Try != t {
		return
	}
	t.Session.Try = nil
	delete(m.tries, t)
	if t.stray {
		m.strays--
	}
	if t.To != nil {
		t.To.Incoming--
	}
	if gm := t.Move; gm != nil {
		t.Move = nil
		delete(gm.Members, t.Session.ID)
		m.progress(gm)
	}
}

func (m *Machine) send(k Kind, w *Worker, s *Session, e wire.Epoch, g *Group, last bool) {
	m.emit(Effect{Kind: k, Worker: w, Session: s, Ref: wire.Ref{ID: s.ID, Epoch: e}, Group: g, Last: last})
}

func (t *Try) group() *Group {
	if t.Move == nil {
		return nil
	}
	return t.Move.Group
}

// Freeze begins to move a session away from its owner. joins, unless nil, is the
// group that it moves for. It returns nil if the session cannot be moved now.
func (m *Machine) Freeze(s *Session, joins *GroupKey) *Try {
	if s.Ended || s.Doubt || s.Try != nil || s.Owner == nil || !s.Owner.Usable() || s.Withheld || m.looksSplit(s, joins) {
		return nil
	}
	t := m.begin(&Try{Session: s, From: s.Owner, Joins: joins, Step: Freezing, stray: s.Group != nil})
	if t.stray {
		m.strays++
	}
	m.send(SendFreeze, s.Owner, s, t.Epoch, nil, false)
	return t
}

// Parked handles the PARKED of one session without its group. After Fine, call Offer
// or Undo.
func (m *Machine) Parked(w *Worker, ref wire.Ref) Verdict {
	s := m.lookup(ref.ID)
	if s == nil || s.Owner != w {
		return Wrong
	}
	t := s.Try
	if t == nil || t.Epoch != ref.Epoch || t.Step != Freezing || t.Move != nil {
		return Late
	}
	t.Step = Parked
	return Fine
}

// Offer gives a session that is held, or parked by its owner, to a worker. It returns
// nil if that cannot be.
func (m *Machine) Offer(s *Session, to *Worker) *Try {
	t := s.Try
	switch {
	case s.Ended || s.Doubt || to == s.Owner || !to.Usable():
		return nil
	case t == nil && s.Owner == nil:
		t = m.begin(&Try{Session: s})
	case t != nil && t.Step == Parked && t.Move == nil:
	default:
		return nil
	}
	m.offer(t, to)
	return t
}

func (m *Machine) offer(t *Try, to *Worker) {
	t.To, t.Step = to, Offered
	to.Incoming++
	m.send(SendAdopt, to, t.Session, t.Epoch, t.group(), false)
	m.out[len(m.out)-1].Try = t
}

// Adopted handles one session's ADOPTED. With it, or with the last one of its group,
// the move is committed.
func (m *Machine) Adopted(w *Worker, ref wire.Ref) Verdict {
	s := m.lookup(ref.ID)
	if s == nil || s.Try == nil || s.Try.Epoch != ref.Epoch || s.Try.To != w || s.Try.Step != Offered {
		return Late
	}
	t := s.Try
	switch {
	case t.Move != nil:
		t.Adopted = true
		m.progress(t.Move)
	case !m.Joinable(t, w):
		m.Undo(s)
	default:
		m.commit(t)
		m.tell(t, nil, false)
	}
	return Fine
}

// Joinable says whether an attempt that brings a session to its group, or to the one it
// wants to join, still goes the right way.
func (m *Machine) Joinable(t *Try, to *Worker) bool {
	if t.Joins == nil {
		g := t.Session.Group
		return g == nil || g.Home == nil || g.Home == to && g.Move == nil
	}
	g := m.groups[*t.Joins]
	return g == nil || g.Home == to && g.Move == nil && !m.Split(g)
}

// commit records the new owner. Only after it may RESUME be sent.
func (m *Machine) commit(t *Try) {
	s := t.Session
	m.give(s, t.To)
	s.Epoch, s.told = t.Epoch, 0
	if t.Joins != nil {
		m.leave(s)
		m.enter(s, *t.Joins)
	}
	if g := s.Group; g != nil && g.Home == nil {
		g.Home = t.To
	}
	t.Move = nil
	m.drop(t)
	m.emit(Effect{Kind: Put, Session: s, Try: t})
	m.emit(Effect{Kind: Void, Session: s})
	m.emit(Effect{Kind: Moved, Session: s, Worker: t.To, From: t.From, Try: t})
}

// tell sends what follows a commit.
func (m *Machine) tell(t *Try, g *Group, last bool) {
	t.To.goOn(t.Session)
	m.send(SendResume, t.To, t.Session, t.Epoch, g, last)
	if t.From != nil && t.From.Reachable() {
		m.send(SendRelease, t.From, t.Session, t.Epoch, nil, false)
	}
}

// Refused handles a refusal by the worker that a session, or its group, was offered
// to.
func (m *Machine) Refused(w *Worker, ref wire.Ref) Verdict {
	s := m.lookup(ref.ID)
	if s == nil || s.Try == nil || s.Try.Epoch != ref.Epoch || s.Try.To != w {
		return Late
	}
	m.Undo(s)
	return Fine
}

// Undo gives up the attempt under way for a session, and with it that of its group:
// the owner goes on. If the owner cannot any more, the session is held.
func (m *Machine) Undo(s *Session) {
	if s.Try == nil {
		return
	}
	if gm := s.Try.Move; gm != nil {
		m.UndoGroup(gm)
		return
	}
	m.undo(s.Try, nil, false)
}

func (m *Machine) undo(t *Try, g *Group, last bool) {
	s := t.Session
	if t.Step == Offered && t.To.Reachable() {
		m.send(SendAbort, t.To, s, t.Epoch, nil, false)
	}
	step := t.Step
	m.drop(t)
	switch {
	case t.From == nil:
	case t.From.Reachable():
		t.From.goOn(s)
		m.send(SendThaw, t.From, s, t.Epoch, g, last)
		return
	case step == Freezing: // it goes on by itself; or it is dead, and Dead sees to it
		return
	default: // it forgets what it had parked
		m.unowned(s)
	}
	m.emit(Effect{Kind: Returned, Session: s, Try: t})
}

// unowned takes a parked session from an owner that cannot get it back.
func (m *Machine) unowned(s *Session) {
	if s.Owner == nil {
		return
	}
	m.give(s, nil)
	m.emit(Effect{Kind: Keep, Session: s})
	m.emit(Effect{Kind: Put, Session: s})
}

// Closed handles the end of a session, told by its owner.
func (m *Machine) Closed(w *Worker, ref wire.Ref, why wire.Reason) Verdict {
	s := m.lookup(ref.ID)
	switch {
	case s == nil:
		return Late // told again
	case s.Owner != w || s.Epoch != ref.Epoch:
		return Wrong
	}
	m.end(s, Effect{How: Closed, Reason: why})
	return Fine
}

// Gone handles the end of a session of which its owner has forgotten why.
func (m *Machine) Gone(s *Session) { m.end(s, Effect{How: Gone}) }

// Lose ends a session that nobody can serve.
func (m *Machine) Lose(s *Session, why string) { m.end(s, Effect{How: Lost, Why: why}) }

// Stop ends a session because the unit stops.
func (m *Machine) Stop(s *Session) { m.end(s, Effect{How: Stopped}) }

func (m *Machine) end(s *Session, e Effect) {
	if s.Ended {
		return
	}
	s.Ended, s.Doubt = true, false
	m.settleWithheld(s)
	if t := s.Try; t != nil {
		if t.Step == Offered && t.To.Reachable() {
			m.send(SendAbort, t.To, s, t.Epoch, nil, false)
		}
		m.drop(t)
	}
	owner := s.Owner
	if owner != nil && owner.Awaited {
		if owner.ended == nil {
			owner.ended = map[uint64]bool{}
		}
		owner.ended[s.ID] = true
	}
	m.give(s, nil)
	m.leave(s)
	e.Kind, e.Session, e.From = End, s, owner
	m.emit(e)
}
