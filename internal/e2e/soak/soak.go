// Package soak lets a ktlsvisor run for a time in which anything may happen at any
// moment: upgrades, kill -9 and SIGSTOP of workers and of the supervisor, clients that come
// and go. Clients check every byte, the unit's account must be theirs, and neither
// descriptors nor memory may grow.
package soak

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
	"github.com/ktlsvisor/ktlsvisor/internal/load"
)

// Options are a soak. Program, Worker, Dir and Duration are needed.
type Options struct {
	Program, Worker string // ktlsvisor and an echo worker
	Dir             string // for the unit; short
	Layer           string // of records; "auto"
	Duration        time.Duration
	Sessions        int    // clients that stay; 40
	Seed            uint64 // of the moments; 0 draws one
	Upgrades        int    // end earlier, after that many upgrades
	Only            string // one action only, such as "upgrade"
	KillWorkers     bool   // sessions outlive their workers in this layer
	Commits         bool   // the worker commits: no client may miss a byte
	Say             func(format string, args ...any)
}

const patience = 30 * time.Second

// Report is what happened.
type Report struct {
	Seed     uint64
	Took     time.Duration
	Done     map[string]int // actions
	Upgrades int
	Clients  load.Report // those that stayed
	Visits   int         // clients that came and went
	Counters admin.Counters
	Samples  []Sample
	Wrong    []string
}

// Sample is what the unit's processes held at one moment, at rest.
type Sample struct {
	Upgrades                 int
	KeeperFDs, SupervisorFDs int
	KeeperKinds              map[string]int // of its descriptors
	KeeperKiB, SupervisorKiB int
	Incarnation              uint32 // of the supervisor
}

type soak struct {
	Options
	unit  *visor.Unit
	fleet []*load.Fleet
	rng   *rand.Rand
	rep   *Report
}

// Run runs a soak. Its error is about what kept it from running; what was wrong is in the
// report.
func Run(ctx context.Context, o Options) (rep *Report, log string, err error) {
	if o.Sessions == 0 {
		o.Sessions = 40
	}
	if o.Layer == "" {
		o.Layer = "auto"
	}
	if o.Seed == 0 {
		o.Seed = uint64(time.Now().UnixNano())
	}
	s := &soak{Options: o, rng: rand.New(rand.NewPCG(o.Seed, 1)), rep: &Report{Seed: o.Seed, Done: map[string]int{}}}
	conf := filepath.Join(o.Dir, "soak.toml")
	text := fmt.Sprintf("self_signed = true\n[[listener]]\naddress = \"127.0.0.1:0\"\n[[pool]]\nname = \"default\"\n"+
		"command = [%q]\nworkers = 2\noffload = %q\nfreeze_timeout = \"500ms\"\n", o.Worker, o.Layer)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		return nil, "", err
	}
	if s.unit, err = visor.Start(visor.Options{Program: o.Program, Args: []string{"-c", conf}, Dir: o.Dir}); err != nil {
		return nil, "", err
	}
	defer s.unit.Kill()
	began := time.Now()
	err = s.all(ctx)
	s.rep.Took = time.Since(began)
	return s.rep, s.unit.Log(), err
}

func (s *soak) all(ctx context.Context) error {
	for _, v := range []uint16{tls.VersionTLS13, tls.VersionTLS12} {
		f, err := load.Start(ctx, load.Options{Addr: s.unit.Addr, TLS: insecure(), Sessions: max(s.Sessions/2, 1), Version: v,
			StallLimit: patience, Interval: 50 * time.Millisecond, MaxPayload: 4096})
		if err != nil {
			return err
		}
		s.fleet = append(s.fleet, f)
	}
	if _, err := s.settled(); err != nil {
		return err
	}
	for end := time.Now().Add(s.Duration); time.Now().Before(end) && ctx.Err() == nil && (s.Upgrades == 0 || s.rep.Upgrades < s.Upgrades); {
		if err := s.round(ctx); err != nil {
			s.wrong("%v", err)
			break
		}
		if n := s.alive(); n < s.sessions() {
			s.wrong("%d of %d clients live", n, s.sessions())
			break
		}
	}
	s.end()
	return nil
}

func insecure() *tls.Config { return &tls.Config{InsecureSkipVerify: true} } // made by our own child

