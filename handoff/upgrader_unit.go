package handoff

import (
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// unit is one attempt to move a session, or a group of them, to the new process.
//
//	freezing --PARKED of all--> offered --ADOPTED of all--> committing --PONG--> (gone)
//	    |                          |                            |
//	    +------- time, THAW -------+------- REFUSED, THAW ------+--- RESUME not sent, or
//	                                                                 not read by a dead process
type unit struct {
	g        *giving
	group    string
	members  []*member
	stage    unitStage
	deadline time.Time
	last     bool // of a group: PARKED with last has come
	blobs    []wire.Blob
}

type member struct {
	r       *resident
	epoch   wire.Epoch
	item    wire.Item
	parked  bool
	sent    bool // the item is the line's, which wipes it
	adopted bool
}

type unitStage uint8

const (
	unitFreezing   unitStage = iota // FREEZE was sent to our worker
	unitOffered                     // ADOPT is being sent to the new process
	unitCommitting                  // RESUME is being sent to the new process
)

func (g *giving) newUnit(group string, rs ...*resident) *unit {
	u := &unit{g: g, group: group, deadline: time.Now().Add(g.h.embed.freezeTimeout)}
	for _, r := range rs {
		r.unit = u
		u.members = append(u.members, &member{r: r, epoch: g.h.nextEpoch()})
	}
	g.units[u] = struct{}{}
	g.inFlight += len(rs)
	return u
}

func (u *unit) first() uint64 { return u.members[0].r.id }

func (u *unit) refs() []wire.Ref {
	l := make([]wire.Ref, len(u.members))
	for i, m := range u.members {
		l[i] = wire.Ref{ID: m.r.id, Epoch: m.epoch}
	}
	return l
}

// find returns the member that an answer is about, nil if the answer is late.
func (g *giving) find(ref wire.Ref, stage unitStage) (*unit, *member) {
	r := g.h.residents[ref.ID]
	if r == nil || r.unit == nil || r.unit.stage != stage {
		return nil, nil
	}
	for _, m := range r.unit.members {
		if m.r == r && m.epoch == ref.Epoch {
			return r.unit, m
		}
	}
	return nil, nil
}

// parked takes PARKED of our worker, and offers.
func (g *giving) parked(m *wire.Message) {
	var singles []*unit
	for i := range m.Items {
		u, mb := g.find(m.Items[i].Ref, unitFreezing)
		if u == nil {
			clear(m.Items[i].Cargo.Record)
			continue
		}
		mb.item, mb.parked = m.Items[i], true
		if u.group == "" {
			singles = append(singles, u)
		}
	}
	g.offer(singles)
	if u := g.groupUnit(m.Group); u != nil && u.stage == unitFreezing {
		if m.Last {
			u.last, u.blobs = true, m.Blobs
		}
		u.offerGroup()
	}
}

// groupUnit is the attempt to move a group, nil if there is none.
func (g *giving) groupUnit(name string) *unit {
	if name == "" {
		return nil
	}
	for u := range g.units {
		if u.group == name {
			return u
		}
	}
	return nil
}

// offerGroup offers a group when all of its members are parked.
func (u *unit) offerGroup() {
	if len(u.members) == 0 {
		u.g.drop(u)
		return
	}
	if !u.last || u.stage != unitFreezing {
		return
	}
	for _, m := range u.members {
		if !m.parked {
			return
		}
	}
	u.g.offer([]*unit{u})
}

// offer sends ADOPT for units that are parked: one group, or any number of single
// sessions. The sockets are the worker's, which is asked for them.
func (g *giving) offer(units []*unit) {
	if len(units) == 0 {
		return
	}
	if g.broken {
		for _, u := range units {
			g.takeBack(u, false)
		}
		return
	}
	var refs []wire.Ref
	for _, u := range units {
		u.stage, u.deadline = unitOffered, time.Now().Add(g.h.embed.answerTime)
		refs = append(refs, u.refs()...)
	}
	group := units[0].group
	parts := wire.BatchRefs(refs)
	for i, part := range parts {
		last := group != "" && i == len(parts)-1
		g.h.worker.luggageOf(part, func(l []luggage) {
			g.h.in.post(func() { g.send(group, part, l, last) })
		})
	}
}

// send sends one part of an offer.
func (g *giving) send(group string, refs []wire.Ref, l []luggage, last bool) {
	var items, keys []wire.Item
	var blobs []wire.Blob
	var fds []int
	for i, ref := range refs {
		u, m := g.find(ref, unitOffered)
		if u == nil || g.broken || g.h.ended { // taken back meanwhile
			sys.CloseAll([]int{l[i].fd})
			continue
		}
		if l[i].fd < 0 || l[i].err != nil {
			sys.CloseAll([]int{l[i].fd})
			if l[i].err != nil {
				g.h.log.Error("session stays here: its socket could not be duplicated", "session", ref.ID, "error", l[i].err)
			}
			if group != "" {
				for _, it := range append(items, keys...) {
					clear(it.Cargo.Record)
				}
			}
			offered := u.refs()
			g.takeBack(u, true)
			if group == "" {
				continue
			}
			for _, part := range wire.BatchRefs(offered) { // earlier parts are there already
				g.down.put(&wire.Message{Type: wire.TypeAbort, Refs: part}, nil)
			}
			sys.CloseAll(fds)
			for _, rest := range l[i+1:] {
				sys.CloseAll([]int{rest.fd})
			}
			return
		}
		it := m.item
		it.Socket, it.Cargo.Facts, it.Group = l[i].fd, l[i].facts, m.r.group
		it.Flags = wire.FlagRestored | it.Flags&wire.FlagResting
		fds = append(fds, l[i].fd)
		items, m.sent = append(items, it), true
		if s := g.h.vault.copyOf(ref.ID); len(s) > 0 {
			keys = append(keys, wire.Item{Ref: ref, Cargo: wire.Cargo{Record: s}})
		}
		if last {
			blobs = u.blobs
		}
	}
	if len(items) == 0 {
		return
	}
	if len(keys) > 0 {
		g.down.put(&wire.Message{Type: wire.TypeKeys, Items: keys}, nil)
	}
	parts := wire.BatchItems(items)
	for i, part := range parts {
		m := &wire.Message{Type: wire.TypeAdopt, Group: group, Items: part}
		if last && i == len(parts)-1 {
			m.Last, m.Blobs = true, blobs
		}
		g.down.put(m, nil)
	}
}

// refused takes REFUSED of the new process.
func (g *giving) refused(list []wire.Refused) {
	for _, f := range list {
		u, m := g.find(f.Ref, unitOffered)
		if u == nil {
			continue
		}
		g.h.log.Warn("the new process refused a session, which stays here", "session", f.ID, "error", f.Why)
		for _, x := range u.members {
			x.r.refusals++
		}
		if u.group == "" {
			u.stage = unitFreezing // nobody but us has it
		} else { // the others that it took are not its own either
			var others []wire.Ref
			for _, x := range u.members {
				if x != m {
					others = append(others, wire.Ref{ID: x.r.id, Epoch: x.epoch})
				}
			}
			for _, part := range wire.BatchRefs(others) {
				g.down.put(&wire.Message{Type: wire.TypeAbort, Refs: part}, nil)
			}
		}
		g.takeBack(u, true)
	}
	g.pump()
}

func (m *member) wipe() {
	if !m.sent {
		clear(m.item.Cargo.Record)
	}
}

// takeBack ends an attempt before its commit; the session goes on here, and is asked
// again if that makes sense.
func (g *giving) takeBack(u *unit, again bool) {
	if u.stage != unitFreezing {
		g.revokeOffers()
	}
	for _, part := range wire.BatchRefs(u.refs()) {
		g.h.local.put(&wire.Message{Type: wire.TypeThaw, Group: u.group, Refs: part}, nil)
	}
	for _, m := range u.members {
		m.r.unit = nil
		m.wipe()
		if again && !g.broken && m.r.refusals < maxRefusals {
			g.later[m.r.id] = time.Now().Add(retryMove)
		}
	}
	g.drop(u)
	g.groupStays(u.group)
}

// drop takes a unit off the books.
func (g *giving) drop(u *unit) {
	if _, there := g.units[u]; there {
		delete(g.units, u)
		g.inFlight -= len(u.members)
	}
}

// thawAll ends every attempt that is not committed.
func (g *giving) thawAll() {
	for u := range g.units {
		if u.stage != unitCommitting {
			g.takeBack(u, false)
		}
	}
}

// ended takes a session that ended out of its attempt.
func (u *unit) ended(r *resident) {
	for i, m := range u.members {
		if m.r == r {
			m.wipe()
			u.members = append(u.members[:i], u.members[i+1:]...)
			u.g.inFlight--
			break
		}
	}
	r.unit = nil
	if u.group == "" || len(u.members) == 0 {
		u.g.drop(u)
	} else {
		u.offerGroup()
	}
	u.g.pump()
}
