package supervise

import (
	"context"
	"crypto/tls"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"sync"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// backend is what the admin API drives.
type backend struct {
	s *Supervisor
	p *process

	endOnce sync.Once
	ended   chan struct{} // closed when the unit has been stopped

	mu   sync.Mutex
	busy *admin.BusyError // replacing the supervisor
}

// errEnding has the client ask again: the successor answers.
var errEnding = admin.ErrEnding

func (b *backend) Status(ctx context.Context) (*admin.Status, error) {
	var st *admin.Status
	if !b.s.call(func() { st = b.s.status() }) {
		return nil, errEnding
	}
	return st, nil
}

func (b *backend) Sessions(ctx context.Context) ([]admin.Session, error) {
	var out []admin.Session
	if !b.s.call(func() { out = b.s.listSessions() }) {
		return nil, errEnding
	}
	return out, nil
}

// Upgrade upgrades one pool, or all, one after another.
func (b *backend) Upgrade(ctx context.Context, r admin.UpgradeRequest, progress func(admin.Progress)) (*admin.UpgradeReport, error) {
	s, began := b.s, time.Now()
	if err := b.busyError(); err != nil {
		return nil, err
	}
	var names []string
	if r.Pool != "" {
		if s.cfg.Pool(r.Pool) == nil {
			return nil, fmt.Errorf("%w: there is no pool %q", admin.ErrBadRequest, r.Pool)
		}
		names = []string{r.Pool}
	} else {
		for _, c := range s.cfg.Pools {
			names = append(names, c.Name)
		}
	}
	if r.Command != "" && len(names) != 1 {
		return nil, fmt.Errorf("%w: a new command is for one pool; name it", admin.ErrBadRequest)
	}
	rep := &admin.UpgradeReport{}
	for _, name := range names {
		pr, err := b.upgradePool(name, r, progress)
		if err != nil {
			if len(rep.Pools) == 0 {
				return nil, err
			}
			rep.Error = err.Error()
			rep.Outcome = admin.OutcomeRefused
			break
		}
		rep.Pools = append(rep.Pools, *pr)
		if pr.Error != "" {
			rep.Error = pr.Error
			break
		}
	}
	if o := outcome(rep.Pools); rep.Outcome == admin.OutcomeMoved || o == admin.OutcomeLost {
		rep.Outcome = o
	}
	rep.DurationSecs = time.Since(began).Seconds()
	return rep, nil
}

func (b *backend) upgradePool(name string, r admin.UpgradeRequest, progress func(admin.Progress)) (*admin.PoolReport, error) {
	s := b.s
	op, err := b.operate(name, r.Queue, progress, func(p *pool, say func(admin.Progress), finished func(*operation)) error {
		command := append([]string(nil), p.command...)
		if r.Command != "" {
			var err error
			if command[0], err = resolve(r.Command); err != nil {
				return err
			}
		}
		s.beginUpgrade(p, command, r.Wait, optionsOf(p, &r), say, finished)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &op.report, nil
}

// resolve checks a program's path before anything is started.
func resolve(command string) (string, error) {
	path, err := exec.LookPath(command)
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return "", fmt.Errorf("%w: %s cannot be run: %w", admin.ErrBadRequest, command, err)
	}
	return path, nil
}

// words passes progress on from the ledger's goroutine, which must not wait for
// an admin client that reads slowly; what does not fit is dropped.
type words struct {
	ch   chan admin.Progress
	done chan struct{}
}

func newWords(to func(admin.Progress)) *words {
	w := &words{ch: make(chan admin.Progress, 64), done: make(chan struct{})}
	go func() {
		defer close(w.done)
		for p := range w.ch {
			if to != nil {
				to(p)
			}
		}
	}()
	return w
}

func (w *words) say(p admin.Progress) {
	select {
	case w.ch <- p:
	default:
	}
}

// close is called when nobody says anything any more.
func (w *words) close() {
	close(w.ch)
	<-w.done
}

func (b *backend) busyError() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.busy != nil {
		return b.busy
	}
	return nil
}

// UpgradeSupervisor replaces this process. When it reports success, the admin
// server of this process ends as soon as the answer is out.
func (b *backend) UpgradeSupervisor(ctx context.Context, progress func(admin.Progress)) (*admin.SupervisorReport, error) {
	b.mu.Lock()
	if b.busy != nil {
		defer b.mu.Unlock()
		return nil, b.busy
	}
	b.busy = &admin.BusyError{Since: time.Now()}
	b.mu.Unlock()
	s := b.s
	began := time.Now()
	rep := &admin.SupervisorReport{OldPID: os.Getpid(), OldGeneration: s.generation}
	var busy error
	s.call(func() {
		for _, p := range s.pools {
			if p.op != nil {
				busy = p.op.busy()
			}
		}
	})
	err := busy
	if err == nil {
		err = s.replaceSelf(ctx, b.p, func(text string) {
			if progress != nil {
				progress(admin.Progress{Text: text})
			}
		})
	}
	rep.DurationSecs = time.Since(began).Seconds()
	if err != nil {
		b.mu.Lock()
		b.busy = nil
		b.mu.Unlock()
		if busy != nil {
			return nil, busy
		}
		s.log.Error("the supervisor was not replaced and goes on", "error", err)
		rep.Outcome, rep.Error, rep.NewPID = admin.OutcomeRefused, err.Error(), rep.OldPID
		return rep, nil
	}
	rep.NewPID = s.successor
	return rep, nil
}

// Stop ends the unit.
func (b *backend) Stop(ctx context.Context, grace time.Duration) error {
	s := b.s
	if grace <= 0 {
		for _, c := range s.cfg.Pools {
			grace = max(grace, time.Duration(c.StopTimeout))
		}
	}
	again := false
	s.call(func() { again, s.stopping = s.stopping, true })
	if again {
		select {
		case <-b.ended:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	s.log.Info("stopping", "grace", grace.String())
	s.front.pause()
	stopped := make(chan struct{})
	s.call(func() {
		deadline := s.now().Add(grace)
		for _, w := range s.workers {
			s.send(w, &wire.Message{Type: wire.TypeStop, Millis: grace.Milliseconds() * 3 / 4, Text: "the unit stops"})
			if w.ch == nil {
				s.kill(w, "the unit stops, and the worker cannot be told")
			}
			w.state, w.deadline = workerStopping, deadline
		}
		s.allDead = func() { close(stopped) }
		s.checkAllDead()
	})
	select {
	case <-stopped:
	case <-ctx.Done():
		return ctx.Err()
	}
	s.front.close()
	s.call(func() {
		for _, ss := range s.sessions { // of workers that did not stop by themselves
			s.m.Stop(&ss.Session)
		}
	})
	s.retain.close()
	b.endOnce.Do(func() { close(b.ended) })
	return nil
}

// checkAllDead ends a stop when the last worker is gone.
func (s *Supervisor) checkAllDead() {
	for _, p := range s.pools {
		if p.starting > 0 {
			return
		}
	}
	if s.allDead != nil && len(s.workers) == 0 {
		s.allDead()
		s.allDead = nil
	}
}

func (s *Supervisor) status() *admin.Status {
	st := &admin.Status{
		Supervisor: admin.SupervisorStatus{PID: os.Getpid(), Version: s.version, Generation: s.generation,
			UptimeSeconds: time.Since(s.started).Seconds(), KeeperPID: s.keeperPID, ReadyMillis: s.ready.Milliseconds()},
		Kernel:   s.kernel,
		Counters: s.led.counters(),
		Reasons:  s.led.reasons(),
		Handshakes: admin.HandshakeCounters{Failed: s.led.counter(cntHandshakeFailed),
			TimedOut: s.led.counter(cntHandshakeTimeout), Refused: s.led.counter(cntHandshakeRefused)},
	}
	for _, l := range s.front.listeners {
		st.Listeners = append(st.Listeners, admin.ListenerStatus{Address: l.ln.Addr().String(), Pool: l.pool})
	}
	for _, c := range s.cfg.Pools {
		p := s.pools[c.Name]
		ps := admin.PoolStatus{Name: p.name, Generation: p.serving, Command: p.command, Upgrading: p.op != nil && p.op.kind == opUpgrade,
			Wanted: p.cfg.Workers, Workers: []admin.WorkerStatus{}}
		if p.op != nil {
			ps.Operation = p.op.describe(s.now())
		}
		for _, w := range sortedWorkers(p.workers) {
			ws := admin.WorkerStatus{PID: w.pid, Generation: w.gen, State: w.state.String(), Sessions: len(w.Sessions)}
			ws.Unhealthy, _ = w.unhealthy()
			ws.CrashExact, ws.Behind = w.arena, p.cfg.Heartbeat > 0 && w.Behind()
			ws.Exposed = min(w.beat.exposed, uint64(len(w.Sessions)))
			if w.quarantine {
				ps.Quarantine = &ws
				continue
			}
			ps.Workers = append(ps.Workers, ws)
		}
		st.Pools = append(st.Pools, ps)
	}
	for _, ss := range s.sessions {
		st.Sessions.Total++
		if ss.software {
			st.Sessions.Software++
		} else {
			st.Sessions.Kernel++
		}
		if ss.owner() == nil {
			st.Sessions.Parked++
		}
	}
	return st
}

func (s *Supervisor) listSessions() []admin.Session {
	out := make([]admin.Session, 0, len(s.sessions))
	now := s.now()
	for _, ss := range s.sessions {
		f, err := ss.allFacts(s.led)
		if err != nil {
			f = &facts{}
		}
		as := admin.Session{ID: sid(ss.ID), Peer: f.Peer, Pool: ss.pool.name, Phase: "owned", Layer: "kernel",
			Version: tls.VersionName(f.Version), Suite: tls.CipherSuiteName(f.Suite), ServerName: f.SNI, ALPN: f.ALPN, Group: ss.groupName(),
			AgeSeconds: now.Sub(time.Unix(0, ss.accepted)).Seconds(), Moves: ss.moves, Reason: f.Reason}
		if ss.software {
			as.Layer = "software"
		}
		as.CrashExact = !ss.software || ss.Owner == nil || workerOf(ss.Owner).arena
		switch {
		case ss.owner() == nil:
			as.Phase = "parked"
		case ss.Try != nil:
			as.Phase = "moving"
		}
		if ss.owner() != nil {
			as.WorkerPID = ss.owner().pid
		}
		out = append(out, as)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].AgeSeconds > out[j].AgeSeconds })
	return out
}

var _ admin.Backend = (*backend)(nil)

func kernelStatus() admin.KernelStatus {
	caps := ktls.Probe()
	st := admin.KernelStatus{Release: sys.KernelRelease(), KTLS: caps.KernelTLS, Rekey: caps.Rekey}
	if !caps.KernelTLS {
		_, st.Reason = caps.Supports(tls.VersionTLS13, tls.TLS_AES_128_GCM_SHA256)
	}
	return st
}
