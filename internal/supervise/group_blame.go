package supervise

import (
	"maps"
	"slices"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// A worker may also die while it takes a group's state over, and then it owns none of
// the members. Its marks say so all the same (handoff/marks.go). They are suspects like
// others and go on in the quarantine worker, but they are not closed for it: it is the
// state that is bad, and after maxStateOffers the group goes on without.

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
	for _, id := range slices.Sorted(maps.Keys(w.offered)) {
		ss := s.sessions[id]
		if ss == nil || ss.Ended || !marked[id] || ss.Epoch != w.offered[id] {
			continue // another worker has taken it, and serves it
		}
		ss.crashes = max(ss.crashes, 1)
		d.add(ss)
		s.led.put(int(ss.slot), ss.slotEntry())
		list = append(list, ss)
	}
	w.offered = nil
	s.suspectGroups(list)
	if n := len(list); n > 0 {
		s.led.count(cntQuarantined, uint64(n))
		s.log.Warn("a worker died while it took over the state of a group: the group goes on in quarantine", "pool", w.pool.name, "pid", w.pid, "members", n)
	}
}
