// Package supervise is the supervisor: it accepts and handshakes, keeps the
// ledger of sessions, starts workers, moves sessions between them, and is itself
// replaceable at any moment.
//
// One goroutine, run, owns the ledger and everything else that changes. Others
// (handshakes, channels, deaths, the admin API) talk to it by posting functions.
// Nothing that can wait runs in it: sends go through an outbox per worker, orders
// to the keeper through the retainer, processes are started elsewhere.
package supervise

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"sort"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/config"
	"github.com/ktlsvisor/ktlsvisor/internal/ownership"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// tick is how often time limits are looked at.
const tick = 20 * time.Millisecond

// Supervisor is one supervisor process.
type Supervisor struct {
	log     hclog.Logger
	version string
	cfg     *config.Config
	keeper  store
	retain  *retainer
	now     func() time.Time
	started time.Time
	ready   time.Duration // from start to serving

	ctx    context.Context // ends with the supervisor
	cancel context.CancelFunc

	events chan func()
	stop   chan struct{} // closed to end run
	done   chan struct{} // closed when run has ended

	// Owned by run from here on.
	led          *ledger
	incarnation  uint32
	generation   uint32
	lastWorker   uint64
	sessions     map[uint64]*session
	freeSlots    []int
	workers      map[uint64]*worker
	pools        map[string]*pool
	estates      map[uint64]*estate // of dead workers
	m            *ownership.Machine
	carrying     bool                                       // see carryOut
	mailed       []*worker                                  // they have mail
	awake        []ownership.GroupKey                       // whose waiters may ask again
	waiters      map[ownership.GroupKey]map[uint64]*session // asked to join while a group was under way
	groupStates  map[ownership.GroupKey]*groupState
	writes       int                  // of them to the keeper
	writeQueue   []ownership.GroupKey // those that wait for their turn
	owing        map[uint64]*session  // that owe their peer a KeyUpdate
	keyOps       int                  // goroutines that read or set keys
	pings        uint32               // sent so far
	ranFor       runTime              // for heartbeats
	trim         sys.Trim             // memory, after handshakes and moves
	trimAt       time.Time            // next look
	quiescing    bool                 // a successor is about to start: begin nothing new
	holding      bool                 // nothing is under way, and nothing begins
	hold         func()               // called once, when nothing works on a socket and no group's state is being written; see holdLedger
	replaced     bool                 // a successor leads: nothing more is done here
	pace         pace
	sweepAt      time.Time // of the keeper's surplus duplicates, next
	stopping     bool
	idle         []func()          // called when nothing is under way
	unanswered   map[uint64]func() // by session: the last question that came while quiescing
	recovery     *recovery
	splitsUntil  time.Time // sessions of split groups wait until then; zero: none does
	waitingReady func()    // first start: called when every pool has a worker
	allDead      func()    // stop: called when no worker is left

	// Set before run starts, or safe for concurrent use.
	front         *front
	adminListener net.Listener
	keeperPID     int
	kernel        admin.KernelStatus
	gate          lateGate
	keys          keySetter
	successor     int                                  // pid, set before UpgradeSupervisor answers
	craft         func(*net.TCPConn) (*Crafted, error) // nil: handshakes; see MainCrafting
}

// post hands f to the goroutine that owns the ledger; it is dropped when that has
// ended.
func (s *Supervisor) post(f func()) {
	select {
	case s.events <- f:
	case <-s.done:
	}
}

// call runs f in the goroutine that owns the ledger and waits for it; false when
// the supervisor is no longer in charge.
func (s *Supervisor) call(f func()) bool {
	ran := make(chan struct{})
	s.post(func() { f(); s.carryOut(); close(ran) })
	select {
	case <-ran:
		return true
	case <-s.done:
		select {
		case <-ran:
			return true
		default:
			return false
		}
	}
}

