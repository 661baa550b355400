package ownership

import (
	"maps"
	"slices"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// A group is split when an earlier machine died after it had committed some members of a
// move and not all. Then it had sent RESUME for none of them, so those at the new worker go
// back to the old one, which still has them parked:
//
//	old: x parked, y parked     ledger: x is new's, before that old's; y is old's
//	new: x adopted, y adopted
//
// That x was old's is the ledger's to say, and not a worker's: a worker may have parked x
// long ago, in an attempt that came to its end while it was not heard, or may lie. Of old
// is believed that it still has x of that very attempt. While it has not said so, x is
// withheld: new does not go on with it, and nobody joins the group.

// undoSplit gives back what was committed of moves that were not committed whole.
func (m *Machine) undoSplit(workers []*Worker, held map[*Worker]map[uint64]wire.Held) {
	for _, old := range workers {
		for _, id := range slices.Sorted(maps.Keys(held[old])) {
			p, s := held[old][id], m.lookup(id)
			if p.Phase != wire.PhaseParked || s == nil || s.Group == nil || s.Owner == nil || s.Owner == old || s.Try != nil || p.Attempt != s.Epoch {
				continue
			}
			if owner, epoch := m.before(id); owner != old.ID || epoch != p.Epoch || !s.Group.parkedAt(old, held[old]) {
				continue
			}
			w := s.Owner
			if list, now := held[w]; now {
				if h := list[id]; h.Phase != wire.PhaseAdopted || h.Epoch != s.Epoch {
					continue
				}
			} else if !w.Awaited && !s.Withheld {
				continue // it goes on with it
			}
			if s.Withheld && w.Reachable() { // what it says was handled
				m.send(SendAbort, w, s, s.Epoch, nil, false)
			}
			m.settleWithheld(s)
			m.give(s, old)
			s.Epoch = p.Epoch
			s.Group.Home = old
			m.emit(Effect{Kind: Put, Session: s, From: w})
		}
	}
}

// looksSplit says whether a session, if it were committed now, and another one that its
// owner has parked would look like a split to the next machine: one of them is a member of
// a group, and both go to its home, each with a RESUME of its own. One of them waits.
func (m *Machine) looksSplit(s *Session, joins *GroupKey) bool {
	g := s.Group
	if joins != nil {
		g = m.groups[*joins]
	}
	if g == nil || s.Group != g && m.strays == 0 {
		return false
	}
	for t := range m.tries {
		if t.From != s.Owner {
			continue
		}
		if t.Session.Group == g || s.Group == g && t.Joins != nil && *t.Joins == g.Key {
			return true
		}
	}
	return false
}

// parkedAt says whether a worker owns members of a group and has them parked.
func (g *Group) parkedAt(w *Worker, held map[uint64]wire.Held) bool {
	for id, s := range g.Members {
		if s.Owner == w && held[id].Phase == wire.PhaseParked {
			return true
		}
	}
	return false
}

// silent remembers for a while which owners of members of each group have not yet said
// what they have.
type silent map[*Group]map[uint64]bool

func (l silent) of(g *Group) map[uint64]bool {
	ids, ok := l[g]
	if !ok {
		for _, o := range g.Members {
			if w := o.Owner; w != nil && w.Awaited && w.Reachable() {
				if ids == nil {
					ids = map[uint64]bool{}
				}
				ids[w.ID] = true
			}
		}
		l[g] = ids
	}
	return ids
}

// mayGoBack says whether a session may have to go back to a worker that has not yet said
// what it has of the group.
func (m *Machine) mayGoBack(s *Session, l silent) bool {
	if s.Group == nil || len(l.of(s.Group)) == 0 {
		return false
	}
	owner, _ := m.before(s.ID)
	return (s.Owner == nil || owner != s.Owner.ID) && l.of(s.Group)[owner]
}

func (m *Machine) withhold(s *Session) {
	s.Withheld = true
	if m.withheld == nil {
		m.withheld = map[uint64]*Session{}
	}
	m.withheld[s.ID] = s
}

func (m *Machine) settleWithheld(s *Session) {
	if s.Withheld {
		s.Withheld = false
		delete(m.withheld, s.ID)
	}
}

// Waiting counts the sessions that are withheld.
func (m *Machine) Waiting() int { return len(m.withheld) }

// Split says whether members of a group are withheld.
func (m *Machine) Split(g *Group) bool {
	for _, s := range m.withheld {
		if s.Group == g {
			return true
		}
	}
	return false
}

// ResumeWithheld no longer waits for workers that do not say what they have: what is
// withheld goes on where it is, and the rest of its group where that is.
func (m *Machine) ResumeWithheld() { m.resumeWithheld(true) }

func (m *Machine) resumeWithheld(all bool) {
	if len(m.withheld) == 0 {
		return
	}
	resume := map[*Worker]map[GroupKey][]wire.Ref{}
	var workers []*Worker
	l := silent{}
	for _, s := range sorted(m.withheld) {
		if !all && m.mayGoBack(s, l) {
			continue
		}
		m.settleWithheld(s)
		w := s.Owner
		if w == nil || !w.Reachable() {
			continue // its death decides
		}
		m.emit(Effect{Kind: Put, Session: s}) // from here on the ledger does not say that it could go back
		m.emit(Effect{Kind: Void, Session: s})
		ref := wire.Ref{ID: s.ID, Epoch: s.Epoch}
		if s.Group == nil {
			w.goOn(s)
			m.emit(Effect{Kind: SendResume, Worker: w, Session: s, Ref: ref})
			continue
		}
		if resume[w] == nil {
			resume[w] = map[GroupKey][]wire.Ref{}
			workers = append(workers, w)
		}
		resume[w][s.Group.Key] = append(resume[w][s.Group.Key], ref)
	}
	for _, w := range workers {
		m.sendAll(SendResume, w, resume[w])
	}
}
