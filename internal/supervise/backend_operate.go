package supervise

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
)

var errStopped = errors.New("the unit was stopped over it")

// operate begins an operation on a pool and waits for its end. begin runs in the
// ledger's goroutine, at once or when the operations before it have ended; after it
// has returned nil, finished is called once.
func (b *backend) operate(name string, queue bool, progress func(admin.Progress),
	begin func(p *pool, say func(admin.Progress), finished func(*operation)) error) (*operation, error) {
	s := b.s
	if err := b.busyError(); err != nil {
		return nil, err
	}
	done := make(chan *operation, 1)
	refused := make(chan error, 1)
	words := newWords(progress)
	defer words.close()
	start := func() error {
		if s.stopping {
			return errors.New("the unit is stopping")
		}
		return begin(s.pools[name], words.say, func(op *operation) { done <- op })
	}
	var err error
	if !s.call(func() {
		p := s.pools[name]
		switch {
		case p == nil:
			err = fmt.Errorf("%w: there is no pool %q", admin.ErrBadRequest, name)
		case p.op != nil && !queue:
			err = p.op.busy()
		case p.op != nil && len(p.queue) >= maxQueue:
			err = fmt.Errorf("%w, and %d more operations wait for it", p.op.busy(), len(p.queue))
		case p.op != nil:
			words.say(admin.Progress{Text: fmt.Sprintf("pool %s: waiting for the %s under way and %d more", name, p.op.kind, len(p.queue))})
			p.queue = append(p.queue, &queued{start: start, refuse: func(err error) { refused <- err }})
		case s.quiescing:
			err = &admin.BusyError{Since: s.now()}
		case s.recovery != nil || s.stopping:
			err = errors.New("the supervisor is starting or stopping; try again in a moment")
		default:
			err = start()
		}
	}) {
		return nil, errEnding
	}
	if err != nil {
		return nil, err
	}
	select {
	case op := <-done:
		return op, nil
	case err := <-refused:
		return nil, err
	case <-b.ended:
		return nil, errStopped
	case <-s.done:
		return nil, errEnding
	}
}

// optionsOf are the options of an upgrade request, with the pool's own where it says
// nothing.
func optionsOf(p *pool, r *admin.UpgradeRequest) upgradeOptions {
	o := upgradeOptions{canary: r.Canary, soak: r.Soak, probation: p.cfg.Probation.D(), noReturn: r.NoReturn, rate: r.Rate}
	if o.soak <= 0 {
		o.soak = defaultSoak
	}
	if r.Probation != nil {
		o.probation = *r.Probation
	}
	return o
}

// onlyPool is the pool that a request means which names none.
func (b *backend) onlyPool(name string) (string, error) {
	switch {
	case name != "":
		return name, nil
	case len(b.s.cfg.Pools) == 1:
		return b.s.cfg.Pools[0].Name, nil
	}
	return "", fmt.Errorf("%w: there are %d pools; name one", admin.ErrBadRequest, len(b.s.cfg.Pools))
}

// task runs an operation other than an upgrade.
func (b *backend) task(name string, queue bool, progress func(admin.Progress),
	begin func(p *pool, say func(admin.Progress), finished func(*operation)) error) (*admin.TaskReport, error) {
	began := time.Now()
	name, err := b.onlyPool(name)
	if err != nil {
		return nil, err
	}
	var rep *admin.TaskReport
	if _, err = b.operate(name, queue, progress, func(p *pool, say func(admin.Progress), finished func(*operation)) error {
		return begin(p, say, func(op *operation) {
			rep = b.s.taskReport(op)
			finished(op)
		})
	}); err != nil {
		return nil, err
	}
	rep.DurationSecs = time.Since(began).Seconds()
	return rep, nil
}

// Scale changes how many workers a pool has.
func (b *backend) Scale(ctx context.Context, r admin.ScaleRequest, progress func(admin.Progress)) (*admin.TaskReport, error) {
	return b.task(r.Pool, r.Queue, progress, func(p *pool, say func(admin.Progress), finished func(*operation)) error {
		b.s.beginScale(p, r.Workers, r.Wait, say, finished)
		return nil
	})
}

// Rebalance spreads the sessions of a pool over its workers.
func (b *backend) Rebalance(ctx context.Context, r admin.RebalanceRequest, progress func(admin.Progress)) (*admin.TaskReport, error) {
	return b.task(r.Pool, r.Queue, progress, func(p *pool, say func(admin.Progress), finished func(*operation)) error {
		b.s.beginRebalance(p, r.Wait, say, finished)
		return nil
	})
}

// Drain empties a worker, ends it and has it replaced.
func (b *backend) Drain(ctx context.Context, r admin.DrainRequest, progress func(admin.Progress)) (*admin.TaskReport, error) {
	find := func() *worker {
		for _, w := range b.s.workers {
			if w.pid == r.PID {
				return w
			}
		}
		return nil
	}
	errNone := fmt.Errorf("%w: no worker has pid %d; see \"ktlsvisor status\"", admin.ErrBadRequest, r.PID)
	name := ""
	if !b.s.call(func() {
		if w := find(); w != nil {
			name = w.pool.name
		}
	}) {
		return nil, errEnding
	}
	if name == "" {
		return nil, errNone
	}
	return b.task(name, r.Queue, progress, func(_ *pool, say func(admin.Progress), finished func(*operation)) error {
		w := find()
		if w == nil {
			return errNone
		}
		if err := drainable(w); err != nil {
			return err
		}
		b.s.beginDrain(w, r.Wait, say, finished)
		return nil
	})
}

// Abort takes back what is under way in a pool, or in all.
func (b *backend) Abort(ctx context.Context, r admin.AbortRequest, progress func(admin.Progress)) (*admin.UpgradeReport, error) {
	s, began := b.s, time.Now()
	ended := make(chan *operation, len(s.cfg.Pools))
	n := 0
	var err error
	if !s.call(func() {
		if r.Pool != "" && s.pools[r.Pool] == nil {
			err = fmt.Errorf("%w: there is no pool %q", admin.ErrBadRequest, r.Pool)
			return
		}
		for _, c := range s.cfg.Pools {
			p := s.pools[c.Name]
			if p.op == nil || r.Pool != "" && r.Pool != p.name {
				continue
			}
			waiting := p.queue
			p.queue = nil
			for _, q := range waiting {
				q.refuse(errAborted)
			}
			n++
			p.ended = append(p.ended, func(op *operation) { ended <- op })
			s.abortOperation(p)
		}
		if n == 0 {
			err = errors.New("nothing is under way that could be aborted")
		}
	}) {
		return nil, errEnding
	}
	if err != nil {
		return nil, err
	}
	if progress != nil {
		progress(admin.Progress{Text: "going back"})
	}
	rep := &admin.UpgradeReport{}
	for range n {
		select {
		case op := <-ended:
			rep.Pools = append(rep.Pools, op.report)
		case <-b.ended:
			return nil, errStopped
		case <-s.done:
			return nil, errEnding
		}
	}
	rep.Outcome = abortOutcome(rep.Pools)
	rep.DurationSecs = time.Since(began).Seconds()
	return rep, nil
}

// abortOutcome is the exit code of an abort: it is done when everything is back.
func abortOutcome(pools []admin.PoolReport) admin.Outcome {
	out := admin.OutcomeMoved
	for i := range pools {
		switch r := &pools[i]; {
		case r.Lost > 0:
			return admin.OutcomeLost
		case !r.Aborted:
			out = admin.OutcomeRefused // it came to its end before that
		case r.Stayed > 0 && out == admin.OutcomeMoved:
			out = admin.OutcomeStay
		}
	}
	return out
}
