package ownership

import (
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

func (w *world) do(e Effect) {
	var id uint64
	if e.Session != nil {
		id = e.Session.ID
	}
	w.note("  effect %s %d %v last=%v", e.Kind, id, e.Ref, e.Last)
	switch e.Kind {
	case Put:
		r := w.rows[id]
		if e.Session.Ended { // its End follows
			return
		}
		if e.Session.Epoch < r.epoch && e.From == nil {
			w.fail("the epoch of session %d falls from %x to %x", id, r.epoch, e.Session.Epoch)
		}
		r.ownerBefore, r.epochBefore = r.owner, r.epoch
		r.owner, r.epoch, r.group = 0, e.Session.Epoch, nil
		if o := e.Session.Owner; o != nil {
			r.owner = o.ID
		}
		if g := e.Session.Group; g != nil {
			r.group = &g.Key
		}
		if r.owner == 0 && r.kept < 0 {
			w.fail("session %d has no owner, and its record state is nowhere", id)
		}
	case Keep:
		if !e.Session.Ended {
			w.rows[id].kept = w.cargo[id]
		}
	case Void:
		if !e.Session.Ended {
			w.rows[id].kept = -1
			delete(w.cargo, id)
		}
	case SendFreeze, SendAdopt, SendResume, SendRelease, SendThaw, SendAbort, SendClosedAck, SendClose:
		p := w.players[e.Worker.ID]
		if e.Kind == SendAdopt || e.Kind == SendFreeze {
			// FREEZE begins an attempt, and so does ADOPT; after FREEZE it has the same epoch.
			low := w.highest[id]
			if e.Kind == SendAdopt && w.frozen[id] == e.Ref.Epoch {
				low--
			}
			if e.Ref.Epoch <= low {
				w.fail("attempt %x for session %d comes after %x", e.Ref.Epoch, id, w.highest[id])
			}
			w.highest[id], w.frozen[id] = e.Ref.Epoch, 0
			if e.Kind == SendFreeze {
				w.frozen[id] = e.Ref.Epoch
			}
		}
		if e.Kind == SendResume && !e.Session.Ended && w.rows[id].kept >= 0 {
			w.fail("RESUME for session %d goes out while its parked record state stands", id)
		}
		k := packet{kind: e.Kind, ref: e.Ref, last: e.Last}
		if e.Group != nil {
			k.group = e.Group.Key.Name
		}
		if e.Kind == SendAdopt {
			st, ok := w.cargo[id]
			if !ok {
				w.fail("session %d is offered without its record state", id)
			}
			k.state = st
		}
		if !p.eof {
			p.pending = append(p.pending, k)
		}
	case Kill:
		w.players[e.Worker.ID].alive = false
	case Detached:
		w.players[e.Worker.ID].detached = true
	case Settle:
		w.settle = append(w.settle, e.Session)
	case GroupReady:
		w.ready = append(w.ready, e.Move)
	case End:
		w.clients[id].ended++
		delete(w.rows, id)
		delete(w.cargo, id)
		delete(w.live, id)
	case Moved, Returned, KeepGroup, GroupDone:
	}
}

// crash ends the supervisor between two effects; a new one takes over.
func (w *world) crash() {
	w.note("the supervisor dies")
	w.crashIn, w.inc = -1, w.inc+1
	w.settle, w.ready, w.said = nil, nil, map[*Worker][]wire.Held{}
	clear(w.cargo)
	for _, p := range w.players {
		p.pending = nil
	}
	w.live = map[uint64]*Session{}
	w.m = New(w.inc, w.find, w.before)
	w.recovering, w.slow, w.quiet = true, 0, false
	if p, ok := pick(w, w.players, func(p *player) bool { return p.alive && !p.eof }); ok && (w.chance(6) || w.splitIn == 1 && w.choose(2) == 0) {
		w.slow = p.id
	}
	w.splitIn = 0
	w.nodes = map[uint64]*Worker{}
	for _, pid := range sortedKeys(w.players) {
		p := w.players[pid]
		n := &Worker{ID: pid, Awaited: true}
		w.nodes[pid] = n
		if p.detached {
			n.Awaited = false
			w.m.Cut(n, true)
			continue
		}
		p.pending = append(p.pending, packet{typ: wire.TypeInventory, nonce: w.inc})
	}
	for _, id := range sortedKeys(w.rows) {
		r := w.rows[id]
		s := &Session{ID: id, Epoch: r.epoch}
		owner := w.nodes[r.owner]
		w.live[id] = s
		w.m.Restore(s, owner, r.group)
		switch {
		case owner == nil && r.owner != 0:
			w.m.Orphan(s, &Worker{ID: r.owner})
		case r.owner == 0:
			w.cargo[id] = r.kept
		}
	}
	w.run()
}

// recovered ends the wait for inventories.
func (w *world) recovered() {
	if !w.recovering {
		return
	}
	w.note("recovered, %d workers said what they have", len(w.said))
	w.recovering, w.slow = false, 0
	said := w.said
	w.said = nil
	w.m.Reconcile(said)
	w.run()
}

// fromWorker handles one message of a worker.
func (w *world) fromWorker(p *player) {
	k := p.out[0]
	p.out = p.out[1:]
	n := w.nodes[p.id]
	w.note("worker %d says %s", p.id, k)
	verdict := Fine
	switch k.typ {
	case wire.TypeParked:
		if k.group == "" {
			if verdict = w.m.Parked(n, k.ref); verdict == Fine {
				w.cargo[k.ref.ID] = k.state
				w.offer(w.live[k.ref.ID])
			}
			break
		}
		before := map[uint64]bool{}
		for _, r := range k.refs {
			s := w.live[r.ID]
			before[r.ID] = s != nil && s.Try != nil && s.Try.Step == Freezing && s.Try.Epoch == r.Epoch
		}
		for i, r := range k.refs { // the driver's cargo, taken if the machine takes the message
			if before[r.ID] {
				w.cargo[r.ID] = k.parts[i]
			}
		}
		verdict = w.m.GroupParked(n, GroupKey{Name: k.group}, k.refs, nil, k.last)
	case wire.TypeAdopted:
		verdict = w.m.Adopted(n, k.ref)
	case wire.TypeRefused:
		verdict = w.m.Refused(n, k.ref)
	case wire.TypeClosed:
		if verdict = w.m.Closed(n, k.ref, wire.ReasonPeer); verdict != Wrong && n.Reachable() {
			p.pending = append(p.pending, packet{kind: SendClosedAck, ref: k.ref})
		}
	case wire.TypePong:
		n.Sure(k.nonce)
	case wire.TypeInventoryReply:
		switch {
		case !n.Awaited || k.nonce != w.inc: // for an earlier supervisor
		case w.recovering:
			w.said[n] = append([]wire.Held{}, k.held...)
		default:
			w.m.Reconcile(map[*Worker][]wire.Held{n: k.held})
		}
	}
	if verdict == Wrong && n.Reachable() {
		w.fail("worker %d is told that it broke the protocol: %s", p.id, k)
	}
	w.run()
}

// toWorker lets a worker handle one message.
func (w *world) toWorker(p *player) {
	k := p.in[0]
	p.in = p.in[1:]
	w.note("worker %d gets %s", p.id, k)
	switch {
	case k.typ == wire.TypeInventory:
		p.inventory(k.nonce)
	case k.typ == wire.TypePing:
		p.send(packet{typ: wire.TypePong, nonce: k.nonce})
	default:
		p.handle(k)
	}
}

// offer finds a session that nobody serves a worker.
func (w *world) offer(s *Session) {
	if s == nil || s.Ended || w.recovering {
		return
	}
	var list []*Worker
	for _, id := range sortedKeys(w.nodes) {
		if n := w.nodes[id]; n.Usable() && n != s.Owner && w.players[id].alive {
			list = append(list, n)
		}
	}
	if g := s.Group; g != nil && g.Home != nil {
		list = nil
		if g.Home.Usable() {
			list = []*Worker{g.Home}
		}
	}
	if len(list) == 0 {
		w.m.Undo(s)
	} else {
		w.m.Offer(s, list[w.choose(len(list))])
	}
	w.run()
}

func (w *world) offerReady() {
	list := w.ready
	w.ready = nil
	for _, gm := range list {
		var to []*Worker
		for _, id := range sortedKeys(w.nodes) {
			if n := w.nodes[id]; n.Usable() && n != gm.From {
				to = append(to, n)
			}
		}
		if !w.m.Ready(gm) {
			continue
		}
		if len(to) == 0 || !w.m.OfferGroup(gm, to[w.choose(len(to))]) {
			w.m.UndoGroup(gm)
		}
		w.run()
	}
}

func (w *world) settleOne() {
	s := w.settle[0]
	w.settle = w.settle[1:]
	c := w.clients[s.ID]
	for _, p := range w.players {
		if p.serving(s.ID) {
			w.fail("session %d is settled while worker %d serves it", s.ID, p.id)
		}
	}
	switch {
	case !c.open:
		w.m.SettledGone(s)
	case w.chance(10):
		c.open = false
		w.m.SettledLost(s, "in doubt")
	default:
		w.cargo[s.ID] = c.state
		w.m.SettledHeld(s)
	}
	w.run()
}

// died handles a death that was seen, after all its messages.
func (w *world) died(p *player) {
	w.note("worker %d was seen dead", p.id)
	delete(w.said, w.nodes[p.id])
	w.m.Dead(w.nodes[p.id])
	w.run()
	if n := w.nodes[p.id]; n.dead { // and no new supervisor has come meanwhile
		delete(w.players, p.id)
		delete(w.nodes, p.id)
	}
}
