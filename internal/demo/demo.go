// Package demo shows everything at once: a ktlsvisor with the built-in echo worker
// and many TLS clients that check every byte, while workers and supervisor are
// replaced and killed under them.
package demo

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/load"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// Defaults and bounds.
const (
	DefaultSessions = 200
	workers         = 2
	startLimit      = 20 * time.Second // until the first supervisor serves
	backLimit       = 10 * time.Second // until a killed process is replaced
	stopLimit       = 15 * time.Second
	watch           = time.Second // how long the clients are watched after each step
	poll            = 5 * time.Millisecond
	spareFiles      = 256 // descriptors that are not connections
)

// Options say what to show.
type Options struct {
	Program  string    // absolute path of ktlsvisor
	Sessions int       // clients; 0: DefaultSessions
	Offload  string    // --offload of the workers; "": auto
	Steps    io.Writer // told each step as it happens
	Log      io.Writer // what the ktlsvisor under test logs; nil: kept, and shown only when something fails
	Color    bool      // Steps is a terminal that shows colours
}

// Run shows it and cleans up after itself, also when ctx ends. The report is not nil
// unless nothing could be started; with an error it covers the steps up to there.
func Run(ctx context.Context, o Options) (*Report, error) {
	if o.Sessions == 0 {
		o.Sessions = DefaultSessions
	}
	if n, err := sys.HardRlimitNofile(); err == nil && uint64(o.Sessions)+spareFiles > n {
		return nil, fmt.Errorf("%d sessions need about %d open files, but the limit of this user is %d: use --sessions %d, or raise the limit (ulimit -Hn)",
			o.Sessions, o.Sessions+spareFiles, n, int64(n)-spareFiles)
	}
	dir, err := os.MkdirTemp("", "ktlsvisor-demo-")
	if err != nil {
		return nil, fmt.Errorf("a directory for the admin socket: %w", err)
	}
	defer os.RemoveAll(dir)

	d := &demo{opts: o, say: newTeller(o.Steps, o.Color), client: admin.Dial(filepath.Join(dir, "admin.sock"))}
	d.report.Sessions = o.Sessions
	began := time.Now()
	err = d.run(ctx)
	d.report.Seconds = time.Since(began).Seconds()
	d.report.conclude()
	return &d.report, err
}

type demo struct {
	opts   Options
	say    *teller
	client *admin.Client
	unit   *unit
	fleet  *load.Fleet
	report Report
}

