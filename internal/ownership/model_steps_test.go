package ownership

import (
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// pick draws one of the map's values, in an order that repeats.
func pick[V any](w *world, m map[uint64]V, ok func(V) bool) (v V, found bool) {
	var list []V
	for _, id := range sortedKeys(m) {
		if ok(m[id]) {
			list = append(list, m[id])
		}
	}
	if len(list) == 0 {
		return v, false
	}
	return list[w.choose(len(list))], true
}

// step is one random thing.
func (w *world) step() {
	switch n := 99 - w.choose(100); { // rapid prefers small numbers, and to go on is what most is
	case n < 4:
		if len(w.rows) < 8 {
			w.admit()
		}
	case n < 6:
		if len(w.players) < 5 && !w.recovering {
			w.newWorker()
		}
	case n < 8:
		if p, ok := pick(w, w.players, func(p *player) bool { return p.alive }); ok {
			w.note("worker %d is killed", p.id)
			p.alive = false
		}
	case n < 9:
		if p, ok := pick(w, w.players, func(p *player) bool { return p.alive && !p.eof && w.nodes[p.id].Reachable() }); ok {
			w.note("worker %d is cut", p.id)
			w.cut(p)
		}
	case n < 10:
		if p, ok := pick(w, w.players, func(p *player) bool { return p.alive && !p.eof }); ok {
			p.pending = append(p.pending, packet{typ: wire.TypePing, nonce: w.nodes[p.id].Told()})
		}
	case n < 11:
		w.crashIn = w.choose(13)
	case n < 15:
		waiting := 0
		for id, n := range w.nodes {
			if n.Awaited && n.Reachable() && w.players[id].alive && w.said[n] == nil && id != w.slow {
				waiting++
			}
		}
		if waiting == 0 || w.chance(10) {
			w.recovered()
		}
	case n < 24:
		if s, ok := pick(w, w.live, func(s *Session) bool { return s.Group == nil && s.Phase() == PhaseOwned }); ok && !w.recovering {
			w.note("freeze %d", s.ID)
			w.m.Freeze(s, nil)
			w.run()
		}
	case n < 28:
		w.freezeGroup()
	case n < 31:
		if s, ok := pick(w, w.live, func(s *Session) bool { return s.Try != nil }); ok {
			w.note("time is up for %d", s.ID)
			w.m.Undo(s)
			w.run()
		}
	case n < 37:
		w.join()
	case n < 39:
		if s, ok := pick(w, w.live, func(s *Session) bool { return s.Group != nil && s.Phase() == PhaseOwned && !s.Withheld }); ok {
			w.note("session %d leaves its group", s.ID)
			w.m.Leave(s)
			w.run()
		}
	case n < 42:
		if p, ok := pick(w, w.players, func(p *player) bool { return p.alive && len(p.have) > 0 }); ok {
			if c, ok := pick(w, p.have, func(c *copyOf) bool { return c.phase == wire.PhaseActive || c.phase == wire.PhaseFreezing }); ok {
				w.note("session %d ends", c.id)
				p.close(c)
			}
		}
	default:
		w.proceed()
	}
}

// cut ends a worker's channel: because of what it said, or it does so itself.
func (w *world) cut(p *player) {
	hungUp := w.chance(2)
	if hungUp {
		p.channelEnded()
		p.in, p.pending = nil, nil
		for len(p.out) > 0 {
			w.fromWorker(p)
		}
	}
	n := w.nodes[p.id]
	if n.cut {
		return
	}
	p.out = nil
	w.m.Cut(n, hungUp)
	w.run()
	if !p.eof {
		keep := w.choose(len(p.pending) + 1)
		p.in, p.pending = append(p.in, p.pending[:keep]...), nil
		for len(p.in) > 0 && p.alive {
			w.toWorker(p)
		}
		p.channelEnded()
	}
}

func (w *world) freezeGroup() {
	if w.recovering {
		return
	}
	if s, ok := pick(w, w.live, func(s *Session) bool { return s.Group != nil }); ok {
		w.note("freeze group of %d", s.ID)
		w.m.FreezeGroup(s.Group)
		w.run()
	}
}

// join brings a session into a group: at its home, as its first member, or by a move.
func (w *world) join() {
	s, ok := pick(w, w.live, func(s *Session) bool {
		return s.Group == nil && s.Phase() == PhaseOwned && s.Owner.Usable() && !s.Withheld
	})
	if !ok || w.recovering {
		return
	}
	key := GroupKey{Name: string(rune('a' + w.choose(2)))}
	g := w.m.Groups()[key]
	w.note("session %d joins %s", s.ID, key.Name)
	switch {
	case g != nil && w.m.Split(g):
	case g == nil || g.Home == s.Owner && g.Move == nil:
		w.m.Join(s, key)
	case g.Move == nil && g.Home != nil && g.Home.Usable():
		w.m.Freeze(s, &key)
	}
	w.run()
}

// proceed is one step without a failure; false when nothing was left to do.
func (w *world) proceed() bool {
	var can []func()
	for _, id := range sortedKeys(w.players) {
		p := w.players[id]
		if len(p.out) > 0 {
			can = append(can, func() { w.fromWorker(p) })
		}
		if len(p.pending) > 0 && !p.eof {
			can = append(can, func() { p.in, p.pending = append(p.in, p.pending[0]), p.pending[1:] })
		}
		if !p.alive {
			if len(p.out) == 0 {
				can = append(can, func() { w.died(p) })
			}
			continue
		}
		if p.eof && len(p.out) == 0 && w.nodes[id].Reachable() {
			can = append(can, func() { w.m.Cut(w.nodes[p.id], true); w.run() })
		}
		if len(p.in) > 0 && !p.eof && p.id != w.slow {
			can = append(can, func() { w.toWorker(p) })
		}
		for _, sid := range sortedKeys(p.have) {
			if c := p.have[sid]; c.phase == wire.PhaseFreezing && !p.eof && (c.batch == nil || c.batch.last && !c.batch.parked) {
				can = append(can, func() {
					if p.have[c.id] == c && c.phase == wire.PhaseFreezing {
						w.note("worker %d parks %d", p.id, c.id)
						p.park(c)
					}
				})
			}
		}
	}
	if len(w.settle) > 0 {
		can = append(can, w.settleOne)
	}
	if len(w.ready) > 0 {
		can = append(can, w.offerReady)
	}
	if !w.recovering {
		for _, id := range sortedKeys(w.live) {
			s := w.live[id]
			if s.Phase() != PhaseHeld || s.Try != nil {
				continue
			}
			if g := s.Group; g != nil && g.Home == nil {
				if g.Move == nil {
					can = append(can, func() { w.m.HoldGroup(g); w.run() })
				}
				continue
			}
			can = append(can, func() { w.offer(s) })
		}
	}
	if len(can) == 0 {
		return false
	}
	can[w.choose(len(can))]()
	return true
}

// settleDown lets everything come to an end without further failures: then every
// session is served by the worker that the ledger names, or has ended.
func (w *world) settleDown() {
	w.quiet, w.crashIn = true, -1
	w.note("no more failures")
	for i := 0; ; i++ {
		if i == 2000 {
			w.fail("it does not come to rest")
		}
		if w.usable() == 0 && !w.recovering {
			w.newWorker()
		}
		if !w.proceed() {
			if w.recovering {
				w.recovered()
				continue
			}
			// What waits for an answer that never comes is given up in time.
			stuck := false
			for t := range w.m.Tries() {
				w.m.Undo(t.Session)
				stuck = true
				break
			}
			w.run()
			if !stuck {
				break
			}
		}
		w.check()
	}
	for _, g := range w.m.Groups() {
		for id, s := range g.Members {
			if s.Owner != nil && s.Owner.Usable() && s.Owner != g.Home {
				w.fail("session %d of group %s is with worker %d, and the group with %+v", id, g.Key.Name, s.Owner.ID, g.Home)
			}
		}
	}
	for id, s := range w.live {
		if s.Phase() != PhaseOwned {
			w.fail("session %d stays %s", id, s.Phase())
		}
		if p := w.players[s.Owner.ID]; !p.serving(id) && !(p.eof && !w.clients[id].open) { // nobody can be told of that end
			w.fail("session %d belongs to worker %d, which does not serve it: %+v", id, s.Owner.ID, w.players[s.Owner.ID].have[id])
		}
	}
}

func (w *world) usable() (n int) {
	for id, node := range w.nodes {
		if node.Usable() && w.players[id].alive {
			n++
		}
	}
	return n
}
