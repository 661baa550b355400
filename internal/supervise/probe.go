package supervise

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/config"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/pidfd"
	"github.com/ktlsvisor/ktlsvisor/state"
)

// probeEnd is how long a worker that was started for its HELLO may take to end by itself.
const probeEnd = 2 * time.Second

// probe starts one worker, which gets no WELCOME and no session, hears what it can restore,
// and ends it. It is no part of the pool: only the channel's end tells it what to do. No
// successor would know of it, so the kernel ends it when this process dies.
func (s *Supervisor) probe(ctx context.Context, pool string, cfg config.Pool, command []string) (*wire.Hello, error) {
	runtime.LockOSThread() // until the worker has been waited for
	defer runtime.UnlockOSThread()
	sp, err := startProcess(command, cfg.Dir, workerEnv(cfg.Env), cfg.NoFile, syscall.SIGKILL)
	if err != nil {
		return nil, fmt.Errorf("the new program cannot be started: %w", err)
	}
	for _, f := range sp.outputs {
		go s.copyOutput(pool, sp.cmd.Process.Pid, f)
	}
	reaped := make(chan struct{})
	go func() {
		defer close(reaped)
		_ = sp.cmd.Wait()
	}()
	ch, err := wire.NewChannel(sp.chFD)
	if err != nil {
		s.endProbe(sp.proc, reaped, 0)
		return nil, fmt.Errorf("the channel of the new program: %w", err)
	}
	grace := time.Duration(0)
	defer func() { s.endProbe(sp.proc, reaped, grace) }()
	defer func() { _ = ch.Close() }()
	defer context.AfterFunc(ctx, func() { _ = ch.Conn().SetReadDeadline(time.Now()) })()
	limit := time.Duration(cfg.ReadyTimeout)
	if err := ch.Conn().SetReadDeadline(time.Now().Add(limit)); err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	m, err := ch.Recv()
	switch {
	case ctx.Err() != nil:
		err = ctx.Err()
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = fmt.Errorf("the new program said nothing within ready_timeout (%s)", limit)
	case err != nil:
		err = fmt.Errorf("the new program ended, or closed its channel, before it said what it can do: %w; look at what it printed", err)
	case m.Type != wire.TypeHello:
		err = fmt.Errorf("the new program began with %s instead of HELLO", m.Type)
	default:
		err = speaks(m.Hello)
	}
	if m != nil {
		m.CloseSockets()
	}
	if err != nil {
		return nil, err
	}
	grace = probeEnd // it is a worker, and knows what the end of its channel means
	return m.Hello, nil
}

// endProbe waits for the end of a worker whose channel is closed, and sees to it.
func (s *Supervisor) endProbe(proc *pidfd.Process, reaped <-chan struct{}, grace time.Duration) {
	select {
	case <-reaped:
	case <-time.After(grace):
		if err := proc.Signal(syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
			s.log.Error("cannot kill a worker that was started for a dry run", "error", err)
		}
		<-reaped
	}
	_ = proc.Close()
}

// speaks says whether a worker and this supervisor have a version of the protocol in common.
func speaks(h *wire.Hello) error {
	if h.Min > wire.Version || h.Max < wire.Version {
		return fmt.Errorf("%w: the worker speaks versions %d to %d of the protocol, this supervisor %d", wire.ErrProtocol, h.Min, h.Max, wire.Version)
	}
	return nil
}

func schemasOf(h *wire.Hello) (list []state.Info) {
	for _, sc := range h.Schemas {
		list = append(list, state.Info{Name: sc.Name, Writes: sc.Writes, Restores: sc.Restores})
	}
	return list
}

// probePlan, outside the ledger's goroutine, asks the new program of a pool, and completes the plan with what follows.
func (b *backend) probePlan(ctx context.Context, r *admin.UpgradeRequest, plan *admin.PoolPlan) error {
	s, p := b.s, b.s.pools[plan.Pool]
	var cfg config.Pool
	if !s.call(func() { cfg = p.cfg }) {
		return errEnding
	}
	plan.Probed = true
	h, err := s.probe(ctx, plan.Pool, cfg, plan.Command)
	if err != nil {
		plan.Error = err.Error()
		return nil
	}
	if !s.call(func() {
		var oneWay error
		if oneWay, err = p.restorable(schemasOf(h), p.serving, plan.To); err == nil && oneWay != nil {
			plan.OneWay = oneWay.Error()
			o := optionsOf(p, r)
			err = o.allowOneWay(oneWay)
		}
		plan.NotChecked = p.notChecked(true)
	}) {
		return errEnding
	}
	if err != nil {
		plan.Error = err.Error()
	}
	return nil
}

// notChecked is what only an upgrade itself finds out.
func (p *pool) notChecked(probed bool) []string {
	list := []string{"whether the new program gets ready", "whether each session reaches a safe point in time"}
	for _, w := range p.workers {
		if len(w.schemas) > 0 && !probed {
			return append(list, "whether the new program restores the application's state, and the old one the new one's: that is asked before anything moves, or now with --probe")
		}
	}
	return list
}
