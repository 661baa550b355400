package supervise

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/ownership"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/pidfd"
)

// inventoryTimeout bounds how long workers may take to say what they have. A
// worker that does not answer keeps its sessions; only the supervisor's start is
// not held up for longer.
const inventoryTimeout = 3 * time.Second

// recovery is under way while a new supervisor waits for the workers' inventories.
// There is one path for a planned successor and for a restart after a crash.
type recovery struct {
	waiting  int
	deadline time.Time
	done     func()
}

// inventory is what one worker says it has.
type inventory struct {
	nonce uint64
	held  []wire.Held
	last  bool
}

// maxHeld bounds what a worker may say that it has: sessions, and as many that ended
// and whose end nobody has acknowledged.
func maxHeld(slots int) int { return 2*slots + wire.MaxItems }

// recoverAll takes over what an earlier supervisor left with the keeper. It runs
// before the ledger's goroutine; what it needs of the workers arrives later, and
// done is called then.
func (s *Supervisor) recoverAll(ctx context.Context, done func()) error {
	if err := s.recoverWorkers(ctx); err != nil {
		return err
	}
	if err := s.recoverOutputs(ctx); err != nil {
		return err
	}
	if err := s.recoverGroupStates(ctx); err != nil {
		return err
	}
	if err := s.recoverSessions(ctx); err != nil {
		return err
	}
	s.carryOut() // which dead workers have left something
	if err := s.recoverArenas(ctx); err != nil {
		return err
	}
	if err := s.forgetMarks(ctx); err != nil {
		return err
	}
	for _, w := range s.workers {
		if w.unready && len(w.Sessions) == 0 {
			s.kill(w, "it was not ready yet when the supervisor ended")
		}
		if w.doubtful { // the supervisor before this one may not have come so far
			s.kill(w, notToldWhy)
		}
	}
	s.recovery = &recovery{deadline: s.now().Add(inventoryTimeout), done: done}
	for _, w := range s.workers {
		if w.ch == nil || w.state == workerStarting || w.killed {
			continue
		}
		w.inventory = &inventory{nonce: uint64(s.incarnation)}
		w.Awaited = true
		s.recovery.waiting++
		s.send(w, &wire.Message{Type: wire.TypeInventory, Nonce: uint64(s.incarnation)})
	}
	if s.recovery.waiting == 0 {
		go s.post(s.endRecovery)
	}
	return nil
}

func (s *Supervisor) recoverWorkers(ctx context.Context) error {
	entries, err := s.keeper.Get(ctx, keeper.KindWorker)
	if err != nil {
		return fmt.Errorf("workers: %w", err)
	}
	for i := range entries {
		e := &entries[i]
		if err := s.recoverWorker(e); err != nil {
			s.log.Error("a worker cannot be taken over", "worker", e.Key.ID, "error", err)
		}
	}
	return nil
}

// recoverWorker owns e's descriptors.
func (s *Supervisor) recoverWorker(e *keeper.Entry) error {
	var meta workerMeta
	if err := cbor.Unmarshal(e.Meta, &meta); err != nil {
		sys.CloseAll(e.FDs)
		return err
	}
	p := s.pools[meta.Pool]
	if p == nil || len(e.FDs) < 1 || !meta.Detached && len(e.FDs) != 2 {
		sys.CloseAll(e.FDs)
		return fmt.Errorf("pool %q, %d descriptors: not as it was stored", meta.Pool, len(e.FDs))
	}
	proc, err := pidfd.FromFD(e.FDs[0])
	if err != nil {
		sys.CloseAll(e.FDs[1:])
		return err
	}
	w := &worker{pid: meta.PID, gen: meta.Gen, command: meta.Command, pool: p, proc: proc,
		schemas: meta.Schemas, rekeys: meta.Rekeys, able: meta.Able, quarantine: meta.Quarantine, bare: meta.Bare, doubtful: meta.Doubtful, state: workerReady}
	w.ID, w.X = e.Key.ID, w
	switch {
	case meta.Detached:
		w.state = workerDetached
		sys.CloseAll(e.FDs[1:])
	default:
		if err := s.listen(w, e.FDs[1]); err != nil {
			w.state = workerDetached
			s.log.Error("the channel of a worker cannot be used", "pid", w.pid, "error", err)
		}
	}
	w.leaving = meta.Leaving
	if w.state == workerReady && (w.gen != p.serving || w.leaving) {
		w.state = workerRetiring
	}
	s.recoverWard(w)
	s.workers[w.ID], p.workers[w.ID] = w, w
	s.lastWorker = max(s.lastWorker, w.ID)
	s.watch(w)
	if w.state == workerDetached {
		s.m.Cut(&w.Worker, true)
	}
	w.greeted, w.retained, w.unready = true, true, !meta.Ready && !meta.Detached
	return nil
}

