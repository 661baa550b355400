package keeper

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// Config is what Run needs. Only Supervisor is required.
type Config struct {
	// Supervisor is its command line; [0] is an absolute path, looked up at each
	// start, so that a replaced binary is picked up. When it cannot be executed,
	// or supervisors died three times in a row within 5 s of their start, the
	// keeper's own image is started instead, with the same arguments; should that
	// die three times as well, it is the path's turn again.
	Supervisor []string
	// Env is the supervisor's environment, without EnvFD, which is added. Nil
	// means that of this process.
	Env []string
	Log hclog.Logger
	// Backoff is the pause before a restart. A supervisor that lived 5 s, and the
	// first that did not, is restarted at once.
	Backoff Backoff
	// Grace is how long the leader may take to say Done after Terminate; then it
	// is killed. 0 means 30 s.
	Grace time.Duration
	// LeadWithin is how long a process that was started or attached may take to
	// lead while nobody does; then another is started. 0 means 15 s.
	LeadWithin time.Duration
	// Initial is stored before the first supervisor starts. Run owns its
	// descriptors, also when it fails.
	Initial []Entry
	// Output gets the workers' output while no supervisor leads. It may block
	// (output is then dropped), and is not used after Run returned, unless it
	// blocks. Nil drops all.
	Output io.Writer
}

// Backoff bounds the pause before a restart: Min, doubled up to Max. 0 means
// 100 ms and 5 s.
type Backoff struct{ Min, Max time.Duration }

const (
	quickDeath    = 5 * time.Second // a supervisor that dies sooner failed to start
	fallbackAfter = 3               // quick deaths before the other image is tried
	maxChannels   = 32
	// lastWords is how long after the leader's death its channel may still bring
	// what it had sent; the kernel closes it before it reports the death.
	lastWords = 200 * time.Millisecond
	trimEvery = time.Second
	// endWait is how long a supervisor that said Done may take to exit.
	endWait = 2 * time.Second
)

func (c *Config) complete() error {
	if len(c.Supervisor) == 0 || !filepath.IsAbs(c.Supervisor[0]) {
		return fmt.Errorf("keeper: the supervisor's command %q does not start with an absolute path", c.Supervisor)
	}
	for i := range c.Initial {
		if err := c.Initial[i].validate(); err != nil {
			return fmt.Errorf("keeper: %w", err)
		}
	}
	if c.Env == nil {
		c.Env = os.Environ()
	}
	if c.Log == nil {
		c.Log = hclog.NewNullLogger()
	}
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&c.Backoff.Min, 100*time.Millisecond)
	def(&c.Backoff.Max, 5*time.Second)
	def(&c.Grace, 30*time.Second)
	def(&c.LeadWithin, 15*time.Second)
	return nil
}

// keeper is the state of Run; all of it is owned by the goroutine that runs loop.
type keeper struct {
	cfg    Config
	log    hclog.Logger
	store  *store
	drains drains

	channels map[*channel]struct{}
	procs    map[*proc]struct{}

	leader      *proc    // who leads; nil when nobody does
	leaderCh    *channel // its channel; nil when it lost it
	yielded     *channel // who may reclaim
	incarnation uint32   // of the last LEAD
	quick       int      // quick deaths in a row

	ending   bool  // TERMINATE was sent
	doneProc *proc // who said DONE
	result   *result

	restart, leadBy, orphan, words, grace, end, idle alarm

	trim sys.Trim // memory, after many entries came or went

	requests chan request
	gone     chan gone
	deaths   chan *proc
	stop     chan struct{}
	wg       sync.WaitGroup
}

type result struct {
	code int
	err  error
}

// alarm is a timer that knows whether it is set.
type alarm struct {
	t   *time.Timer
	set bool
}

func (a *alarm) init() {
	a.t = time.NewTimer(time.Hour)
	a.t.Stop()
}

// arm sets the alarm unless it is set already.
func (a *alarm) arm(d time.Duration) {
	if !a.set {
		a.set = true
		a.t.Reset(d)
	}
}

func (a *alarm) clear() {
	a.t.Stop()
	a.set = false
}

