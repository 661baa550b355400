package handoff

import (
	"fmt"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// What an upgrade does next, and when it is over.

// add tells of sessions that were made while the upgrade is on.
func (g *giving) add(refs []wire.Ref) {
	if !g.began || g.broken {
		return
	}
	for _, r := range refs {
		g.queue = append(g.queue, r.ID)
	}
	g.pump()
}

// ticked looks at the time limits.
func (g *giving) ticked(now time.Time) {
	h := g.h
	if !g.killAt.IsZero() && now.After(g.killAt) {
		g.killAt = time.Time{}
		if g.why == nil {
			g.why = fmt.Errorf("it was not ready within %v and was killed", h.embed.startTime)
		}
		killHolder(g.inode, h.log)
	}
	for u := range g.units {
		if now.Before(u.deadline) {
			continue
		}
		switch u.stage {
		case unitFreezing:
			g.takeBack(u, true)
		case unitOffered:
			h.log.Error("the new process does not answer", "session", u.first())
			h.newLost(errNoAnswer)
			return
		case unitCommitting:
		}
	}
	for id, at := range g.later {
		if now.After(at) {
			delete(g.later, id)
			g.queue = append(g.queue, id)
		}
	}
	if !g.drainUntil.IsZero() && now.After(g.drainUntil) && h.role == roleRetiring {
		g.drainUntil = time.Time{}
		h.log.Warn("time to drain is over; closing the sessions that are left", "sessions", len(h.residents))
		g.thawAll()
		g.broken = true
		h.stop()
		return
	}
	g.pump()
}

// pump asks the next sessions to come to a safe point, and sees whether all is done.
func (g *giving) pump() {
	if !g.began || g.h.role == roleStopping || g.h.giving != g {
		return
	}
	timeUp := !g.settled && time.Since(g.begun) > g.h.embed.moveTime
	var refs []wire.Ref
	for len(g.queue) > 0 && g.inFlight < giveWindow && !g.broken && !timeUp {
		id := g.queue[0]
		g.queue = g.queue[1:]
		r := g.h.residents[id]
		switch {
		case r == nil || !r.owned || r.unit != nil || r.refusals >= maxRefusals:
		case r.group != "":
			g.freezeGroup(r.group)
		default:
			u := g.newUnit("", r)
			refs = append(refs, u.refs()...)
		}
	}
	for _, part := range wire.BatchRefs(refs) {
		g.h.local.put(&wire.Message{Type: wire.TypeFreeze, Refs: part}, nil)
	}
	if g.inFlight > 0 || !timeUp && !g.quiet() {
		g.wasQuiet = false
		return
	}
	if !timeUp && !g.wasQuiet {
		// What a handshake that is just over has posted comes first.
		g.wasQuiet = true
		g.h.in.post(g.pump)
		return
	}
	switch {
	case !g.settled && !g.broken:
		g.settle()
	case g.h.role == roleRetiring && !g.over && len(g.h.residents) == 0:
		g.over = true
		g.h.retire()
	}
}

// quiet reports that nothing is left to be moved, or to be made.
func (g *giving) quiet() bool {
	if len(g.queue) > 0 && !g.broken || g.h.front.under.Load() > 0 || !g.pausedNow() {
		return false
	}
	if g.settled {
		return len(g.h.residents) == 0
	}
	return len(g.later) == 0 && !g.unsettled()
}

func (g *giving) pausedNow() bool {
	select {
	case <-g.paused:
		return true
	default:
		return false
	}
}

// unsettled reports sessions on their way to our own worker.
func (g *giving) unsettled() bool {
	for _, r := range g.h.residents {
		if !r.owned {
			return true
		}
	}
	return false
}

// settle lets the new process take over.
func (g *giving) settle() {
	if g.settled {
		return
	}
	g.settled, g.moving = true, time.Since(g.begun)
	g.answerGroups()
	g.down.put(&wire.Message{Type: wire.TypeSettled}, nil)
}
