package supervise

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/ownership"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/pidfd"
	"github.com/ktlsvisor/ktlsvisor/state"
)

// workerState is where a worker process stands.
//
//	starting --READY--> ready --upgrade--> retiring --empty--> stopping --> dead
//	    |                 |                   |
//	    +-- time limit ---+-- protocol error -+--> detached (keeps its sessions,
//	        (killed)                               gets no orders) --> dead
type workerState uint8

const (
	workerStarting workerState = iota
	workerReady
	workerRetiring // its sessions are to move away
	workerStopping // told to stop, or killed
	workerDetached // broke the protocol: its channel is closed, it serves what it has
	workerDead
)

func (st workerState) String() string {
	return [...]string{"starting", "ready", "retiring", "stopping", "detached", "dead"}[st]
}

// workerMeta is what the keeper remembers of a worker for the next supervisor.
type workerMeta struct {
	PID     int          `cbor:"1,keyasint"`
	Pool    string       `cbor:"2,keyasint"`
	Gen     uint32       `cbor:"3,keyasint"`
	Ready   bool         `cbor:"4,keyasint"`
	Schemas []state.Info `cbor:"5,keyasint"`
	Command []string     `cbor:"6,keyasint"`
	// Detached: there is no channel, only the pidfd is kept, so that a successor
	// does not take its sessions for orphans while it lives.
	Detached bool `cbor:"7,keyasint,omitempty"`
	Rekeys   bool `cbor:"8,keyasint,omitempty"`
	// Doubtful: it is to be killed, for nobody knows what it serves.
	Doubtful bool `cbor:"9,keyasint,omitempty"`

	Able       wire.Abilities `cbor:"16,keyasint,omitempty"`
	Quarantine bool           `cbor:"17,keyasint,omitempty"`
	Bare       bool           `cbor:"18,keyasint,omitempty"`
	Leaving    bool           `cbor:"19,keyasint,omitempty"`
}

// worker is one worker process. Only the ledger's goroutine touches it, except
// what is immutable.
type worker struct {
	ownership.Worker
	pid     int
	gen     uint32
	command []string
	pool    *pool
	proc    *pidfd.Process
	ch      *wire.Channel // nil once closed
	out     *outbox

	state    workerState
	schemas  []state.Info
	deadline time.Time // starting: ready by; stopping: kill then
	killed   bool
	eof      bool          // its channel ended
	closedAt time.Time     // when it closed its channel itself: most likely it is dying
	exited   bool          // it is dead
	reader   chan struct{} // closed when the reading goroutine has ended
	greeted  bool          // HELLO came
	rekeys   bool          // it knows the messages about changes of keys
	arena    bool          // it keeps journals; see arena.go
	early    bool          // READY came before the keeper held it
	unready  bool          // taken over before it was known to be ready
	retained bool          // the keeper holds it
	broke    error         // why it was detached or killed
	readyAt  time.Time
	scanAt   time.Time // its sessions are looked through for some to move, not before
	deaf     bool      // it did not answer an ADOPT in time; nothing new until it says something

	inventory *inventory // while one is being taken
	mail      []letter   // decided, not yet sent
	doubtful  bool       // nobody knows for certain which of its sessions it serves
	beat      heartbeat

	beatenDead bool                  // killed because it did not answer
	able       wire.Abilities        // what it can do besides
	marks      *marks                // what it says it is handling; nil: it does not say
	quarantine bool                  // takes suspects only; see poison.go
	offered    map[uint64]wire.Epoch // members of groups that it may have died over, and when; see group_blame.go
	bare       bool                  // the keeper has no duplicates of its sockets; see bare.go
	leaving    bool                  // it is to go, by an operator's word; see scale.go

	waitingStates int   // bytes of its checkpoints that wait to be written
	kept          quota // of the states of its groups
}

func (w *worker) String() string {
	return fmt.Sprintf("worker %d of pool %s (pid %d, generation %d)", w.ID, w.pool.name, w.pid, w.gen)
}

func (w *worker) load() int { return len(w.Sessions) + w.Incoming }

// usable says whether orders can be sent to it.
func (w *worker) usable() bool {
	return w.ch != nil && w.inventory == nil && (w.state == workerReady || w.state == workerRetiring)
}

// send queues a message; a worker that does not read its channel is detached.
func (s *Supervisor) send(w *worker, m *wire.Message) {
	if w.ch == nil || w.out == nil {
		return
	}
	s.deliverAll(w) // what was decided before
	if !w.out.add(m) {
		s.detach(w, errWorkerStuck)
	}
}

func (s *Supervisor) sendRefs(w *worker, t wire.Type, refs []wire.Ref) {
	for _, batch := range wire.BatchRefs(refs) {
		s.send(w, &wire.Message{Type: t, Refs: batch})
	}
}

