package supervise

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/config"
	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// pool is a set of workers of one command.
type pool struct {
	name     string
	cfg      config.Pool
	command  []string
	serving  uint32 // the generation that gets sessions
	newest   uint32 // the highest generation number given out
	workers  map[uint64]*worker
	parked   map[uint64]*session // owned by nobody, waiting for a worker
	starting int                 // processes being started
	rr       int

	op    *operation
	queue []*queued          // operations that wait for op to end
	ended []func(*operation) // called at the end of op
	stays map[uint64]stay    // sessions that could not move when they were last asked
	ward  ward               // the quarantine

	resume *probationRecord // of the supervisor before this one

	throttle throttle
	restRate int // that of the last upgrade, while there are sessions that it left behind

	rate      float64       // sessions moved in a second, in the last operation that moved many
	startTook time.Duration // of the worker that got ready last

	failures  int       // starts that failed in a row
	restartAt time.Time // when the next worker may be started; zero: nothing is missing
}

// poolState is what the keeper remembers of the pools.
type poolState struct {
	Pools      []poolRecord `json:"pools"`
	LastWorker uint64       `json:"last_worker"`
	Generation uint32       `json:"generation"` // of the supervisor
	KeeperPID  int          `json:"keeper_pid"`
}

type poolRecord struct {
	Name      string   `json:"name"`
	Command   []string `json:"command"`
	Serving   uint32   `json:"serving"`
	Newest    uint32   `json:"newest"`
	Upgrading uint32   `json:"upgrading,omitempty"` // generation being moved to
	Workers   int      `json:"workers,omitempty"`   // as scaled; 0: as configured

	Rate int `json:"rate,omitempty"` // as an upgrade was asked for; 0: as configured

	Probation *probationRecord `json:"probation,omitempty"`
}

var poolsKey = keeper.Key{Kind: keeper.KindBlob, Name: "pools"}

// savePools stores what changes seldom with the keeper, replacing what was there.
func (s *Supervisor) savePools() {
	st := poolState{LastWorker: s.lastWorker, Generation: s.generation, KeeperPID: s.keeperPID}
	for _, c := range s.cfg.Pools {
		p := s.pools[c.Name]
		r := poolRecord{Name: p.name, Command: p.command, Serving: p.serving, Newest: p.newest}
		r.Rate = p.restRate
		if p.op != nil {
			r.Rate = p.op.opts.rate
			r.Upgrading, r.Probation = p.op.to, p.op.record()
		}
		if p.cfg.Workers != c.Workers {
			r.Workers = p.cfg.Workers
		}
		st.Pools = append(st.Pools, r)
	}
	b, err := json.Marshal(st)
	if err != nil {
		s.log.Error("the state of the pools cannot be encoded", "error", err)
		return
	}
	s.retain.put(keeper.Entry{Key: poolsKey, Meta: b}, func(err error) {
		if err != nil {
			s.log.Error("the state of the pools is not kept over a restart of the supervisor", "error", err)
		}
	})
}

// takes says whether sessions can be given to a worker of generation gen now.
func (p *pool) takes(w *worker, gen uint32) bool {
	return w.gen == gen && w.state == workerReady && w.usable() && !w.deaf && !w.quarantine
}

// least is the worker of a generation with the fewest sessions, but for those named,
// or nil.
func (p *pool) least(gen uint32, but []uint64) (best *worker) {
	for _, w := range sortedWorkers(p.workers) {
		if p.takes(w, gen) && !slices.Contains(but, w.ID) && (best == nil || w.load() < best.load()) {
			best = w
		}
	}
	return best
}

// target picks the worker that gets the next session, or nil.
func (p *pool) target() *worker { return p.targetIn(p.serving) }

func (p *pool) targetIn(gen uint32) *worker {
	if p.cfg.Dispatch != "round-robin" {
		return p.least(gen, nil)
	}
	var ready []*worker
	for _, w := range sortedWorkers(p.workers) {
		if p.takes(w, gen) {
			ready = append(ready, w)
		}
	}
	if len(ready) == 0 {
		return nil
	}
	p.rr++
	return ready[p.rr%len(ready)]
}