func (s *soak) wrong(format string, args ...any) {
	s.rep.Wrong = append(s.rep.Wrong, fmt.Sprintf(format, args...))
}

func (s *soak) sessions() int { return 2 * max(s.Sessions/2, 1) }

func (s *soak) alive() (n int) {
	for _, f := range s.fleet {
		n += f.Snapshot().Alive
	}
	return n
}

// settled waits until all serve and nothing is under way.
func (s *soak) settled() (*admin.Status, error) {
	return s.unit.Await(patience, "all workers to serve all sessions", func(st *admin.Status) bool {
		return visor.Settled(st) && len(st.Pools[0].Workers) == 2 && st.Sessions.Total == s.sessions()
	})
}

// action is drawn by its weight. kills says that what an application had in hand may be
// gone.
type action struct {
	name   string
	weight int
	kills  bool
	do     func(*soak, context.Context, *admin.Status) error
}

var actions = []action{
	{"upgrade", 6, false, (*soak).upgrade},
	{"upgrade of the supervisor", 1, false, func(s *soak, _ context.Context, _ *admin.Status) error { return s.command("upgrade", "--supervisor") }},
	{"kill -9 of a worker", 3, true, (*soak).killWorker},
	{"kill -9 of the supervisor", 3, false, (*soak).killSupervisor},
	{"kill -9 of a worker in an upgrade", 3, true, (*soak).killInUpgrade},
	{"kill -9 of the supervisor in an upgrade", 3, false, (*soak).killSupervisorInUpgrade},
	{"kill -9 of both", 1, true, (*soak).killBoth},
	{"SIGSTOP of a worker in an upgrade", 2, false, (*soak).stopInUpgrade},
	{"SIGSTOP of the supervisor", 1, false, (*soak).stopSupervisor},
	{"clients come and go", 2, false, (*soak).visit},
}

// upgradeTime is about what an upgrade of so few sessions takes, starts of workers
// included.
const upgradeTime = 120 * time.Millisecond

func (s *soak) round(ctx context.Context) error {
	st, err := s.settled()
	if err != nil {
		return err
	}
	a, err := s.draw()
	if err != nil {
		return err
	}
	for _, f := range s.fleet {
		f.Phase(a.name, a.kills && !s.Commits)
	}
	if err := a.do(s, ctx, st); err != nil {
		return fmt.Errorf("%s: %w", a.name, err)
	}
	if st, err = s.settled(); err != nil {
		return fmt.Errorf("after %s: %w", a.name, err)
	}
	s.rep.Done[a.name]++
	if err := s.advance(); err != nil {
		return fmt.Errorf("after %s: %w", a.name, err)
	}
	return s.sample(st)
}

func (s *soak) draw() (action, error) {
	if s.Only != "" {
		i := slices.IndexFunc(actions, func(a action) bool { return a.name == s.Only })
		if i < 0 {
			return action{}, fmt.Errorf("no action %q", s.Only)
		}
		return actions[i], nil
	}
	list := slices.DeleteFunc(slices.Clone(actions), func(a action) bool { return a.kills && !s.KillWorkers })
	total := 0
	for _, a := range list {
		total += a.weight
	}
	n := s.rng.IntN(total)
	for _, a := range list {
		if n -= a.weight; n < 0 {
			return a, nil
		}
	}
	return actions[0], nil
}

// advance waits until every frame that was on its way is back, so that a gap belongs to
// the round that made it.
func (s *soak) advance() error {
	for _, f := range s.fleet {
		was := f.Snapshot().FramesChecked
		for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
			r := f.Snapshot()
			if r.Alive == 0 || r.FramesChecked >= was+2*int64(r.Alive) {
				break
			}
			if time.Now().After(end) {
				return fmt.Errorf("the clients stand still: %v", r.Err())
			}
		}
	}
	return nil
}