func (w *worker) key() keeper.Key { return keeper.Key{Kind: keeper.KindWorker, ID: w.ID} }

// retainWorker gives the keeper what the next supervisor needs; chFD belongs to
// it from here on, -1 for a detached worker.
func (s *Supervisor) retainWorker(w *worker, chFD int, then func(error)) error {
	pfd, err := w.proc.FD()
	if err != nil {
		if chFD >= 0 {
			sys.CloseAll([]int{chFD})
		}
		return err
	}
	fds := []int{pfd}
	if chFD >= 0 {
		fds = append(fds, chFD)
	}
	meta, err := cbor.Marshal(workerMeta{PID: w.pid, Pool: w.pool.name, Gen: w.gen,
		Ready: w.state == workerReady || w.state == workerRetiring, Schemas: w.schemas, Command: w.command, Detached: chFD < 0, Rekeys: w.rekeys, Doubtful: w.doubtful,
		Able: w.able, Quarantine: w.quarantine, Bare: w.bare, Leaving: w.leaving})
	if err != nil {
		sys.CloseAll(fds)
		return err
	}
	s.retain.put(keeper.Entry{Key: w.key(), Meta: meta, FDs: fds}, func(err error) {
		if err != nil {
			s.log.Error("worker is not kept over a restart of the supervisor", "pid", w.pid, "error", err)
		}
		if then != nil {
			then(err)
		}
	})
	return nil
}

// workerRetained lets a new worker begin. Without the keeper's word it must not get
// a session: a successor would take it for dead while it serves.
func (s *Supervisor) workerRetained(w *worker, err error) {
	if w.state != workerStarting {
		return
	}
	if err != nil {
		w.broke = fmt.Errorf("the keeper cannot hold its channel: %w", err)
		s.kill(w, "the keeper cannot hold its channel")
		return
	}
	w.retained = true
	if w.greeted {
		s.welcome(w)
	}
	if w.early {
		if err := s.onReady(w); err != nil {
			s.detach(w, err)
		}
	}
}

// listen starts the goroutines of a worker's channel; fd is taken over.
func (s *Supervisor) listen(w *worker, fd int) error {
	ch, err := wire.NewChannel(fd)
	if err != nil {
		return err
	}
	w.ch = ch
	s.startOutbox(w)
	s.startReader(w)
	return nil
}

func (s *Supervisor) startOutbox(w *worker) {
	ch := w.ch
	w.out = newOutbox(ch, s.keeper,
		func(ref wire.Ref) { s.post(func() { s.socketMissing(w, ref) }) },
		func(err error) { s.post(func() { s.unsent(w, ch, err) }) })
}

// unsent deals with a channel that takes no message any more. When its other end is closed
// the worker has died, as a rule: what it said before is still to be read, then the end of
// the channel, and its death is the reason. It may have closed one direction only, so that
// is not waited for for ever.
func (s *Supervisor) unsent(w *worker, ch *wire.Channel, err error) {
	if !errors.Is(err, syscall.EPIPE) {
		s.detach(w, err)
		return
	}
	time.AfterFunc(time.Second, func() {
		s.post(func() {
			if w.ch == ch {
				s.detach(w, err)
			}
		})
	})
}

func (s *Supervisor) startReader(w *worker) {
	ch, done := w.ch, make(chan struct{})
	w.reader = done
	go func() {
		defer close(done)
		for {
			m, err := ch.Recv()
			var dropped *wire.DescriptorsLostError
			if errors.As(err, &dropped) && dropped.Message.Type == wire.TypeParked {
				s.post(func() { s.parkedInVain(w, dropped.Message) })
				continue
			}
			if err != nil {
				if !errors.Is(err, os.ErrDeadlineExceeded) { // paused for a successor
					s.post(func() { s.channelEnded(w, ch, err) })
				}
				return
			}
			if err := s.parkSockets(w, m); err != nil {
				s.post(func() { s.detach(w, err) })
				return
			}
			s.post(func() { s.onMessage(w, ch, m) })
		}
	}()
}

// watch posts the death of a worker. It ends with the supervisor's context.
func (s *Supervisor) watch(w *worker) {
	go func() {
		if err := w.proc.Wait(s.ctx); err != nil {
			if s.ctx.Err() == nil && !errors.Is(err, os.ErrClosed) {
				s.log.Error("the death of a worker would not be noticed: replace the supervisor (ktlsvisor upgrade --supervisor)", "pid", w.pid, "error", err)
			}
			return
		}
		s.post(func() {
			w.exited = true
			if w.eof || w.ch == nil {
				s.workerDied(w)
				return
			}
			// What it sent before it died is still to be read; the end of the channel
			// comes after it. A child of the worker may hold the other end, so not for ever.
			time.AfterFunc(time.Second, func() { s.post(func() { s.workerDied(w) }) })
		})
	}()
}