func (s *Supervisor) recoverOutputs(ctx context.Context) error {
	entries, err := s.keeper.Get(ctx, keeper.KindOutput)
	if err != nil {
		return fmt.Errorf("output of workers: %w", err)
	}
	for i := range entries {
		e := &entries[i]
		if len(e.FDs) != 1 {
			sys.CloseAll(e.FDs)
			continue
		}
		f := os.NewFile(uintptr(e.FDs[0]), "worker output")
		pool, pid := e.Key.Name, 0
		if w := s.workers[e.Key.ID/2]; w != nil {
			pool, pid = w.pool.name, w.pid
		} else {
			s.retain.delete(e.Key) // of a worker that is long dead
		}
		go s.copyOutput(pool, pid, f)
	}
	return nil
}

func (s *Supervisor) recoverSessions(ctx context.Context) error {
	list, err := s.keeper.List(ctx, keeper.KindSocket)
	if err != nil {
		return fmt.Errorf("sockets of sessions: %w", err)
	}
	retained := make(map[uint64]bool, len(list))
	for i := range list {
		retained[list[i].Key.ID] = true
	}
	s.led.sweep()
	used := s.led.used() // reading further would give memory to slots never used
	for i := s.led.slots - 1; i >= used; i-- {
		s.freeSlots = append(s.freeSlots, i)
	}
	for i := used - 1; i >= 0; i-- {
		e, ok, damaged := s.led.get(i)
		if !ok || e.Phase == slotFree {
			if damaged {
				s.log.Error("a slot of the ledger is damaged; its session is given up", "slot", i)
				s.led.end(i, endLost)
			}
			if ok {
				s.led.settleEnd(e)
				s.led.free(i)
			}
			s.freeSlots = append(s.freeSlots, i)
			continue
		}
		s.recoverSession(ctx, i, e, retained)
	}
	s.led.balance(len(s.sessions))
	for id := range retained {
		if s.sessions[id] == nil { // ended, or never entered
			s.retain.shutdown(id)
			s.retain.delete(keeper.Key{Kind: keeper.KindSocket, ID: id})
		}
	}
	return nil
}

func (s *Supervisor) recoverSession(ctx context.Context, slot int, e entry, retained map[uint64]bool) {
	ss := &session{slot: uint32(slot), kept: e.Kept, moves: e.Moves, accepted: e.Accepted, software: e.Software, rxBase: e.RXBase, owes: e.Owes, crashes: e.Crashes, blamed: e.Blamed}
	ss.ID, ss.Epoch, ss.X = e.ID, e.Epoch, ss
	if e.Phase == slotOwned { // of a dead worker: that it was interrupted is counted
		ss.flags = e.Flags & wire.FlagInterrupted
	}
	f, err := ss.allFacts(s.led)
	if err == nil && s.pools[f.Pool] == nil {
		err = fmt.Errorf("pool %q is unknown", f.Pool)
	}
	if err == nil && f.Overflow {
		ss.edit().bigFacts, err = s.bigFacts(ctx, ss)
	}
	if err != nil {
		s.log.Error("session lost: its facts cannot be read", "session", sid(e.ID), "error", err)
		s.led.end(slot, endLost)
		s.freeSlots = append(s.freeSlots, slot)
		return
	}
	ss.pool = s.pools[f.Pool]
	s.sessions[ss.ID] = ss
	ss.away = !retained[ss.ID]
	if ss.owes != 0 {
		s.owing[ss.ID] = ss
	}
	var owner *ownership.Worker
	if w := s.workers[e.Owner]; e.Phase == slotOwned && w != nil {
		owner = &w.Worker
	}
	var group *ownership.GroupKey
	if e.Group != "" {
		k := ss.pool.groupKey(e.Group)
		group = &k
	}
	s.m.Restore(&ss.Session, owner, group)
	s.recoverSuspect(ss)
	switch {
	case owner != nil:
	case !retained[ss.ID] && ss.pool.cfg.Retain:
		s.lose(ss, "the supervisor died before the keeper had its socket")
	case !retained[ss.ID]:
		s.lose(ss, goneWithWorker)
	case e.Phase == slotParked:
		r, err := s.led.parked(slot, e)
		if err != nil {
			s.lose(ss, err.Error())
			return
		}
		flags := e.Flags
		if flags&wire.FlagRestored != 0 && flags&wire.FlagInterrupted == 0 { // the application's state was in the dead supervisor's memory only
			flags |= wire.FlagInterrupted
			s.led.count(cntInterrupted, 1)
		}
		s.park(ss, wire.Cargo{Record: r}, flags)
	default: // its owner's death had been seen: only then is a worker forgotten
		s.m.Orphan(&ss.Session, &ownership.Worker{ID: e.Owner})
	}
}