// targetFor is target, but of another worker than those that could not take ss, as
// long as there is one. While there is a canary it gets its share of new sessions.
func (p *pool) targetFor(ss *session) *worker {
	if w, ok := p.ward.place(ss, p.serving); ok {
		return w
	}
	if by := ss.rare().refusedBy; len(by) > 0 {
		if w := p.least(p.serving, by); w != nil {
			return w
		}
		ss.more.refusedBy = nil
	}
	if p.canarying() && ss.isNew() && p.op.share.next() {
		if w := p.targetIn(p.op.to); w != nil {
			return w
		}
	}
	return p.target()
}

// isNew says whether a session has had no owner yet.
func (ss *session) isNew() bool { return ss.owner() == nil && ss.moves == 0 && ss.flags == 0 }

func (p *pool) count(gen uint32, states ...workerState) (n int) {
	for _, w := range p.workers {
		if w.gen != gen || w.quarantine {
			continue
		}
		for _, st := range states {
			if w.state == st {
				n++
			}
		}
	}
	return n
}

func (s *Supervisor) onHello(w *worker, h *wire.Hello) error {
	switch {
	case w.state == workerStopping:
		return nil // it crossed our STOP
	case w.state != workerStarting || w.greeted:
		return fmt.Errorf("%w: a second HELLO", wire.ErrProtocol)
	}
	if err := speaks(h); err != nil {
		return err
	}
	w.schemas = schemasOf(h)
	w.rekeys, w.able = h.Rekey, h.Able
	w.arena = h.Able&wire.AbleArena != 0 && w.pool.cfg.CrashExact
	w.bare = !w.pool.cfg.Retain && h.Able&wire.AbleSockets != 0
	w.greeted = true
	if w.retained {
		s.welcome(w)
	}
	return nil
}

func (s *Supervisor) welcome(w *worker) {
	s.giveArena(w, func(arena uint64) {
		s.send(w, &wire.Message{Type: wire.TypeWelcome, Welcome: &wire.Welcome{Version: wire.Version, Worker: w.ID,
			Pool: w.pool.name, Generation: w.gen, FreezeTimeout: time.Duration(w.pool.cfg.FreezeTimeout).Milliseconds(),
			Rekey: s.kernel.Rekey, Arena: arena, Keeper: s.bareKeeper(w), Groups: true}})
		s.giveMarks(w)
	})
}

func (s *Supervisor) onReady(w *worker) error {
	if w.state == workerReady {
		return nil
	}
	if w.state != workerStarting {
		return nil // told to stop meanwhile
	}
	if !w.greeted {
		return fmt.Errorf("%w: READY before HELLO", wire.ErrProtocol)
	}
	if !w.retained {
		w.early = true // it did not wait for WELCOME; we do
		return nil
	}
	w.pool.startTook = s.now().Sub(w.deadline.Add(-time.Duration(w.pool.cfg.ReadyTimeout)))
	w.state, w.deadline, w.readyAt = workerReady, time.Time{}, s.now()
	s.log.Info("worker ready", "pool", w.pool.name, "pid", w.pid, "generation", w.gen)
	if err := s.keepChannel(w); err != nil {
		s.log.Error("worker is not kept over a restart of the supervisor", "pid", w.pid, "error", err)
	}
	s.readyChanged()
	s.wardReady(w)
	s.bareReady(w)
	return nil
}

// keepChannel updates what the keeper remembers of a worker.
func (s *Supervisor) keepChannel(w *worker) error {
	if w.ch == nil {
		return errors.New("its channel is closed")
	}
	fd, err := w.ch.Dup()
	if err != nil {
		return err
	}
	return s.retainWorker(w, fd, nil)
}

// fill starts what is missing of the serving generation.
func (s *Supervisor) fill(p *pool) {
	if s.stopping || s.quiescing || p.op != nil && !p.op.fills() {
		return
	}
	missing := p.wanted() - p.count(p.serving, workerStarting, workerReady) - p.starting
	for ; missing > 0; missing-- {
		s.spawn(p, p.serving, p.command, func(w *worker, err error) {
			if err != nil {
				s.startFailed(p, err)
			}
		})
	}
}

