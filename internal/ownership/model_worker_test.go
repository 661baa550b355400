package ownership

import (
	"fmt"
	"slices"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// packet is a message between the supervisor and a worker, about one session.
type packet struct {
	kind  Kind // from the supervisor
	typ   wire.Type
	ref   wire.Ref
	group string
	last  bool
	state int // the record state that travels
	refs  []wire.Ref
	parts []int // their record states
	held  []wire.Held
	nonce uint32
}

// copyOf is what a worker has of one session.
type copyOf struct {
	id      uint64
	phase   wire.Phase
	owner   wire.Epoch
	attempt wire.Epoch
	seen    wire.Epoch
	state   int
	group   string
	batch   *batch
}

type batch struct {
	group   string
	members map[uint64]*copyOf
	last    bool
	parked  bool
	thawed  map[uint64]bool
}

// player is a worker that keeps to the protocol. Its supervisor may not.
type player struct {
	id    uint64
	alive bool
	eof   bool // its channel has ended
	// The supervisor has stored that.
	detached bool
	in, out  []packet
	pending  []packet // in the supervisor's queue, lost with it
	have     map[uint64]*copyOf
	batches  map[string]*batch
	tombs    map[uint64]wire.Held
	world    *world
}

func (p *player) serving(id uint64) bool {
	c := p.have[id]
	return p.alive && c != nil && (c.phase == wire.PhaseActive || c.phase == wire.PhaseFreezing)
}

func (p *player) send(k packet) {
	if !p.eof {
		p.out = append(p.out, k)
	}
}

// serve begins to use a record state: it must be the newest one, and from now on it is
// no longer good for anyone else.
func (p *player) serve(c *copyOf) {
	cl := p.world.clients[c.id]
	if c.state != cl.state {
		p.world.fail("session %d: worker %d goes on from record state %d, the newest is %d", c.id, p.id, c.state, cl.state)
	}
	cl.state++
	c.state = cl.state
	c.phase, c.attempt, c.batch = wire.PhaseActive, 0, nil
	p.world.oneOwner(c.id)
}

func (p *player) handle(k packet) {
	c := p.have[k.ref.ID]
	switch k.kind {
	case SendFreeze:
		if c == nil || c.phase != wire.PhaseActive && c.phase != wire.PhaseFreezing || k.ref.Epoch <= c.seen {
			if b := p.batches[k.group]; b != nil && k.last {
				b.last = true
			}
			return
		}
		c.phase, c.attempt, c.seen = wire.PhaseFreezing, k.ref.Epoch, k.ref.Epoch
		if k.group == "" {
			return
		}
		b := p.batches[k.group]
		if b == nil {
			b = &batch{group: k.group, members: map[uint64]*copyOf{}, thawed: map[uint64]bool{}}
			p.batches[k.group] = b
		}
		b.last = b.last || k.last
		b.members[c.id], c.batch = c, b
	case SendThaw:
		if c == nil || c.attempt != k.ref.Epoch {
			return
		}
		b := c.batch
		switch {
		case b == nil && c.phase == wire.PhaseParked:
			p.serve(c)
		case b == nil:
			c.phase, c.attempt = wire.PhaseActive, 0
		case b.parked:
			b.thawed[c.id] = true
			if len(b.thawed) == len(b.members) {
				p.endBatch(b)
			}
		default:
			p.endBatch(b)
		}
	case SendAdopt:
		_, dead := p.tombs[k.ref.ID]
		switch {
		case c != nil && c.phase == wire.PhaseAdopted && c.owner == k.ref.Epoch:
			p.send(packet{typ: wire.TypeAdopted, ref: k.ref})
		case c != nil || dead || p.world.chance(8):
			p.send(packet{typ: wire.TypeRefused, ref: k.ref})
		default:
			p.have[k.ref.ID] = &copyOf{id: k.ref.ID, phase: wire.PhaseAdopted, owner: k.ref.Epoch, seen: k.ref.Epoch,
				state: k.state, group: k.group}
			p.send(packet{typ: wire.TypeAdopted, ref: k.ref})
		}
	case SendResume:
		if c != nil && c.phase == wire.PhaseAdopted && c.owner == k.ref.Epoch {
			p.serve(c)
		}
	case SendRelease:
		if c != nil && c.phase == wire.PhaseParked && c.attempt == k.ref.Epoch {
			p.forget(c)
		}
	case SendAbort:
		if c != nil && c.phase == wire.PhaseAdopted && c.owner == k.ref.Epoch {
			p.forget(c)
		}
	case SendClosedAck:
		delete(p.tombs, k.ref.ID)
	default:
		p.world.fail("the supervisor sent %s for session %d to worker %d", k.kind, k.ref.ID, p.id)
	}
}

func (p *player) forget(c *copyOf) {
	delete(p.have, c.id)
	if b := c.batch; b != nil {
		delete(b.members, c.id)
		delete(b.thawed, c.id)
		switch {
		case len(b.members) == 0:
			delete(p.batches, b.group)
		case b.parked && len(b.thawed) == len(b.members):
			p.endBatch(b)
		}
	}
}

// endBatch undoes an attempt to move a group.
func (p *player) endBatch(b *batch) {
	if p.batches[b.group] == b {
		delete(p.batches, b.group)
	}
	for _, c := range b.members {
		if b.parked {
			p.serve(c)
		} else {
			c.phase, c.attempt, c.batch = wire.PhaseActive, 0, nil
		}
	}
}

// park brings what it was asked for to its safe point.
func (p *player) park(c *copyOf) {
	b := c.batch
	if b == nil {
		c.phase = wire.PhaseParked
		p.send(packet{typ: wire.TypeParked, ref: wire.Ref{ID: c.id, Epoch: c.attempt}, state: c.state})
		return
	}
	if !b.last || b.parked {
		return
	}
	b.parked = true
	k := packet{typ: wire.TypeParked, group: b.group}
	for _, id := range sortedKeys(b.members) {
		c := b.members[id]
		c.phase = wire.PhaseParked
		k.refs, k.parts = append(k.refs, wire.Ref{ID: c.id, Epoch: c.attempt}), append(k.parts, c.state)
		if len(k.refs) == 2 {
			p.send(k)
			k.refs, k.parts = nil, nil
		}
	}
	k.last = true
	p.send(k)
}

func (p *player) close(c *copyOf) {
	p.world.clients[c.id].open = false
	p.tombs[c.id] = wire.Held{Ref: wire.Ref{ID: c.id, Epoch: c.owner}, Phase: wire.PhaseClosed, Reason: wire.ReasonPeer}
	p.forget(c)
	p.send(packet{typ: wire.TypeClosed, ref: wire.Ref{ID: c.id, Epoch: c.owner}})
}

func (p *player) inventory(nonce uint32) {
	k := packet{typ: wire.TypeInventoryReply, nonce: nonce}
	for _, id := range sortedKeys(p.have) {
		c := p.have[id]
		k.held = append(k.held, wire.Held{Ref: wire.Ref{ID: id, Epoch: c.owner}, Phase: c.phase, Attempt: c.attempt, Group: c.group})
	}
	for _, id := range sortedKeys(p.tombs) {
		k.held = append(k.held, p.tombs[id])
	}
	if p.world.chance(4) {
		p.lie(&k)
	}
	p.send(k)
}

// lie says that it has parked what others own, in attempts as they may have been.
func (p *player) lie(k *packet) {
	for _, id := range sortedKeys(p.world.rows) {
		r := p.world.rows[id]
		if r.owner == p.id || p.have[id] != nil || r.ownerBefore == p.id {
			continue // that could be true
		}
		h := wire.Held{Ref: wire.Ref{ID: id, Epoch: r.epochBefore}, Phase: wire.PhaseParked, Attempt: r.epoch}
		if r.group != nil {
			h.Group = r.group.Name
		}
		k.held = append(k.held, h)
	}
}

// channelEnded: nobody will come any more.
func (p *player) channelEnded() {
	p.eof = true
	for _, id := range sortedKeys(p.have) {
		c := p.have[id]
		switch c.phase {
		case wire.PhaseFreezing:
			c.phase, c.attempt, c.batch = wire.PhaseActive, 0, nil
		case wire.PhaseParked, wire.PhaseAdopted:
			delete(p.have, id)
		default:
		}
	}
	clear(p.batches)
}

func sortedKeys[V any](m map[uint64]V) []uint64 {
	out := make([]uint64, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

func (k packet) String() string { return fmt.Sprintf("%d/%s %v", k.kind, k.typ, k.ref) }
