package supervise

import (
	"maps"
	"slices"

	"github.com/ktlsvisor/ktlsvisor/internal/ownership"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// A callback of a group is the application's code for all members, so a worker that dies
// in it dies over all of them, and none can be told from the others or taken out of the
// group. It may also die while it takes a group's state over, and then it owns none of the
// members; its marks say so all the same (handoff/marks.go). Such members are suspects like
// others and go on in the quarantine worker. It may be the state that is bad, so
//
//	after maxStateOffers crashes in a row      the group goes on without it
//	after groupLimit crashes in a row, at one  those of its members that were being handled
//	in which nothing else was being handled    in all of them are closed

// groupLimit is how many crashes in a row close members of a group that were never alone.
func groupLimit(poison int) int { return poison + maxStateOffers }

// crashesOf is how many workers in a row died over members of a group.
func crashesOf(g *ownership.Group) (n int) {
	for _, m := range g.Members {
		n = max(n, int(sessionOf(m).crashes))
	}
	return n
}

// closeGroup closes those of list, which is all that was being handled in a crash, that are
// members of one group and have reached its limit. It returns the others.
func (s *Supervisor) closeGroup(w *worker, list []*session) (others []*session) {
	var doomed []*session
	for _, ss := range list {
		switch {
		case ss.Group == nil || ss.Group != list[0].Group:
			return list
		case int(ss.crashes) >= groupLimit(w.pool.cfg.Poison):
			doomed = append(doomed, ss)
		default:
			others = append(others, ss)
		}
	}
	if len(doomed) == 0 {
		return list
	}
	s.log.Error("members of a group closed as poison: worker after worker died while handling them, and nothing else", "group", doomed[0].groupName(),
		"pool", w.pool.name, "sessions", len(doomed), "crashes", doomed[0].crashes)
	for _, ss := range doomed {
		s.endPoison(ss)
	}
	return others
}

// noteOffered remembers which members of groups a worker was offered, before that comes
// to nothing because it cannot be reached any more, and in which epoch. A group that would
// go on in its old worker is none of them when the upgrade, which fails, brings it back
// there.
func (s *Supervisor) noteOffered(w *worker) {
	if w.marks == nil {
		return
	}
	for gm := range s.m.Moves() {
		if gm.To != &w.Worker || gm.From != nil && gm.From.Reachable() && workerOf(gm.From).gen != w.gen {
			continue
		}
		for id, ls := range gm.Members {
			if w.offered == nil {
				w.offered = map[uint64]wire.Epoch{}
			}
			w.offered[id] = ls.Epoch
		}
	}
}

// blameOffered puts those groups under suspicion in whose callbacks a worker died.
func (s *Supervisor) blameOffered(w *worker) {
	s.noteOffered(w)
	if len(w.offered) == 0 {
		return
	}
	marked := w.marks.handling()
	d := &w.pool.ward
	var list []*session
	homeless := true
	for _, id := range slices.Sorted(maps.Keys(w.offered)) {
		ss := s.sessions[id]
		if ss == nil || ss.Ended || !marked[id] || ss.Epoch != w.offered[id] {
			continue // another worker has taken it, and serves it
		}
		if ss.Owner == nil && ss.crashes < 255 {
			ss.crashes++
		}
		homeless = homeless && ss.Owner == nil // else it goes on there
		ss.crashes = max(ss.crashes, 1)
		list = append(list, ss)
	}
	w.offered = nil
	if homeless && len(w.marks.handled(w)) == 0 {
		list = s.closeGroup(w, list)
	}
	for _, ss := range list {
		d.add(ss)
		s.led.put(int(ss.slot), ss.slotEntry())
	}
	s.suspectGroups(list)
	if n := len(list); n > 0 {
		s.led.count(cntQuarantined, uint64(n))
		s.log.Warn("a worker died while it took over the state of a group: the group goes on in quarantine", "pool", w.pool.name, "pid", w.pid, "members", n)
	}
}