func (s *soak) sample(st *admin.Status) error {
	p := Sample{Upgrades: s.rep.Upgrades, Incarnation: st.Supervisor.Generation}
	var errs [4]error
	p.KeeperKinds, errs[0] = visor.DescriptorKinds(s.unit.KeeperPID())
	for _, n := range p.KeeperKinds {
		p.KeeperFDs += n
	}
	p.SupervisorFDs, errs[1] = visor.Descriptors(st.Supervisor.PID)
	p.KeeperKiB, errs[2] = visor.ResidentKiB(s.unit.KeeperPID())
	p.SupervisorKiB, errs[3] = visor.ResidentKiB(st.Supervisor.PID)
	s.rep.Samples = append(s.rep.Samples, p)
	return errors.Join(errs[:]...)
}

func (s *soak) command(args ...string) error {
	r := s.unit.Run(args...)
	if r.Code != 0 {
		return fmt.Errorf("ktlsvisor %s: %s", strings.Join(args, " "), r)
	}
	return nil
}

func (s *soak) upgrade(context.Context, *admin.Status) error {
	s.rep.Upgrades++
	return s.command("upgrade")
}

func (s *soak) worker(st *admin.Status) int {
	list := visor.WorkerPIDs(st)
	return list[s.rng.IntN(len(list))]
}

func (s *soak) kill(pid int) error {
	if err := s.unit.KillProcess(pid); err != nil && !gone(err) {
		return err
	}
	return nil
}

// gone: the process ended by itself before it could be killed or stopped.
func gone(err error) bool {
	return errors.Is(err, os.ErrProcessDone) || errors.Is(err, syscall.ESRCH) || strings.Contains(err.Error(), "not of this unit") || strings.Contains(err.Error(), "dead")
}

func (s *soak) killWorker(_ context.Context, st *admin.Status) error { return s.kill(s.worker(st)) }

func (s *soak) killSupervisor(context.Context, *admin.Status) error {
	_, _, _, err := s.unit.KillSupervisor(patience)
	return err
}

func (s *soak) killBoth(ctx context.Context, st *admin.Status) error {
	if err := s.kill(s.worker(st)); err != nil {
		return err
	}
	return s.killSupervisor(ctx, st)
}

// during runs an upgrade and, at some moment of it, f.
func (s *soak) during(f func() error) error {
	s.rep.Upgrades++
	ended := make(chan visor.Result, 1)
	go func() { ended <- s.unit.Run("upgrade") }()
	time.Sleep(time.Duration(s.rng.IntN(int(upgradeTime)))) // the moment is what is tried
	err := f()
	r := <-ended
	if r.Code < 0 || r.Code > 1 && r.Code != 4 {
		err = errors.Join(err, fmt.Errorf("the upgrade: %s", r))
	}
	return err
}

func (s *soak) someWorker() (int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	st, err := s.unit.Admin.Status(ctx)
	if err != nil {
		return 0, err
	}
	return s.worker(st), nil
}

func (s *soak) killInUpgrade(context.Context, *admin.Status) error {
	return s.during(func() error {
		pid, err := s.someWorker()
		if err != nil {
			return err
		}
		return s.kill(pid)
	})
}

func (s *soak) killSupervisorInUpgrade(ctx context.Context, st *admin.Status) error {
	return s.during(func() error { return s.killSupervisor(ctx, st) })
}

func (s *soak) stopInUpgrade(context.Context, *admin.Status) error {
	return s.during(func() error {
		pid, err := s.someWorker()
		if err != nil {
			return err
		}
		return s.stop(pid)
	})
}

func (s *soak) stopSupervisor(_ context.Context, st *admin.Status) error {
	return s.stop(st.Supervisor.PID)
}

// stop stops a process for up to 0.8 s.
func (s *soak) stop(pid int) error {
	err := s.unit.Signal(pid, syscall.SIGSTOP)
	if err == nil {
		time.Sleep(time.Duration(s.rng.IntN(800)) * time.Millisecond)
		err = s.unit.Signal(pid, syscall.SIGCONT)
	}
	if err != nil && gone(err) {
		return nil
	}
	return err
}

func (s *soak) visit(ctx context.Context, _ *admin.Status) error {
	n := 1 + s.rng.IntN(20)
	f, err := load.Start(ctx, load.Options{Addr: s.unit.Addr, TLS: insecure(), Sessions: n, Interval: 10 * time.Millisecond, StallLimit: patience})
	if err != nil {
		return err
	}
	time.Sleep(50 * time.Millisecond)
	stop, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s.rep.Visits += n
	return f.Stop(stop).Err()
}