// Run starts the supervisor, holds what it is given, and restarts the supervisor
// when it dies. It returns when the leader says Done, with its exit code, or when
// ctx ended: the leader is then asked to terminate and has Config.Grace to say
// Done. The exit code is 0 when there was no leader to ask; with an error it is
// not 0.
//
// It makes this process a subreaper and reaps every child: no other code of the
// process may start or wait for children meanwhile.
func Run(ctx context.Context, cfg Config) (exitCode int, err error) {
	sys.SmallPages()
	if err := cfg.complete(); err != nil {
		for i := range cfg.Initial {
			sys.CloseAll(cfg.Initial[i].FDs)
		}
		return 1, err
	}
	k := &keeper{
		cfg:      cfg,
		log:      cfg.Log,
		channels: make(map[*channel]struct{}),
		procs:    make(map[*proc]struct{}),
		requests: make(chan request),
		gone:     make(chan gone),
		deaths:   make(chan *proc),
		stop:     make(chan struct{}),
	}
	nofile, err := sys.RaiseNofile()
	if err != nil {
		k.log.Warn("cannot raise the limit of open files", "error", err)
		if nofile, err = sys.RlimitNofile(); err != nil {
			nofile = 1024
		}
	}
	k.store = newStore(nofile)
	defer k.store.close()
	initial := make([]*held, 0, len(cfg.Initial))
	for _, e := range cfg.Initial {
		initial = append(initial, newHeld(e.Key, e.Meta, e.FDs))
	}
	if len(initial) > 0 {
		if err := k.store.put(initial); err != nil {
			return 1, fmt.Errorf("keeper: %w: %w", ErrFull, err)
		}
	}
	if err := sys.SetSubreaper(); err != nil {
		return 1, fmt.Errorf("keeper: become the parent of orphans (PR_SET_CHILD_SUBREAPER): %w", err)
	}
	for _, a := range []*alarm{&k.restart, &k.leadBy, &k.orphan, &k.words, &k.grace, &k.end, &k.idle} {
		a.init()
	}
	k.drains = drains{log: k.log, sink: newSink(cfg.Output)}
	defer k.drains.sink.close()
	defer k.drains.stop()

	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	defer signal.Stop(children)
	// A closed stderr must not kill the keeper. Notify rather than Ignore:
	// ignored signals stay ignored in the supervisor.
	pipes := make(chan os.Signal, 1)
	signal.Notify(pipes, syscall.SIGPIPE)
	defer signal.Stop(pipes)

	r := k.loop(ctx, children)
	k.cleanup()
	return r.code, r.err
}

func (k *keeper) loop(ctx context.Context, children <-chan os.Signal) result {
	ended := ctx.Done()
	k.reconsider()
	for k.result == nil {
		select {
		case r := <-k.requests:
			k.trim.Did(len(r.msg.Entries) + len(r.msg.IDs))
			r.answer <- k.handle(r)
		case g := <-k.gone:
			k.channelGone(g)
		case p := <-k.deaths:
			k.reap()
			k.died(p)
		case <-children:
			k.reap()
		case <-ended:
			ended = nil
			k.terminate()
		case <-k.restart.t.C:
			k.restart.set = false
			k.startSupervisor()
		case <-k.leadBy.t.C:
			k.leadBy.set = false
			k.nobodyLed()
		case <-k.orphan.t.C:
			k.orphan.set = false
			k.killOrphan()
		case <-k.idle.t.C:
			k.idle.set = false
			k.trim.Tick()
		case <-k.words.t.C:
			k.words.set = false
			for p := range k.procs {
				if p.dead {
					k.bury(p)
				}
			}
		case <-k.grace.t.C:
			k.grace.set = false
			k.result = &result{1, fmt.Errorf("keeper: the supervisor did not stop within %v and was killed", k.cfg.Grace)}
			continue
		case <-k.end.t.C:
			k.end.set = false
			k.log.Warn("the supervisor said that it was done but did not exit; killing it", "pid", k.doneProc.pid)
			k.finishDone()
			continue
		}
		if k.trim.Due() {
			k.idle.arm(trimEvery)
		}
		k.reconsider()
	}
	return *k.result
}

// cleanup ends everything that loop started. Supervisors that are still alive
// are killed: without a keeper none of them is of use.
func (k *keeper) cleanup() {
	limit := time.NewTimer(endWait)
	defer limit.Stop()
	waiting := 0
	for p := range k.procs {
		if !p.dead && p.kill(k.log) {
			waiting++
		}
	}
	for waiting > 0 {
		select {
		case p := <-k.deaths:
			if !p.dead {
				p.dead = true
				waiting--
			}
		case r := <-k.requests:
			sys.CloseAll(r.fds)
			r.answer <- failed(failEnding, "")
		case <-k.gone:
		case <-limit.C:
			waiting = 0
		}
	}
	close(k.stop)
	for c := range k.channels {
		c.close()
	}
	for p := range k.procs {
		_ = p.watch.Close()
	}
	k.wg.Wait()
	for {
		if _, _, ok := sys.ReapDead(); !ok {
			return
		}
	}
}

// terminate passes the end of Run's context on.
func (k *keeper) terminate() {
	k.log.Info("stopping")
	k.ending = true
	k.restart.clear()
	k.leadBy.clear()
	k.grace.arm(k.cfg.Grace)
	for c := range k.channels {
		if c.hello {
			k.pushTerminate(c)
		}
	}
}

func (k *keeper) pushTerminate(c *channel) {
	k.wg.Go(func() {
		if err := c.send(&message{Op: opTerminate}, nil); err != nil {
			k.log.Debug("cannot ask a supervisor to stop", "error", err)
		}
	})
}

func (k *keeper) finishDone() {
	k.result = &k.doneProc.done
}