func (s *Supervisor) run() {
	defer close(s.done)
	t := time.NewTicker(tick)
	defer t.Stop()
	s.carryOut() // what was found when the ledger was taken over
	for {
		select {
		case f := <-s.events:
			f()
			s.carryOut()
			// Take what has come meanwhile before looking at what to do next, so that
			// orders go out in batches.
			for n := len(s.events); n > 0; n-- {
				(<-s.events)()
				s.carryOut()
			}
		case <-t.C:
			s.onTick(s.now())
			s.carryOut()
		case <-s.stop:
			return
		}
		s.pump()
		s.carryOut()
		if f := s.hold; f != nil && s.keyOps == 0 && s.writes == 0 && len(s.writeQueue) == 0 {
			s.hold = nil
			f()
		}
		if s.replaced { // what has come since is the successor's to see
			return
		}
	}
}

// pump starts whatever is due: parked sessions to workers, sessions away from
// retiring workers, upgrades to their next step.
func (s *Supervisor) pump() {
	if s.recovery != nil {
		return
	}
	for _, p := range s.pools {
		if !s.holding {
			s.placeParked(p)
		}
		if !s.quiescing {
			s.emptyRetiring(p)
		}
	}
	if !s.quiescing {
		s.payUpdates()
	}
	for _, p := range s.pools {
		s.stepOperation(p)
	}
	if len(s.idle) > 0 && s.isIdle() {
		s.holding = s.quiescing
		for _, f := range s.idle {
			f()
		}
		s.idle = nil
	}
}

// goOn undoes quiescing: there is no successor.
func (s *Supervisor) goOn() {
	s.quiescing, s.holding = false, false
	list := s.unanswered
	s.unanswered = nil
	for _, id := range slices.Sorted(maps.Keys(list)) {
		list[id]()
	}
}

// isIdle says whether nothing is under way that a successor could not see.
func (s *Supervisor) isIdle() bool {
	if !s.m.Idle() {
		return false
	}
	for _, p := range s.pools {
		if p.starting > 0 || p.op != nil {
			return false
		}
		for _, ss := range p.parked {
			if ss.rare().cargo.App != nil { // it is in this process's memory only
				return false
			}
		}
	}
	for _, w := range s.workers {
		if w.state == workerStarting {
			return false
		}
	}
	return s.homelessKept()
}

func (s *Supervisor) onTick(now time.Time) {
	if now.After(s.trimAt) {
		s.trim.Tick()
		s.trimAt = now.Add(time.Second)
	}
	s.beat(now)
	s.wakeLater()
	s.endSplits(now)
	s.watchWards(now)
	s.sweepSockets(now)
	for a := range s.m.Tries() {
		if now.After(a.Deadline) {
			s.attemptTimedOut(a)
		}
	}
	for gm := range s.m.Moves() {
		if now.After(gm.Deadline) {
			s.abortGroup(gm, "no safe point within the time limit")
		}
	}
	for _, w := range s.workers {
		if w.deadline.IsZero() || !now.After(w.deadline) {
			continue
		}
		switch w.state {
		case workerStarting:
			s.log.Error("worker did not get ready in time", "pool", w.pool.name, "pid", w.pid,
				"limit", time.Duration(w.pool.cfg.ReadyTimeout))
			s.kill(w, "not ready within ready_timeout")
		case workerStopping:
			s.kill(w, "did not stop in time")
		default:
		}
	}
	for _, p := range s.pools {
		s.restartDue(p, now)
	}
	if r := s.recovery; r != nil && now.After(r.deadline) {
		s.recoveryTimedOut()
	}
}

func sid(id uint64) string { return fmt.Sprintf("s%d", id) }

