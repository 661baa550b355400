package handoff

import (
	"errors"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// How the new process becomes the owner of what it was offered, and what is decided about
// that when it dies.

// offered takes ADOPTED of the new process, and commits.
func (g *giving) offered(refs []wire.Ref) {
	var units []*unit
	for _, ref := range refs {
		u, m := g.find(ref, unitOffered)
		if u == nil {
			continue
		}
		m.adopted = true
		all := true
		for _, x := range u.members {
			all = all && x.adopted
		}
		if all {
			units = append(units, u)
		}
	}
	var singles []*unit
	for _, u := range units {
		if u.group == "" {
			singles = append(singles, u)
		} else {
			g.commit([]*unit{u})
		}
	}
	if len(singles) > 0 {
		g.commit(singles)
	}
}

// commit makes the new process the owner: RESUME, and a PING whose answer says that it
// was read.
func (g *giving) commit(units []*unit) {
	var refs []wire.Ref
	for _, u := range units {
		u.stage = unitCommitting
		refs = append(refs, u.refs()...)
	}
	g.h.count++
	nonce := uint64(g.h.count)
	uc := &unconfirmed{units: units, ids: refs}
	g.unread[nonce] = uc
	group := units[0].group
	parts := wire.BatchRefs(refs)
	for i, part := range parts {
		m := &wire.Message{Type: wire.TypeResume, Group: group, Refs: part, Last: group != "" && i == len(parts)-1}
		var then func(error)
		if i == len(parts)-1 || group == "" {
			then = func(err error) {
				if err != nil {
					uc.unsent.Store(true)
					g.h.in.post(func() { g.notSent(nonce, err) })
				}
			}
		}
		g.down.put(m, then)
	}
	g.down.put(&wire.Message{Type: wire.TypePing, Nonce: nonce}, nil)
}

// notSent takes back what could not be committed: nobody was told RESUME. Singles fit
// one message, because one ADOPTED names at most that many.
func (g *giving) notSent(nonce uint64, err error) {
	uc := g.unread[nonce]
	if uc == nil {
		return
	}
	delete(g.unread, nonce)
	for _, u := range uc.units {
		g.takeBack(u, false)
	}
	if g.h.giving == g {
		g.h.newLost(err)
	}
}

// confirmed says that the new process has read a RESUME: its copies here are closed.
func (g *giving) confirmed(nonce uint64) {
	uc := g.unread[nonce]
	if uc == nil {
		return
	}
	delete(g.unread, nonce)
	g.moved += len(uc.ids)
	g.gone(uc)
	g.pump()
}

// gone closes this process's copies of sessions that are not its own any more.
func (g *giving) gone(uc *unconfirmed) {
	for _, part := range wire.BatchRefs(uc.ids) {
		g.h.local.put(&wire.Message{Type: wire.TypeRelease, Refs: part}, nil)
	}
	for _, u := range uc.units {
		for _, m := range u.members {
			m.r.unit = nil
			g.h.forget(m.r)
		}
		g.drop(u)
		g.groupMoved(u.group)
	}
}

// loseUnconfirmed gives up sessions that a process which is gone may have begun to
// serve: going on with them could use a record number twice.
func (g *giving) loseUnconfirmed(nonce uint64) {
	uc := g.unread[nonce]
	delete(g.unread, nonce)
	g.lost += len(uc.ids)
	g.h.log.Error("sessions lost: the new process died with them", "sessions", len(uc.ids), "first", uc.ids[0].ID)
	g.gone(uc)
}

// resolve decides, after the death of the new process, about RESUMEs that it may have
// read.
func (g *giving) resolve() {
	g.down.sever() // what waits is not sent any more
	<-g.down.ended
	never := map[wire.Ref]bool{}
	if g.far != nil {
		_ = g.far.Conn().SetReadDeadline(time.Now().Add(time.Second))
		for {
			m, err := g.far.Recv()
			var lost *wire.DescriptorsLostError
			if errors.As(err, &lost) {
				continue // an ADOPT; what matters may come behind it
			}
			if err != nil {
				break
			}
			m.CloseSockets()
			if m.Type == wire.TypeResume {
				for _, r := range m.Refs {
					never[r] = true
				}
			}
		}
	}
	for nonce, uc := range g.unread {
		// The last message of a group decides: without it none of its members was begun.
		if uc.unsent.Load() || never[uc.ids[len(uc.ids)-1]] {
			delete(g.unread, nonce)
			for _, u := range uc.units {
				g.takeBack(u, false)
			}
			continue
		}
		g.loseUnconfirmed(nonce)
	}
}
