package supervise

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// estate is what a dead worker left behind of its sessions: its arena, with the journals
// of those in the software layer and with what applications committed, and the sessions
// that nobody else owns yet.
//
//	death seen -> arena from the keeper -> for each session: its socket from the keeper,
//	positions from the socket, record from both -> parked, to be adopted as any other
//
// Until it has another owner the ledger goes on to say that the dead worker owns it, and
// the keeper has the arena: a supervisor that dies meanwhile leaves all of this to the
// next one, which begins anew. Nothing is written into the arena or to the socket, so
// that it comes to the same.
type estate struct {
	worker  uint64
	left    int        // sessions without another owner
	waiting []*session // to be looked at
	busy    bool       // somebody looks

	// Of the goroutine that looks, one at a time.
	mem      []byte
	journals *ktls.Journals
	commits  *ktls.CommitLog
	taken    int       // bytes found for its sessions
	until    time.Time // how long those wait for the arena that can do without; zero: none has
}

// inherit takes a session of a worker that was seen dead.
func (s *Supervisor) inherit(ss *session, worker uint64) {
	e := s.estates[worker]
	if e == nil {
		e = &estate{worker: worker}
		if s.estates == nil {
			s.estates = map[uint64]*estate{}
		}
		s.estates[worker] = e
	}
	e.left++
	ss.estate = e
	if !ss.software {
		s.settleKeys(ss, func() { s.inspect(ss, e) })
		return
	}
	if r := ss.rekey; r != nil {
		for _, f := range r.waiters {
			f(errors.New("its worker died"))
		}
		ss.rekey = nil
	}
	s.inspect(ss, e)
}

// inspect has somebody look how far the dead worker came with a session.
func (s *Supervisor) inspect(ss *session, e *estate) {
	e.waiting = append(e.waiting, ss)
	if !e.busy {
		e.busy = true
		go s.post(func() { s.settleEstate(e) }) // when its other sessions are here as well
	}
}

// heir is a session that is looked at, away from the goroutine that owns the ledger.
type heir struct {
	ss    *session
	key   ktls.JournalKey
	facts []byte
	base  []byte // kernel layer: the record state that every owner begins with
	rec   *ktls.Recovered
	err   error

	com    *ktls.Committed // nil: its application committed nothing
	comErr error           // what it committed cannot be told
}

func (s *Supervisor) settleEstate(e *estate) {
	heirs := make([]heir, 0, len(e.waiting))
	for _, ss := range e.waiting {
		if s.sessions[ss.ID] == ss && ss.estate == e {
			heirs = append(heirs, s.heir(ss))
		}
	}
	e.waiting = nil
	go func() {
		for len(heirs) > 0 {
			batch := heirs[:min(len(heirs), wire.MaxItems)]
			heirs = heirs[len(batch):]
			s.recoverBatch(e, batch)
			s.post(func() { s.inherited(e, batch) })
		}
		s.post(func() {
			e.busy = false
			if len(e.waiting) > 0 {
				e.busy = true
				s.settleEstate(e)
				return
			}
			s.closeEstate(e)
		})
	}()
}

// heir says what is to be known of a session.
func (s *Supervisor) heir(ss *session) heir {
	h := heir{ss: ss, key: ktls.JournalKey{ID: ss.ID, Epoch: uint64(ss.Epoch)}}
	if ss.software {
		h.facts = ss.facts(s.led)
		return h
	}
	r, err := s.led.base(int(ss.slot))
	if err != nil {
		h.err = err
		return h
	}
	h.base = r
	return h
}