// startFailed counts a worker of the serving generation that could not be
// started, or ended before it was ready.
func (s *Supervisor) startFailed(p *pool, err error) {
	p.failures++
	if op := p.op; op != nil && op.kind != opUpgrade && op.phase == opStarting {
		s.failTask(op, err)
	}
	args := []any{"pool", p.name, "failures", p.failures, "error", err}
	if errors.Is(err, os.ErrPermission) || errors.Is(err, os.ErrNotExist) {
		args = append(args, "hint", "is the program there, executable and for this architecture?")
	}
	s.log.Error("worker cannot be started; trying again", args...)
	s.replaceLater(p)
}

// healthy is how long a worker must have served for its end not to count as one
// more failure in a row.
const healthy = 5 * time.Second

// gone plans the replacement of a worker that was ready and died, or was detached.
func (s *Supervisor) gone(w *worker) {
	if s.now().Sub(w.readyAt) < healthy {
		w.pool.failures++
	} else {
		w.pool.failures = 0
	}
	s.replaceLater(w.pool)
}

// replaceLater plans a start: at once after the first failure in a row, then after
// 100 ms, doubling up to 5 s.
func (s *Supervisor) replaceLater(p *pool) {
	wait := time.Duration(0)
	if p.failures > 1 {
		wait = min(100*time.Millisecond<<min(p.failures-2, 10), 5*time.Second)
	}
	p.restartAt = s.now().Add(wait)
}

func (s *Supervisor) restartDue(p *pool, now time.Time) {
	if p.restartAt.IsZero() || now.Before(p.restartAt) || s.recovery != nil || p.op != nil && !p.op.fills() || s.quiescing {
		return
	}
	p.restartAt = time.Time{}
	s.fill(p)
}

// workerDied handles a death that has been seen: the pidfd is readable and what
// the worker had sent has been read. Only now may its sessions get a new owner
// (I1).
func (s *Supervisor) workerDied(w *worker) {
	if w.state == workerDead || !w.exited {
		return
	}
	was := w.state
	w.state, w.deadline = workerDead, time.Time{}
	s.closeChannel(w)
	s.retain.delete(w.key())
	s.retain.delete(w.outputKeys()...)
	delete(s.workers, w.ID)
	delete(w.pool.workers, w.ID)
	_ = w.proc.Close()
	expected := was == workerStopping && !w.killed && len(w.Sessions) == 0
	if expected {
		s.log.Info("worker stopped", "pool", w.pool.name, "pid", w.pid, "generation", w.gen)
	} else {
		s.led.count(cntWorkerDeaths, 1)
		s.log.Warn("worker died", "pool", w.pool.name, "pid", w.pid, "generation", w.gen, "state", was, "sessions", len(w.Sessions))
	}
	s.blame(w, was)
	w.marks.close()
	s.retain.delete(w.marksKey())
	s.refuseFor(w, "the worker died")
	s.m.Dead(&w.Worker)
	s.carryOut() // who inherits is known, before what is left is dropped
	s.dropArena(w)
	if w.inventory != nil {
		w.inventory = nil
		s.inventoryDone()
	}
	p := w.pool
	s.checkAllDead()
	if w.quarantine {
		s.wardDied(w, was)
		return
	}
	if op := p.op; op != nil && op.kind == opUpgrade {
		s.upgradeWorkerDied(op, w, was)
		if !op.fills() || w.gen != p.serving {
			return
		}
	}
	if w.gen == p.serving && !expected && !s.stopping {
		if was == workerStarting {
			s.startFailed(p, fmt.Errorf("worker (pid %d) ended before it was ready: look at what it printed", w.pid))
		} else if w.broke != nil && was == workerStopping {
			s.startFailed(p, fmt.Errorf("worker (pid %d): %w", w.pid, w.broke))
		} else if was != workerDetached { // that was replaced already
			s.gone(w)
		}
	}
}
