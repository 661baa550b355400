package handoff

import (
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// Groups of sessions live in one process. While two processes serve, the old one knows
// where each is: a new process asks it before the first of its own sessions joins a
// group that it does not have.

// hostGroup is a group as a host sees it.
type hostGroup struct {
	name    string
	members map[uint64]*resident
	waiting []groupWish // for the end of a move, or for the old process's word
	asked   bool        // the old process was
	there   bool        // it lives in the new process
	// A member of the new process's that wants to join, in the old process.
	remote []wire.Ref
}

type groupWish struct {
	ref  wire.Ref
	name string
}

func (h *host) group(name string) *hostGroup {
	g := h.groups[name]
	if g == nil {
		g = &hostGroup{name: name, members: map[uint64]*resident{}}
		h.groups[name] = g
	}
	return g
}

func (h *host) enterGroup(r *resident, name string) {
	h.leaveGroup(r)
	r.group = name
	if name != "" {
		h.group(name).members[r.id] = r
	}
}

func (h *host) leaveGroup(r *resident) {
	g := h.groups[r.group]
	if g == nil {
		return
	}
	delete(g.members, r.id)
	if len(g.members) == 0 && len(g.waiting) == 0 && len(g.remote) == 0 && !g.there {
		delete(h.groups, r.group)
	}
}

// joinsGroup answers a session of this process that wants to join or leave a group.
func (h *host) joinsGroup(ref wire.Ref, name string) {
	r := h.residents[ref.ID]
	if r == nil || r.owner != ref.Epoch || !r.owned {
		return
	}
	if name == "" {
		h.grant(r, "")
		return
	}
	g := h.group(name)
	switch {
	case len(g.members) > 0 && (h.giving == nil || h.giving.groupUnit(name) == nil):
		h.grant(r, name)
	case len(g.members) > 0: // the group is on its way
		g.waiting = append(g.waiting, groupWish{ref, name})
	case g.there: // so has this session to be
		if gv := h.giving; gv != nil && !gv.broken && r.unit == nil {
			u := gv.newUnit("", r)
			h.local.put(&wire.Message{Type: wire.TypeFreeze, Refs: u.refs()}, nil)
			return
		}
		h.refuseGroup(ref, name, "the group has moved to a new process")
	case h.up != nil:
		g.waiting = append(g.waiting, groupWish{ref, name})
		if !g.asked {
			g.asked = true
			h.up.put(&wire.Message{Type: wire.TypeGroup, Refs: []wire.Ref{ref}, Group: name}, nil)
		}
	default:
		h.grant(r, name)
	}
}

func (h *host) grant(r *resident, name string) {
	h.enterGroup(r, name)
	h.local.put(&wire.Message{Type: wire.TypeGrouped, Refs: []wire.Ref{{ID: r.id, Epoch: r.owner}}, Group: name}, nil)
}

func (h *host) refuseGroup(ref wire.Ref, name, why string) {
	h.local.put(&wire.Message{Type: wire.TypeGrouped, Refs: []wire.Ref{ref}, Group: name, Text: why}, nil)
}

// grantWaiting asks again for the sessions that wait for a group, or for any ("").
func (h *host) grantWaiting(name string) {
	for n, g := range h.groups {
		if name != "" && n != name {
			continue
		}
		list := g.waiting
		g.waiting, g.asked = nil, false
		for _, w := range list {
			h.joinsGroup(w.ref, w.name)
		}
	}
}

// groupAnswered is the old process's word: the group may live here, or why not.
func (h *host) groupAnswered(_ wire.Ref, name, refused string) {
	g := h.groups[name]
	if g == nil {
		return
	}
	list := g.waiting
	g.waiting, g.asked = nil, false
	for _, w := range list {
		r := h.residents[w.ref.ID]
		switch {
		case r == nil || r.owner != w.ref.Epoch:
		case refused != "" && len(g.members) == 0:
			h.refuseGroup(w.ref, name, refused)
		default:
			h.grant(r, name)
		}
	}
}

// freezeGroup asks all members of a group to come to a safe point.
func (g *giving) freezeGroup(name string) {
	hg := g.h.groups[name]
	if hg == nil || len(hg.members) == 0 || g.groupUnit(name) != nil {
		return
	}
	rs := make([]*resident, 0, len(hg.members))
	for _, r := range hg.members {
		if !r.owned || r.unit != nil || r.refusals >= maxRefusals {
			return // it comes again with another of its members, or not at all
		}
		rs = append(rs, r)
	}
	u := g.newUnit(name, rs...)
	parts := wire.BatchRefs(u.refs())
	for i, part := range parts {
		g.h.local.put(&wire.Message{Type: wire.TypeFreeze, Group: name, Refs: part, Last: i == len(parts)-1}, nil)
	}
}

// asksForGroup answers the new process, at once or when the group has moved.
func (g *giving) asksForGroup(ref wire.Ref, name string) {
	hg := g.h.group(name)
	if len(hg.members) == 0 {
		hg.there = true
		g.down.put(&wire.Message{Type: wire.TypeGrouped, Refs: []wire.Ref{ref}, Group: name}, nil)
		return
	}
	if g.settled && g.groupUnit(name) == nil {
		g.refuseRemote(ref, name)
		return
	}
	hg.remote = append(hg.remote, ref)
}

func (g *giving) refuseRemote(ref wire.Ref, name string) {
	g.down.put(&wire.Message{Type: wire.TypeGrouped, Refs: []wire.Ref{ref}, Group: name,
		Text: "the group still lives in the old process, which a member does not let go"}, nil)
}

// answerGroups answers the new process about groups that stay here.
func (g *giving) answerGroups() {
	for name, hg := range g.h.groups {
		if g.groupUnit(name) != nil {
			continue
		}
		for _, ref := range hg.remote {
			g.refuseRemote(ref, name)
		}
		hg.remote = nil
	}
}

// groupMoved is called when a group lives in the new process.
func (g *giving) groupMoved(name string) {
	if name == "" {
		return
	}
	hg := g.h.group(name)
	hg.there = true
	remote := hg.remote
	hg.remote = nil
	for _, ref := range remote {
		g.down.put(&wire.Message{Type: wire.TypeGrouped, Refs: []wire.Ref{ref}, Group: name}, nil)
	}
	g.h.grantWaiting(name)
}

// groupStays is called when an attempt to move a group came to nothing.
func (g *giving) groupStays(name string) {
	if name == "" {
		return
	}
	if g.settled {
		g.answerGroups()
	}
	g.h.grantWaiting(name)
}

// forgetHomes is called when there is no new process any more: groups live here.
func (h *host) forgetHomes() {
	for name, g := range h.groups {
		g.there, g.remote = false, nil
		h.grantWaiting(name)
		if len(g.members) == 0 && len(g.waiting) == 0 {
			delete(h.groups, name)
		}
	}
}