func (s *Supervisor) channelEnded(w *worker, ch *wire.Channel, err error) {
	if w.ch != ch {
		return
	}
	w.eof = true
	switch {
	case w.exited:
		s.workerDied(w)
	case errors.Is(err, io.EOF), errors.Is(err, os.ErrClosed):
		// It is about to exit, or serves on without us: its death decides, if it comes.
		w.closedAt = s.now()
		s.refuseFor(w, "the worker closed its control channel")
		s.closeChannel(w)
		s.m.Cut(&w.Worker, true)
		if w.inventory != nil {
			w.inventory = nil
			s.inventoryDone()
		}
		time.AfterFunc(deathAfterEOF, func() {
			s.post(func() { s.leftAlone(w, errors.New("it closed its control channel and lives")) })
		})
	default:
		s.detach(w, err)
	}
}

// detach stops talking to a worker that broke the protocol. Its sessions stay
// where they are; it gets no new ones, and another worker is started in its place.
func (s *Supervisor) detach(w *worker, err error) {
	if w.ch == nil || w.state == workerDead {
		return
	}
	s.led.count(cntProtocolErrors, 1)
	w.broke = err
	if w.state == workerStarting {
		s.log.Error("a worker broke the protocol before it was ready", "pool", w.pool.name, "pid", w.pid, "error", err)
		s.closeChannel(w)
		s.m.Cut(&w.Worker, false)
		s.kill(w, "protocol error before ready")
		return
	}
	s.log.Error("control channel of a worker closed; its sessions stay with it, and a new worker takes its place",
		"pool", w.pool.name, "pid", w.pid, "sessions", len(w.Sessions), "error", err)
	s.refuseFor(w, "the control channel of the worker is closed")
	s.closeChannel(w)
	s.m.Cut(&w.Worker, false)
	if w.inventory != nil {
		w.inventory = nil
		s.inventoryDone()
	}
	s.leftAlone(w, err)
}

// leftAlone leaves a worker that cannot be reached any more, and lives, to its
// sessions; without any it is of no use and killed. A new generation of which a
// worker ends like this is given up.
func (s *Supervisor) leftAlone(w *worker, err error) {
	if w.exited || w.state != workerReady && w.state != workerRetiring {
		return
	}
	w.state = workerDetached
	if w.broke == nil {
		w.broke = err
	}
	switch {
	case len(w.Sessions) == 0:
		s.kill(w, "it cannot be reached and has no sessions")
	case w.doubtful:
		s.kill(w, notToldWhy)
	}
	if op := w.pool.op; op != nil && w.gen == op.to && op.phase != opBack {
		s.failUpgrade(op, fmt.Errorf("worker (pid %d) of generation %d broke the protocol: %w", w.pid, w.gen, err))
		return
	}
	if w.gen == w.pool.serving {
		s.gone(w)
	}
}

// notToldWhy is why a worker cannot be left alone with its sessions.
const notToldWhy = "its control channel ended before it had certainly heard which sessions it is to go on with"

func (s *Supervisor) closeChannel(w *worker) {
	if w.ch == nil {
		return
	}
	ch, out := w.ch, w.out
	w.ch = nil
	go func() {
		ctx, cancel := context.WithTimeout(s.ctx, time.Second)
		defer cancel()
		_ = out.drain(ctx) // the last orders, if the worker still reads
		out.abandon()
		_ = ch.Close()
	}()
}

// keepDetached tells the keeper that a worker has no channel any more. Without this
// its duplicate would keep the channel open, and the worker would never learn that
// nobody listens.
func (s *Supervisor) keepDetached(w *worker) {
	if w.state == workerDead {
		return
	}
	if err := s.retainWorker(w, -1, nil); err != nil {
		s.log.Error("worker is not kept over a restart of the supervisor", "pid", w.pid, "error", err)
	}
}

// kill ends a worker process; its death is handled when it has been seen.
func (s *Supervisor) kill(w *worker, why string) {
	if w.killed || w.state == workerDead {
		return
	}
	w.killed = true
	if w.state != workerDetached {
		w.state = workerStopping
	}
	if w.bare && len(w.Sessions) > 0 && !s.stopping {
		s.takeAndKill(w, why)
		return
	}
	s.sigkill(w, why)
}

func (s *Supervisor) sigkill(w *worker, why string) {
	s.log.Warn("killing a worker", "pool", w.pool.name, "pid", w.pid, "why", why)
	if err := w.proc.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
		s.log.Error("cannot kill a worker", "pid", w.pid, "error", err)
	}
}

// unpause goes on with a worker whose channel was held for a successor.
func (s *Supervisor) unpause(w *worker) {
	if w.ch == nil {
		return
	}
	_ = w.ch.Conn().SetReadDeadline(time.Time{})
	s.startOutbox(w)
	s.startReader(w)
}
