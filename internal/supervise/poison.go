package supervise

import (
	"fmt"
	"sort"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/ownership"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// A session in whose handling workers die must not take its neighbours with it for
// ever, and a neighbour must not be blamed for it.
//
//	a worker dies --> the sessions that it was handling are suspects
//	                    |
//	                    v
//	        the quarantine worker has them, and nothing else
//	          |                   |                     |
//	   poison_reset passes   it dies over one      it dies over several
//	          |                   |                     |
//	     acquitted: back     that one has crashed   they come back in lots, one lot at
//	     to the others       as often as poison     a time, until one is alone
//	                         says: closed
//
// Only a session that was the only one being handled is ever closed, or members of a group
// that were the only ones, much later (group_blame.go). Which ones were,
// a worker says in memory that outlives it (marks.go). Of a worker that does not say,
// all sessions are suspects, if they are few.

const (
	// maxUnmarked is up to how many sessions of a worker without marks are suspects.
	maxUnmarked = 64
	// lots is into how many parts suspects are cut after a crash with several of them.
	lots = 8
	// trialTime is how long a lot is served before it is acquitted. The others wait.
	trialTime = 2 * time.Second
	// wardFailures is how many times in a row a quarantine worker may not get ready
	// before suspects go to other workers.
	wardFailures = 3
)

// ward is the quarantine of one pool.
type ward struct {
	worker   *worker // nil: none is running
	starting bool
	wanted   bool // a suspect waits for it
	failures int  // starts in a row that came to nothing
	deaths   int  // in a row
	retryAt  time.Time

	suspects map[uint64]*suspect
	lot      int // the lot that is on trial; 0: none
	lots     int // given out so far
}

// suspect is a session in whose handling a worker died, or a member of its group.
type suspect struct {
	ss    *session
	lot   int       // 0: it may be with others
	since time.Time // it is served again
}

func (d *ward) add(ss *session) *suspect {
	sp := d.suspects[ss.ID]
	if sp == nil {
		sp = &suspect{ss: ss}
		if d.suspects == nil {
			d.suspects = map[uint64]*suspect{}
		}
		d.suspects[ss.ID] = sp
	}
	sp.since = time.Time{}
	return sp
}

// acquit ends the suspicion; the next move, or end, of the session records that.
func (d *ward) acquit(ss *session) {
	ss.crashes = 0
	delete(d.suspects, ss.ID)
}

// place says which worker gets a suspect; ok is false for everyone else. nil: it waits.
func (d *ward) place(ss *session, serving uint32) (w *worker, ok bool) {
	sp := d.suspects[ss.ID]
	if sp == nil || d.failures >= wardFailures {
		return nil, false
	}
	d.wanted = true
	if w = d.worker; w == nil || w.gen != serving || w.state != workerReady || !w.usable() || w.deaf {
		return nil, true
	}
	if sp.lot != d.lot && ss.Group == nil {
		return nil, true
	}
	return w, true
}

// blame finds out over which sessions a worker died, before they get new owners.
func (s *Supervisor) blame(w *worker, was workerState) {
	limit := w.pool.cfg.Poison
	ours := w.killed && !w.beatenDead || was == workerStarting || was == workerStopping && !w.killed
	if limit == 0 || s.stopping || ours {
		return
	}
	s.blameOffered(w)
	if len(w.Sessions) == 0 {
		return
	}
	var list []*session
	known := w.marks != nil
	switch {
	case known:
		list = w.marks.handled(w)
	case len(w.Sessions) <= maxUnmarked:
		for _, ls := range w.Sessions {
			ss := sessionOf(ls)
			list = append(list, ss)
		}
	}
	// What is parked was not being handled.
	n := 0
	for _, ss := range list {
		if a := ss.Try; a == nil || a.Step == ownership.Freezing {
			list[n] = ss
			n++
		}
	}
	list = list[:n]
	d := &w.pool.ward
	if known && len(list) > 0 {
		s.acquitBystanders(w, list)
	}
	for _, ss := range list {
		if ss.crashes < 255 && !ss.blamed { // a dead supervisor may have seen the same death
			ss.crashes++
		}
		ss.blamed = true
	}
	if len(list) == 1 && int(list[0].crashes) >= limit {
		s.closePoison(list[0])
		return
	}
	if list = s.closeGroup(w, list); len(list) == 0 {
		return
	}
	sort.Slice(list, func(i, j int) bool { return list[i].ID < list[j].ID })
	size := (len(list) + lots - 1) / lots
	again := 0
	for _, ss := range list {
		sp := d.add(ss)
		s.led.put(int(ss.slot), ss.slotEntry())
		sp.lot = 0
		if ss.crashes > 1 && ss.Group == nil { // it was not alone the last time
			if again%size == 0 {
				d.lots++
			}
			again++
			sp.lot = d.lots
		}
	}
	s.suspectGroups(list)
	s.led.count(cntQuarantined, uint64(len(list)))
	s.log.Warn("a worker died while it was handling sessions: they go on in quarantine", "pool", w.pool.name, "pid", w.pid,
		"suspects", len(list), "others", len(w.Sessions)-len(list), "known", known)
}

// acquitBystanders ends the suspicion of those that were in quarantine with list and
// not being handled: their row of crashes is broken.
func (s *Supervisor) acquitBystanders(w *worker, list []*session) {
	if !w.quarantine {
		return
	}
	handled := map[uint64]bool{}
	for _, ss := range list {
		handled[ss.ID] = true
	}
	for _, ls := range w.Sessions {
		ss := sessionOf(ls)
		if !handled[ss.ID] {
			w.pool.ward.acquit(ss)
		}
	}
}

// suspectGroups puts the groups of suspects under quarantine with them: a group cannot be
// taken apart.
func (s *Supervisor) suspectGroups(list []*session) {
	type part struct {
		group *ownership.Group
		owner *ownership.Worker
	}
	seen := map[part]bool{}
	for _, ss := range list {
		g := ss.Group
		if g == nil || seen[part{g, ss.Owner}] {
			continue
		}
		seen[part{g, ss.Owner}] = true
		for _, m := range g.Members {
			if m.Owner == ss.Owner {
				ss.pool.ward.add(sessionOf(m))
			}
		}
	}
}

// closePoison ends a session over which workers died.
func (s *Supervisor) closePoison(ss *session) {
	peer := ""
	if f, err := ss.allFacts(s.led); err == nil {
		peer = f.Peer
	}
	s.log.Error("session closed as poison: worker after worker died while handling it, and nothing else", "session", sid(ss.ID),
		"peer", peer, "pool", ss.pool.name, "crashes", ss.crashes)
	s.endPoison(ss)
}

func (s *Supervisor) endPoison(ss *session) {
	if op := ss.pool.op; op != nil {
		op.report.Closed++
		op.reason(wire.ReasonPoison.String())
	}
	s.retain.shutdown(ss.ID)
	s.m.Closed(ss.Owner, wire.Ref{ID: ss.ID, Epoch: ss.Epoch}, wire.ReasonPoison)
}

// watchWards runs with every tick: it starts quarantine workers, acquits who has been
// served for long enough, and lets the next lot in.
func (s *Supervisor) watchWards(now time.Time) {
	if s.recovery != nil || s.stopping || s.quiescing {
		return
	}
	for _, p := range s.pools {
		d := &p.ward
		if w := d.worker; w != nil && (w.state == workerRetiring || w.state == workerDetached) {
			// An upgrade moves its sessions like everyone's, and the new program is given
			// the benefit of the doubt. One that cannot be reached keeps what it has.
			for _, ls := range w.Sessions {
				ss := sessionOf(ls)
				d.acquit(ss)
			}
			d.worker = nil
		}
		if len(d.suspects) > 0 {
			s.tryWard(p, now)
		}
		s.emptyWard(p, now)
		s.startWard(p, now)
	}
}

func (s *Supervisor) tryWard(p *pool, now time.Time) {
	d := &p.ward
	busy, next := false, 0
	for _, sp := range d.suspects {
		ss := sp.ss
		if ss.owner() == nil {
			sp.since = time.Time{}
			busy = busy || sp.lot == d.lot && ss.Try != nil
			if sp.lot > 0 && (next == 0 || sp.lot < next) {
				next = sp.lot
			}
			continue
		}
		if sp.since.IsZero() {
			sp.since = now
		}
		limit := time.Duration(p.cfg.PoisonReset)
		if sp.lot > 0 {
			limit = min(limit, trialTime)
		}
		if now.Sub(sp.since) >= limit {
			d.acquit(ss)
			continue
		}
		busy = busy || ss.Group == nil
	}
	if w := d.worker; next > 0 && w != nil && w.marks == nil && w.load() > 0 {
		busy = true // without marks only who is alone in it can be told from the others
	}
	if !busy {
		d.lot = next
	}
}

// emptyWard moves who is acquitted to other workers, and stops a quarantine worker that
// nobody needs.
func (s *Supervisor) emptyWard(p *pool, now time.Time) {
	d := &p.ward
	w := d.worker
	if w == nil || w.state != workerReady || !w.usable() {
		return
	}
	if len(d.suspects) == 0 && len(w.Sessions) == 0 && w.Incoming == 0 {
		s.stopWorker(w, "no session is under suspicion")
		d.deaths = 0
		return
	}
	if p.target() == nil {
		return
	}
	var list []*session
	for _, ls := range w.Sessions {
		ss := sessionOf(ls)
		if len(list) >= window {
			break
		}
		if d.suspects[ss.ID] != nil || ss.Try != nil || ss.waits(now) {
			continue
		}
		g := ss.Group
		switch {
		case g == nil:
			list = append(list, ss)
		case !d.suspectsOf(g):
			s.freezeGroup(g)
		}
	}
	if len(list) > 0 {
		s.freeze(w, list, nil)
	}
}

func (d *ward) suspectsOf(g *ownership.Group) bool {
	for id := range g.Members {
		if d.suspects[id] != nil {
			return true
		}
	}
	return false
}

// startWard starts a quarantine worker when one is wanted: the pool's command, like any.
func (s *Supervisor) startWard(p *pool, now time.Time) {
	d := &p.ward
	if d.failures >= wardFailures && now.After(d.retryAt) {
		d.failures = wardFailures - 1 // one more try
	}
	if !d.wanted || d.worker != nil || d.starting || now.Before(d.retryAt) {
		return
	}
	d.wanted = false
	if len(d.suspects) == 0 {
		return
	}
	d.starting = true
	s.spawn(p, p.serving, p.command, func(w *worker, err error) {
		d.starting = false
		if err != nil {
			s.wardFailed(p, err)
		} else {
			d.worker, w.quarantine = w, true
		}
		s.fill(p) // while this one was being started it counted as one of the others
	})
}

func (s *Supervisor) wardFailed(p *pool, err error) {
	d := &p.ward
	d.failures++
	d.retryAt = s.now().Add(100 * time.Millisecond << min(d.failures, 5))
	if d.failures == wardFailures {
		s.log.Error("no quarantine worker can be had; suspects go to other workers", "pool", p.name, "error", err)
		d.retryAt = s.now().Add(time.Minute)
		return
	}
	s.log.Warn("quarantine worker cannot be started; trying again", "pool", p.name, "error", err)
}

// wardReady is told that a worker of the pool is ready.
func (s *Supervisor) wardReady(w *worker) {
	if w.quarantine {
		w.pool.ward.failures = 0
		s.log.Info("this is the quarantine worker", "pool", w.pool.name, "pid", w.pid, "suspects", len(w.pool.ward.suspects))
	}
}

// wardDied takes the death of a quarantine worker.
func (s *Supervisor) wardDied(w *worker, was workerState) {
	d := &w.pool.ward
	if d.worker != w {
		return
	}
	d.worker = nil
	switch {
	case was == workerStarting || w.broke != nil:
		s.wardFailed(w.pool, fmt.Errorf("worker (pid %d) ended before it was ready, or broke the protocol", w.pid))
	case was == workerReady || w.beatenDead:
		d.retryAt = s.now().Add(100 * time.Millisecond << min(d.deaths, 5))
		d.deaths++
	}
}

// recoverWard takes a worker over from an earlier supervisor: its marks, and its place
// as the quarantine worker.
func (s *Supervisor) recoverWard(w *worker) {
	if w.able&wire.AbleMarks != 0 {
		s.recoverMarks(s.ctx, w)
	}
	if w.quarantine && w.pool.ward.worker == nil {
		w.pool.ward.worker = w
	}
}

// recoverSuspect takes a session over that was in quarantine, or on its way there.
func (s *Supervisor) recoverSuspect(ss *session) {
	if ss.crashes == 0 {
		return
	}
	d := &ss.pool.ward
	sp := d.add(ss)
	if ss.crashes > 1 && ss.Group == nil {
		d.lots++
		sp.lot = d.lots
	}
}