// recoverBatch finds out how far the dead owner of some sessions came with each. In the
// kernel layer the socket has everything but what the application committed.
func (s *Supervisor) recoverBatch(e *estate, batch []heir) {
	var entries []keeper.Entry
	var ids []uint64
	for i := range batch {
		if batch[i].ss.software {
			ids = append(ids, batch[i].ss.ID)
		}
	}
	until := time.Now().Add(insistLimit)
	if len(ids) == 0 { // once for all of them: thousands are many batches
		if e.until.IsZero() {
			e.until = until
		}
		until = e.until
	}
	err := s.insist(until, func(ctx context.Context) error { return e.open(ctx, s.keeper) })
	s.sayUncommitted(batch, err)
	if err == nil && len(ids) > 0 {
		err = s.insist(time.Now().Add(insistLimit), func(ctx context.Context) (err error) {
			if entries, err = s.keeper.Get(ctx, keeper.KindSocket, ids...); err != nil {
				err = fmt.Errorf("%w: %w", errNoSocket, err)
			}
			return err
		})
	}
	socks := make(map[uint64]int, len(entries))
	for i := range entries {
		if len(entries[i].FDs) == 1 {
			socks[entries[i].Key.ID] = entries[i].FDs[0]
		}
	}
	for i := range batch {
		h := &batch[i]
		record := h.base
		if h.ss.software {
			fd, ok := socks[h.ss.ID]
			switch {
			case err != nil:
				h.err = err
			case !ok:
				h.err = errNoSocket
			default:
				h.rec, h.err = e.journals.Recover(h.key, h.facts, fd)
			}
			if h.err == nil {
				record = h.rec.Record
			}
		}
		if h.err == nil && e.commits != nil {
			h.com, h.comErr = e.commits.Amend(h.key, record, h.rec)
		}
		if h.err == nil && !e.holds(h) {
			if h.ss.software { // else it is made of base, which holds no key and is needed still
				h.wipe()
			}
			h.rec, h.com, h.err = nil, nil, errTooMuch
		}
	}
	for i := range entries {
		sys.CloseAll(entries[i].FDs)
	}
}

const (
	// insistLimit bounds how long what a dead worker left behind is asked for. There is
	// nothing else from which its sessions could go on.
	insistLimit = 2 * time.Minute
	insistPause = 50 * time.Millisecond // doubled each time, up to insistMost
	insistMost  = 5 * time.Second
)

// insist repeats what the keeper, or this process, had no means for at the moment. It is
// tried once at least.
func (s *Supervisor) insist(until time.Time, f func(ctx context.Context) error) error {
	ctx, cancel := context.WithDeadline(s.ctx, until)
	defer cancel()
	for pause := insistPause; ; pause = min(2*pause, insistMost) {
		once, done := context.WithTimeout(s.ctx, keeperTimeout)
		err := f(once)
		done()
		if err == nil || errors.Is(err, errNoArena) || errors.Is(err, errBadArena) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
			s.log.Warn("what a dead worker left behind cannot be had at the moment; trying again", "error", err)
		}
	}
}

// sayUncommitted says of which sessions in the kernel layer it cannot be seen what a dead
// worker had committed: they go on as interrupted.
func (s *Supervisor) sayUncommitted(batch []heir, err error) {
	if err == nil || errors.Is(err, errNoArena) { // it had none
		return
	}
	var ids []string
	for i := range batch {
		if !batch[i].ss.software {
			ids = append(ids, sid(batch[i].ss.ID))
		}
	}
	if len(ids) > 0 {
		s.log.Warn("what a dead worker had committed cannot be read: its sessions go on as interrupted", "count", len(ids),
			"sessions", strings.Join(ids, " "), "error", err)
	}
}

// errTooMuch: many of its sessions name the same bytes, as only a worker that lies does.
var errTooMuch = errors.New("its worker's arena claims more than it holds")

// holds says whether what was found for a session, with all that was found before, can
// have been in the arena. Otherwise a lying worker's death could fill this process's
// memory. Twice the size, since some of it stands in more than one form.
func (e *estate) holds(h *heir) bool {
	if h.rec != nil {
		e.taken += len(h.rec.Record)
	}
	if h.com != nil {
		e.taken += len(h.com.Record) + len(h.com.State)
	}
	return e.mem == nil || e.taken <= 2*len(e.mem)
}

var (
	errNoArena  = errors.New("its worker kept no journals")
	errBadArena = errors.New("the memory with its worker's journals is damaged")
)

// open maps the dead worker's arena.
func (e *estate) open(ctx context.Context, k store) error {
	if e.journals != nil {
		return nil
	}
	fd, err := fetchArena(ctx, k, e.worker)
	if err != nil {
		return err
	}
	defer sys.CloseAll([]int{fd})
	size, err := sys.FileSize(fd)
	if err != nil {
		return err
	}
	mem, err := sys.MapShared(fd, int(size))
	if err != nil {
		return err
	}
	if e.journals, err = ktls.OpenJournals(mem); err != nil {
		_ = sys.Unmap(mem)
		return fmt.Errorf("%w: %w", errBadArena, err)
	}
	if e.commits, err = ktls.OpenCommits(mem); err != nil {
		e.journals = nil
		_ = sys.Unmap(mem)
		return fmt.Errorf("%w: %w", errBadArena, err)
	}
	e.mem = mem
	return nil
}