func (d *demo) run(asked context.Context) (err error) {
	d.say.step("start ktlsvisor with %d workers, a certificate made in memory, no files, no root", workers)
	d.unit, err = startUnit(d.opts, d.client.Path())
	if err != nil {
		return err
	}
	defer func() {
		if serr := d.unit.stop(d.client); serr != nil && err == nil {
			err = serr
		}
		if err != nil && asked.Err() == nil {
			err = d.unit.withLog(err)
		}
	}()
	// Nothing below makes sense any more once it has ended by itself.
	ctx, cancel := context.WithCancelCause(asked)
	defer cancel(nil)
	stopWatch := context.AfterFunc(d.unit.ended, func() { cancel(d.unit.endedEarly()) })
	defer stopWatch()

	st, err := d.await(ctx, startLimit, "the supervisor to serve", func(st *admin.Status) bool {
		return len(st.Listeners) > 0 && settledWorkers(st)
	})
	if err != nil {
		return err
	}
	d.say.done("supervisor pid %d, workers %s", st.Supervisor.PID, pidList(workerPIDs(st)))

	d.say.step("connect %d TLS clients, each sending random data ten times a second and checking every byte that comes back", d.opts.Sessions)
	d.fleet, err = load.Start(ctx, load.Options{
		Addr:     st.Listeners[0].Address,
		Sessions: d.opts.Sessions,
		// The certificate was made a moment ago in the memory of our own child, on
		// loopback: there is nothing to verify it against.
		TLS: &tls.Config{InsecureSkipVerify: true},
	})
	if err != nil {
		return fmt.Errorf("connect the clients: %w", err)
	}
	defer d.stopFleet()
	if st, err = d.settled(ctx); err != nil {
		return err
	}
	d.report.Layer = layerOf(st)
	d.say.done("%d connected, in the %s layer", st.Sessions.Total, d.report.Layer)

	for _, s := range []struct {
		name         string
		mayInterrupt bool
		do           func(context.Context, *Step) error
	}{
		{"serve", false, d.serve},
		{"upgrade the workers", false, d.upgradeWorkers},
		{"upgrade the supervisor", false, d.upgradeSupervisor},
		{"kill -9 the supervisor", false, d.killSupervisor},
		{"upgrade the workers again", false, d.upgradeWorkers},
		{"kill -9 a worker", true, d.killWorker},
	} {
		if err := d.step(ctx, s.name, s.mayInterrupt, s.do); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}

// step runs one step under the eyes of the clients and writes down what it did.
func (d *demo) step(ctx context.Context, name string, mayInterrupt bool, do func(context.Context, *Step) error) error {
	s := Step{Name: name, Before: d.fleet.Snapshot().Alive}
	d.say.step("%s", name)
	d.fleet.Phase(name, mayInterrupt)
	phase := len(d.fleet.Snapshot().Phases) - 1
	err := do(ctx, &s)
	if err == nil {
		err = d.watchClients(ctx)
	}
	if err == nil {
		_, err = d.settled(ctx)
	}
	snap := d.fleet.Snapshot()
	p := snap.Phases[phase]
	s.After, s.Lost, s.WrongBytes, s.Interrupted = snap.Alive, p.Lost, p.WrongBytes, p.Interrupted
	s.LongestStallMillis = millis(p.LongestStall)
	d.report.Steps = append(d.report.Steps, s)
	if err != nil {
		return err
	}
	d.say.done("%s; %d connections open, longest stall %.0f ms", s.What, s.After, s.LongestStallMillis)
	return nil
}

// watchClients lets the clients go on for a while; it is a time of observation, and
// nothing depends on its length.
func (d *demo) watchClients(ctx context.Context) error {
	t := time.NewTimer(watch)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// stopFleet ends the clients properly and takes their last words into the report.
func (d *demo) stopFleet() {
	ctx, cancel := context.WithTimeout(context.Background(), stopLimit)
	defer cancel()
	r := d.fleet.Stop(ctx)
	d.report.fleet = &r
}

// await asks for the status until it is as wanted. Between two supervisors there is
// none, which is not an error before the limit.
func (d *demo) await(ctx context.Context, limit time.Duration, what string, ok func(*admin.Status) bool) (*admin.Status, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("waited %s for %s", limit, what))
	defer cancel()
	t := time.NewTicker(poll)
	defer t.Stop()
	var last error
	for {
		st, err := d.client.Status(ctx)
		if err == nil && ok(st) {
			return st, nil
		}
		if err != nil && ctx.Err() == nil {
			last = err
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			if last != nil {
				return nil, fmt.Errorf("%w; the last answer was: %w", context.Cause(ctx), last)
			}
			return nil, context.Cause(ctx)
		}
	}
}

// settled waits until the supervisor's count of sessions is that of the clients, no
// session is between two owners, and every worker serves.
func (d *demo) settled(ctx context.Context) (*admin.Status, error) {
	var seen string
	st, err := d.await(ctx, backLimit, "the supervisor to count what the clients count", func(st *admin.Status) bool {
		alive := d.opts.Sessions
		if d.fleet != nil {
			alive = d.fleet.Snapshot().Alive
		}
		seen = fmt.Sprintf("%d connections are open, the supervisor counts %d sessions, %d of them parked; workers: %s",
			alive, st.Sessions.Total, st.Sessions.Parked, workersText(st))
		return st.Sessions.Total == alive && st.Sessions.Parked == 0 && settledWorkers(st)
	})
	if err != nil && seen != "" {
		err = fmt.Errorf("%w: %s", err, seen)
	}
	return st, err
}