func (s *Supervisor) bigFacts(ctx context.Context, ss *session) ([]byte, error) {
	entries, err := s.keeper.Get(ctx, keeper.KindBlob, ss.ID)
	if err != nil {
		return nil, err
	}
	var out []byte
	err = fmt.Errorf("the keeper does not have them")
	for i := range entries {
		if entries[i].Key == ss.overflowKey() && len(entries[i].FDs) == 1 {
			out, err = sys.ReadSealedMemfd(entries[i].FDs[0], wire.MaxCargo)
		}
		sys.CloseAll(entries[i].FDs)
	}
	return out, err
}

func (s *Supervisor) onInventory(w *worker, m *wire.Message) error {
	if w.inventory == nil || w.inventory.nonce != m.Nonce {
		return nil // for an earlier supervisor
	}
	if len(w.inventory.held)+len(m.Held) > maxHeld(s.led.slots) {
		return fmt.Errorf("%w: its INVENTORY has more sessions than there can be", wire.ErrProtocol)
	}
	w.inventory.held = append(w.inventory.held, m.Held...)
	if !m.Last {
		return nil
	}
	w.inventory.last = true
	if s.recovery != nil {
		s.inventoryDone()
		return nil
	}
	s.log.Info("a worker said late what it has", "pool", w.pool.name, "pid", w.pid)
	said := map[*ownership.Worker][]wire.Held{&w.Worker: w.inventory.held}
	w.inventory = nil
	s.m.Reconcile(said)
	return nil
}

// inventoryDone goes on when no worker's inventory is awaited any more.
func (s *Supervisor) inventoryDone() {
	if s.recovery == nil {
		return
	}
	for _, w := range s.workers {
		if w.inventory != nil && !w.inventory.last {
			return
		}
	}
	s.endRecovery()
}

// splitTimeout is how long members of a group, of which a dead supervisor had committed
// some and not all to a new home, wait for the old one to say what it has. Usually it is
// heard, or dead, long before.
const splitTimeout = 30 * time.Second

// endSplits bounds that wait.
func (s *Supervisor) endSplits(now time.Time) {
	switch n := s.m.Waiting(); {
	case n == 0:
		s.splitsUntil = time.Time{}
	case s.splitsUntil.IsZero():
		s.splitsUntil = now.Add(splitTimeout)
		s.log.Warn("sessions wait, because their groups were on the move when the last supervisor died, and the old worker does not say what it has", "sessions", n)
	case now.After(s.splitsUntil):
		s.log.Error("groups go on in two workers, because the old one does not say what it has", "sessions", n)
		s.m.ResumeWithheld()
	}
}

func (s *Supervisor) recoveryTimedOut() {
	for _, w := range s.workers {
		if w.inventory != nil && !w.inventory.last {
			s.log.Warn("worker does not say what it has; its sessions stay with it, and it gets no new ones until it does",
				"pool", w.pool.name, "pid", w.pid)
		}
	}
	s.endRecovery()
}

func (s *Supervisor) endRecovery() {
	r := s.recovery
	if r == nil {
		return
	}
	said := map[*ownership.Worker][]wire.Held{}
	for _, w := range s.workers {
		if w.inventory != nil && w.inventory.last {
			said[&w.Worker] = w.inventory.held
			w.inventory = nil
		}
	}
	s.m.Reconcile(said)
	s.recovery = nil
	s.dropLostStates()
	s.log.Info("took over", "incarnation", s.incarnation, "workers", len(s.workers), "sessions", len(s.sessions))
	r.done()
}