// onMessage handles one message of a worker. What does not fit is either late
// (an epoch that is no longer in force: ignored) or wrong (the worker is
// detached).
func (s *Supervisor) onMessage(w *worker, ch *wire.Channel, m *wire.Message) {
	if w.ch != ch || w.state == workerDead {
		m.CloseSockets()
		return
	}
	w.heard()
	var err error
	switch m.Type {
	case wire.TypeHello:
		err = s.onHello(w, m.Hello)
	case wire.TypeReady:
		err = s.onReady(w)
	case wire.TypeParked:
		if err = w.withoutSocket(m); err == nil {
			err = s.onParked(w, m)
		}
	case wire.TypeAdopted:
		err = s.onAdopted(w, m)
	case wire.TypeRefused:
		err = s.onRefused(w, m)
	case wire.TypeClosed:
		err = s.onClosed(w, m)
	case wire.TypeGroup:
		err = s.onGroup(w, m)
	case wire.TypeCheckpoint:
		err = s.onCheckpoint(w, m)
	case wire.TypeInventoryReply:
		err = s.onInventory(w, m)
	case wire.TypeKeyUpdate, wire.TypeWantUpdate, wire.TypePaused, wire.TypeSent:
		err = s.onRekey(w, m)
	case wire.TypePong:
		err = s.onPong(w, m)
	default:
		err = fmt.Errorf("%w: %s is not for workers to send", wire.ErrProtocol, m.Type)
	}
	if err != nil {
		m.CloseSockets()
		s.detach(w, err)
	}
	m.Handled()
}

func (s *Supervisor) onClosed(w *worker, m *wire.Message) error {
	refs := make([]wire.Ref, 0, len(m.Closed))
	for _, c := range m.Closed { // all of the message or nothing
		if ss := s.sessions[c.ID]; ss != nil && (ss.owner() != w || ss.Epoch != c.Epoch) {
			return fmt.Errorf("%w: it says that session %s ended, which it does not own", wire.ErrProtocol, sid(c.ID))
		}
	}
	for _, c := range m.Closed {
		refs = append(refs, c.Ref)
		ss := s.sessions[c.ID]
		if ss == nil || ss.Ended {
			continue // told again: after a restart of ours, or in this very message
		}
		s.logEnd(ss, w, c)
		if op := ss.pool.op; op != nil {
			op.ended(ss, w, c.Reason)
		}
		if c.Reason == wire.ReasonOperator || c.Reason == wire.ReasonLayer || c.Reason == wire.ReasonHandler {
			s.retain.shutdown(c.ID) // in case it did not get so far itself
		}
		s.m.Closed(&w.Worker, c.Ref, c.Reason)
	}
	s.carryOut() // recorded before it is acknowledged
	s.sendRefs(w, wire.TypeClosedAck, refs)
	return nil
}

// logEnd says how a session ended: aloud when neither side wanted it.
func (s *Supervisor) logEnd(ss *session, w *worker, c wire.Closed) {
	level := hclog.Debug
	switch c.Reason {
	case wire.ReasonLayer:
		level = hclog.Error
	case wire.ReasonProtocol, wire.ReasonKeyUpdate, wire.ReasonKeyLimit, wire.ReasonHandler:
		level = hclog.Info
	default:
	}
	peer := ""
	if f, err := ss.allFacts(s.led); err == nil {
		peer = f.Peer
	}
	s.log.Log(level, "session ended", "session", sid(ss.ID), "peer", peer, "pool", w.pool.name, "pid", w.pid,
		"reason", c.Reason, "detail", printable([]byte(c.Text)))
}

// socketMissing is told that the keeper could not give the socket of an attempt's
// session.
func (s *Supervisor) socketMissing(w *worker, ref wire.Ref) {
	if ss := s.sessions[ref.ID]; ss != nil && ss.Try != nil && ss.Try.Epoch == ref.Epoch && ss.Try.To == &w.Worker {
		s.refuse(ss.Try, "its socket could not be fetched from the keeper")
	}
}

func sortedWorkers(m map[uint64]*worker) []*worker {
	out := make([]*worker, 0, len(m))
	for _, w := range m {
		out = append(out, w)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].ID < out[j].ID })
	return out
}