// inherited goes on with sessions of which it is known now how far they came.
func (s *Supervisor) inherited(e *estate, batch []heir) {
	for i := range batch {
		h := &batch[i]
		ss := h.ss
		if s.sessions[ss.ID] != ss || ss.estate != e {
			h.wipe()
			continue // it ended meanwhile
		}
		switch {
		case h.err == nil:
			s.parkHeir(h)
		case !ss.software && errors.Is(h.err, errTooMuch):
			// The socket has all there is to know but what it committed.
			s.log.Error("what a dead worker had committed of a session is not believed; it goes on as interrupted", "session", sid(ss.ID), "error", h.err)
			s.parkHeir(h)
		case !ss.software:
			s.m.SettledLost(&ss.Session, h.err.Error())
		case errors.Is(h.err, ktls.ErrConnectionGone):
			s.m.SettledGone(&ss.Session)
		case errors.Is(h.err, ktls.ErrNoJournal), errors.Is(h.err, errNoArena):
			s.inspectLost(ss)
		default:
			s.m.SettledLost(&ss.Session, "its worker died, and how far it came is in doubt: "+h.err.Error())
		}
	}
}

// parkHeir has a session adopted. It counts as interrupted, unless its application loses
// nothing because it committed.
func (s *Supervisor) parkHeir(h *heir) {
	ss, cargo, flags := h.ss, wire.Cargo{Record: h.base}, wire.FlagRestored|wire.FlagInterrupted
	if h.rec != nil {
		cargo.Record = h.rec.Record
		s.log.Debug("session goes on from its journal", "session", sid(ss.ID), "unsent", h.rec.Unsent, "unread", h.rec.Unread)
	}
	switch c := h.com; {
	case h.comErr != nil:
		s.log.Error("what a dead worker had committed of a session cannot be told; it goes on as interrupted", "session", sid(ss.ID), "error", h.comErr)
	case c != nil:
		s.log.Debug("session goes on from its last commit", "session", sid(ss.ID), "exact", c.Exact, "again", c.Again, "unsent", c.Unsent)
		if h.rec != nil && &c.Record[0] != &h.rec.Record[0] {
			wipe(h.rec.Record)
		}
		cargo = wire.Cargo{Record: c.Record, App: c.State}
		if c.Exact {
			flags = wire.FlagRestored
		}
	}
	if flags&wire.FlagInterrupted != 0 && ss.flags&wire.FlagInterrupted == 0 { // a dead supervisor may have counted it
		s.led.count(cntInterrupted, 1)
		if op := ss.pool.op; op != nil {
			op.report.Interrupted++
		}
	}
	s.park(ss, cargo, flags)
	if h.com == nil && !ss.software {
		s.settled(ss) // the ledger has all there is
	}
	s.m.SettledHeld(&ss.Session)
}

func (h *heir) wipe() {
	if h.rec != nil {
		wipe(h.rec.Record)
	}
	if h.com != nil {
		wipe(h.com.Record)
	}
}

// settled notes that a session has another owner, or its end.
func (s *Supervisor) settled(ss *session) {
	if e := ss.estate; e != nil {
		ss.estate = nil
		e.left--
		s.closeEstate(e)
	}
}

// closeEstate forgets a dead worker when nothing of it is left.
func (s *Supervisor) closeEstate(e *estate) {
	if e.busy || e.left > 0 || s.estates[e.worker] != e {
		return
	}
	if e.mem != nil {
		_ = sys.Unmap(e.mem)
		e.mem, e.journals, e.commits = nil, nil, nil
	}
	delete(s.estates, e.worker)
	s.retain.delete(arenaKey(e.worker))
}

// dropArena forgets the arena of a dead worker that left no session of the software layer.
func (s *Supervisor) dropArena(w *worker) {
	if w.arena && s.estates[w.ID] == nil {
		s.retain.delete(arenaKey(w.ID))
	}
}
