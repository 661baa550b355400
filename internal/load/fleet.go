package load

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// maxExamples bounds Report.Examples.
const maxExamples = 8

// A Fleet is a set of clients that run. Its methods may be called from any
// goroutine.
type Fleet struct {
	opts    Options
	epoch   time.Time
	clients []*client

	stopOnce sync.Once
	stopping chan struct{} // closed by Stop: send the last frame
	ended    chan struct{} // closed when every goroutine of every client is gone

	pause atomic.Int64 // Counters.ClientPause of the current phase, ns

	mu     sync.Mutex // taken before any client's mu
	phases []phase
}

type phase struct {
	report PhaseReport // counters of finished phases; 0 for the current one
	begin  time.Duration
}

// now is the time since the fleet was made; all its times are such, because
// that is one word and monotonic.
func (f *Fleet) now() time.Duration { return time.Since(f.epoch) }

func (f *Fleet) run(ctx context.Context) {
	f.phases = []phase{{report: PhaseReport{Name: "start"}, begin: f.now()}}
	var wg sync.WaitGroup
	for _, c := range f.clients {
		wg.Go(c.send)
		wg.Go(c.receive)
	}
	all := make(chan struct{})
	go func() {
		defer close(all)
		wg.Wait()
	}()
	go f.monitor(ctx, all)
}

// pulse is the clock with which the fleet notices that it does not get to run.
const pulse = 5 * time.Millisecond

// monitor ends sessions that stall, and all of them when ctx ends. Its clock
// also measures how long this process was kept from running.
func (f *Fleet) monitor(ctx context.Context, all <-chan struct{}) {
	defer close(f.ended)
	tick := time.NewTicker(pulse)
	defer tick.Stop()
	checkEvery := min(f.opts.StallLimit/8, time.Second)
	last := f.now()
	checked := last
	cancelled := ctx.Done()
	for {
		select {
		case <-all:
			return
		case <-cancelled:
			f.cutOff("cancelled")
			cancelled = nil
		case <-tick.C:
			now := f.now()
			if late := int64(now - last - pulse); late > f.pause.Load() {
				f.pause.Store(late)
			}
			last = now
			if now-checked < checkEvery {
				continue
			}
			checked = now
			for _, c := range f.clients {
				c.check(now, f.opts.StallLimit)
			}
		}
	}
}

// Phase ends the current phase and begins the next. During a phase that may
// interrupt, an owner may crash: frames that were on their way at some time in
// it may be missing, which counts as an interruption of that phase, also when
// it shows later. The phase is in force when Phase returns.
func (f *Fleet) Phase(name string, mayInterrupt bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	index := len(f.phases)
	ended := &f.phases[index-1]
	stalls := make([]time.Duration, 0, len(f.clients))
	for _, c := range f.clients {
		stalls = append(stalls, c.enter(index, mayInterrupt, &ended.report.Counters))
	}
	ended.report.StallP99 = p99(stalls)
	ended.report.ClientPause = time.Duration(f.pause.Swap(0))
	now := f.now()
	ended.report.Duration = now - ended.begin
	f.phases = append(f.phases, phase{
		report: PhaseReport{Name: name, MayInterrupt: mayInterrupt},
		begin:  now,
	})
}

// Snapshot reports what happened so far.
func (f *Fleet) Snapshot() Report {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := Report{Sessions: len(f.clients), Phases: make([]PhaseReport, len(f.phases))}
	for i := range f.phases {
		r.Phases[i] = f.phases[i].report
	}
	current := &r.Phases[len(r.Phases)-1]
	current.Duration = f.now() - f.phases[len(f.phases)-1].begin

	stalls := make([]time.Duration, 0, len(f.clients))
	worst := make([]time.Duration, 0, len(f.clients))
	for _, c := range f.clients {
		s, w := c.tell(&r, &current.Counters)
		stalls, worst = append(stalls, s), append(worst, w)
	}
	current.StallP99 = p99(stalls)
	current.ClientPause = time.Duration(f.pause.Load())
	for i := range r.Phases {
		r.add(r.Phases[i].Counters)
	}
	r.StallP99 = p99(worst)
	r.Alive = r.Sessions - r.Lost
	return r
}

// Stop lets every client send a last frame, wait for all its echoes and say
// close_notify, waits for the service to do the same, and reports. When ctx
// ends first, the rest is cut off, and counted so. No goroutine or connection
// is left. Stopping again reports again.
func (f *Fleet) Stop(ctx context.Context) Report {
	f.stopOnce.Do(func() { close(f.stopping) })
	select {
	case <-f.ended:
	case <-ctx.Done():
		f.cutOff("stopped")
		<-f.ended
	}
	return f.Snapshot()
}

func (f *Fleet) cutOff(why string) {
	for _, c := range f.clients {
		c.cutOff(why)
	}
}

// enter makes the client account to another phase. It adds what it counted in
// the one that ends to sum and returns its longest stall there.
func (c *client) enter(index int, mayInterrupt bool, sum *Counters) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.fleet.now()
	if c.outcome == alive {
		c.observeStall(c.oldestAge(now))
	}
	stall := c.current.LongestStall
	sum.add(c.current)
	c.current = Counters{}
	if c.lossy {
		c.lossyEnd = now
	}
	c.phase, c.lossy = index, mayInterrupt
	if mayInterrupt {
		c.lossyIn = index
	}
	return stall
}

// tell adds the client to a report. It returns its longest stall in the
// current phase and in all.
func (c *client) tell(r *Report, current *Counters) (stall, worst time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.outcome == alive {
		c.observeStall(c.oldestAge(c.fleet.now()))
	}
	current.add(c.current)
	if len(c.gapPhases) > 0 {
		r.Interrupted++
	}
	for i, missing := range c.gapPhases {
		r.Phases[i].Interrupted++
		r.Phases[i].BytesInterrupted += missing
	}
	switch c.outcome {
	case lost:
		r.Lost++
		r.Phases[c.endedIn].Lost++
		if r.LostReasons == nil {
			r.LostReasons = make(map[string]int)
		}
		r.LostReasons[c.why]++
	case unclean:
		r.Unclean++
	}
	if c.detail != "" && len(r.Examples) < maxExamples {
		r.Examples = append(r.Examples, c.detail)
	}
	return c.current.LongestStall, c.worst
}
