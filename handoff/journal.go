package handoff

import (
	"errors"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// Journals of sessions in the software layer, in memory that came with WELCOME. A
// session has a place there from before ADOPTED is sent until it is no longer ours by
// anyone's reckoning: while PARKED is on its way the place says where the session was
// taken off its Conn.

// openArena maps the arena that came with WELCOME, if one did. It stays mapped as long
// as the process lives, since handlers may outlive the loop.
func (w *worker) openArena(m *wire.Message) {
	if m.Welcome.Arena == 0 {
		return
	}
	defer m.CloseSockets()
	mem, err := sys.MapShared(m.File, int(m.Welcome.Arena))
	if err == nil {
		if w.arena, err = ktls.OpenArena(mem); err != nil {
			_ = sys.Unmap(mem)
		}
	}
	if err != nil {
		w.log.Warn("no journals are kept: a crash of this worker will cost its sessions in the software layer", "error", err)
	}
}

// journal begins the journal of a session. nil: it has none.
func (w *worker) journal(c *Conn, epoch wire.Epoch, t *ktls.Conn) *ktls.Place {
	id := c.id
	c.placeless.Store(false)
	if w.arena == nil || t.Layer() != ktls.LayerSoftware {
		return nil
	}
	p, err := w.arena.Place(ktls.JournalKey{ID: id, Epoch: uint64(epoch)})
	if err == nil {
		if err = t.Journal(p); err != nil {
			p.Free()
		}
	}
	switch {
	case errors.Is(err, ktls.ErrArenaFull):
		c.placeless.Store(true)
		if !w.arenaFull.Swap(true) {
			w.log.Warn("there is no room for more journals: sessions without one are lost if this worker crashes; raise crash_memory", "session", id)
		}
		return nil
	case err != nil:
		w.log.Warn("session has no journal: it is lost if this worker crashes", "session", id, "error", err)
		return nil
	}
	return p
}

// rejournal is journal for a session that comes back onto its Conn. The place of before
// says the same until the new one is used.
func (c *Conn) rejournal(t *ktls.Conn) {
	c.mu.Lock()
	app := c.app
	c.mu.Unlock()
	k, durable := c.w.takeCommits(c.id, c.s.owner, t, app)
	p := c.w.journal(c, c.s.owner, t)
	c.freePlace()
	c.mu.Lock()
	c.place, c.commits, c.durable = p, k, durable
	c.mu.Unlock()
}

// freePlace ends the journal of a session that has been taken off its Conn or closed.
func (c *Conn) freePlace() {
	c.mu.Lock()
	p, k := c.place, c.commits
	c.place, c.commits = nil, nil
	c.mu.Unlock()
	if p != nil {
		p.Free()
	}
	k.Free() // after the journal that counts with it
}

// leavePlace is freePlace for a session that may still be on its Conn, when this process
// is about to end: what is written there disturbs nobody.
func (c *Conn) leavePlace() {
	c.mu.Lock()
	c.place, c.commits = nil, nil
	c.mu.Unlock()
}

// placeLater gives a session a place in the arena that found none when it came. It is
// called before a Read; with s nothing else may be under way.
func (c *Conn) placeLater(s *ktls.Conn) {
	roomy := c.w.roomy.Load()
	c.mu.Lock()
	defer c.mu.Unlock()
	if roomy == c.triedAt || c.tls != s || c.detached || c.dead != nil || c.place != nil || !c.placeless.Load() || !c.w.arena.HasPlace() {
		return
	}
	c.triedAt = roomy
	p, err := c.w.arena.Place(ktls.JournalKey{ID: c.id, Epoch: uint64(c.s.owner)}) // which never changes
	if err != nil {
		return
	}
	if err := s.TryJournal(p); err != nil {
		p.Free() // another time
		return
	}
	c.place = p
	c.placeless.Store(false)
}

// isExposed says whether a crash of this process costs the session, or what it has
// committed, although the pool wants it otherwise.
func (c *Conn) isExposed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.tls.Layer() == ktls.LayerSoftware && !c.place.Live() {
		return true
	}
	return c.w.commit != commitNothing && !(c.durable && c.commits.Live())
}

// countExposed counts those sessions when there is any, and lets those that have no place
// try again when there are places.
func (w *worker) countExposed() {
	w.exposed = 0
	if w.arena == nil || w.arena.Lost() == 0 {
		return
	}
	for _, s := range w.sessions {
		if s.conn.isExposed() {
			w.exposed++
		}
	}
	if w.exposed > 0 && w.arena.HasPlace() {
		w.roomy.Add(1)
	}
}

// arenaTrim is how long a journal's memory is kept for the next session that needs some.
const arenaTrim = 5 * time.Second

// trimArena gives memory back that journals did not need for a while.
func (w *worker) trimArena() {
	for _, a := range []*ktls.Arena{w.arena, w.private.opened()} {
		if a == nil {
			continue
		}
		if err := a.Trim(); err != nil {
			w.log.Debug("memory of journals was not given back", "error", err)
		}
	}
}
