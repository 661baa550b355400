package ownership

import (
	"cmp"
	"maps"
	"slices"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// Reconcile brings the workers that have said what they have, and the ledger that an
// earlier machine left, into line: what was not committed did not happen. The first
// call names all workers that answered in time; one that answers later comes in a call
// of its own.
func (m *Machine) Reconcile(said map[*Worker][]wire.Held) {
	held := make(map[*Worker]map[uint64]wire.Held, len(said))
	workers := make([]*Worker, 0, len(said))
	for w, list := range said {
		if !w.Reachable() {
			continue
		}
		w.Awaited = false
		workers = append(workers, w)
		held[w] = make(map[uint64]wire.Held, len(list))
		for _, h := range list {
			held[w][h.ID] = h
		}
	}
	slices.SortFunc(workers, func(a, b *Worker) int { return cmp.Compare(a.ID, b.ID) })
	m.undoSplit(workers, held)
	for _, w := range workers {
		m.reconcile(w, held[w])
	}
	m.resumeWithheld(false)
}

func (m *Machine) reconcile(w *Worker, held map[uint64]wire.Held) {
	thaw, resume := map[GroupKey][]wire.Ref{}, map[GroupKey][]wire.Ref{}
	ended, l := w.ended, silent{}
	w.ended = nil
	for _, id := range slices.Sorted(maps.Keys(held)) {
		h := held[id]
		if ended[id] {
			continue // it said so after its inventory
		}
		s := m.lookup(id)
		mine := s != nil && s.Owner == w
		ref, try := wire.Ref{ID: id, Epoch: h.Epoch}, wire.Ref{ID: id, Epoch: h.Attempt}
		say := func(k Kind, r wire.Ref) {
			if k == SendResume || k == SendThaw {
				w.goOn(s)
			}
			m.emit(Effect{Kind: k, Worker: w, Session: s, Ref: r})
		}
		switch h.Phase {
		case wire.PhaseClosed:
			if mine {
				m.end(s, Effect{How: Closed, Reason: h.Reason})
			}
			say(SendClosedAck, ref)
		case wire.PhaseAdopted:
			if mine && h.Epoch == s.Epoch {
				if m.mayGoBack(s, l) {
					m.withhold(s)
					continue
				}
				m.emit(Effect{Kind: Void, Session: s}) // the earlier machine may not have come so far
			}
			switch {
			case !mine || h.Epoch != s.Epoch:
				say(SendAbort, ref)
			case s.Group != nil:
				resume[s.Group.Key] = append(resume[s.Group.Key], ref)
			default:
				say(SendResume, ref)
			}
		case wire.PhaseParked, wire.PhaseFreezing:
			switch {
			case !mine && h.Phase == wire.PhaseParked:
				say(SendRelease, try)
			case !mine: // it has lost a session that it still serves
				say(SendClose, ref)
			case h.Group != "" && s.Group != nil:
				thaw[s.Group.Key] = append(thaw[s.Group.Key], try)
			default:
				say(SendThaw, try)
			}
		default:
			if !mine {
				say(SendClose, ref)
			}
		}
	}
	for _, s := range sorted(w.Sessions) {
		if _, ok := held[s.ID]; !ok {
			m.Gone(s)
		}
	}
	m.sendAll(SendThaw, w, thaw)
	m.sendAll(SendResume, w, resume)
}

func (m *Machine) sendAll(k Kind, w *Worker, groups map[GroupKey][]wire.Ref) {
	for key, refs := range groups {
		for i, r := range refs {
			w.goOn(m.lookup(r.ID))
			m.emit(Effect{Kind: k, Worker: w, Session: m.lookup(r.ID), Ref: r, Group: m.groups[key], Last: i == len(refs)-1})
		}
	}
}
