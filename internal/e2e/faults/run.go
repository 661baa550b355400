package faults

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
)

// Options are the same for all cases of a run.
type Options struct {
	Bin      string        // folder with ktlsvisor and echo, built with the tag "fault"
	Layer    string        // "software" or "kernel"
	Dir      string        // for units; short
	Patience time.Duration // bounds what takes no time on an idle machine; 20 s
	Interval time.Duration // between two frames of a busy client; 15 ms
	Freeze   time.Duration // freeze_timeout of the pool; 400 ms
	Trace    bool          // note the steps that are passed
}

// stopTime is for how long a process that a case stops stands still. It is longer than
// the pools' freeze_timeout.
const stopTime = 600 * time.Millisecond

const poolConfig = `self_signed = true
[[listener]]
address = "127.0.0.1:0"
[[pool]]
name = "default"
command = [%q]
workers = 2
offload = %q
freeze_timeout = %q
ready_timeout = %q
stop_timeout = "1s"
`

// run is one case under way.
type run struct {
	Options
	c     Case
	dir   string // of the unit
	fault string // FAULT_DIR
	unit  *visor.Unit
	crowd *crowd
	res   *Result

	keeperFDs int // without clients
	before    admin.Counters
}

// Run runs one case. What is wrong is in the result.
func Run(ctx context.Context, o Options, c Case) *Result {
	if o.Patience == 0 {
		o.Patience = 20 * time.Second
	}
	if o.Interval == 0 {
		o.Interval = 15 * time.Millisecond
	}
	if o.Freeze == 0 {
		o.Freeze = 400 * time.Millisecond
	}
	r := &run{Options: o, c: c, res: &Result{Case: c, Exit: -1}}
	began := time.Now()
	if err := r.all(ctx); err != nil {
		r.res.wrong("%v", err)
	}
	r.res.Took = time.Since(began)
	return r.res
}

func (r *run) all(ctx context.Context) (err error) {
	if r.dir, err = os.MkdirTemp(r.Dir, "f"); err != nil {
		return err
	}
	defer os.RemoveAll(r.dir)
	if err := r.start(); err != nil {
		return err
	}
	defer func() {
		r.end()
		r.unit.Kill()
		r.readLog()
	}()
	if r.crowd, err = r.connect(ctx); err != nil {
		return err
	}
	defer func() {
		if r.res.Seen.Frames == 0 {
			r.res.Seen = r.crowd.stop(time.Second)
		}
	}()
	if err := errors.Join(r.crowd.fill(r.Patience), r.crowd.advance(r.Patience)); err != nil {
		return err
	}
	st, err := r.settled(clients)
	if err != nil {
		return err
	}
	r.before = st.Counters
	if r.keeperFDs, err = visor.Descriptors(r.unit.KeeperPID()); err != nil {
		return err
	}
	r.keeperFDs -= clients
	r.crowd.phase("fault", true)
	if err := r.operate(ctx, st); err != nil {
		return err
	}
	if err := r.recovered(); err != nil {
		return err
	}
	return r.wind()
}

func (r *run) start() error {
	r.fault = filepath.Join(r.dir, "p")
	if err := os.Mkdir(r.fault, 0o700); err != nil {
		return err
	}
	for _, name := range []string{"old", "new"} {
		if err := os.Symlink(filepath.Join(r.Bin, r.c.worker()), filepath.Join(r.dir, name)); err != nil {
			return err
		}
	}
	conf := filepath.Join(r.dir, "c.toml")
	if err := os.WriteFile(conf, fmt.Appendf(nil, poolConfig, filepath.Join(r.dir, "old"), r.Layer, r.Freeze.String(), (12*r.Freeze).String()), 0o600); err != nil {
		return err
	}
	u, err := visor.Start(visor.Options{Program: filepath.Join(r.Bin, "ktlsvisor"), Args: []string{"-c", conf},
		Env: []string{"FAULT_DIR=" + r.fault}, Dir: r.dir})
	if err != nil {
		return err
	}
	r.unit = u
	return nil
}

// operate does what the case is about, with its fault.
func (r *run) operate(ctx context.Context, st *admin.Status) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if r.Trace {
		if err := os.WriteFile(filepath.Join(r.fault, "trace"), nil, 0o600); err != nil {
			return err
		}
	}
	faults := r.c.faults()
	var plan strings.Builder
	for _, f := range faults {
		fmt.Fprintln(&plan, f.line())
	}
	tmp := filepath.Join(r.fault, "plan.new")
	if err := errors.Join(os.WriteFile(tmp, []byte(plan.String()), 0o600), os.Rename(tmp, filepath.Join(r.fault, "plan"))); err != nil {
		return err
	}
	watched := make(chan int, 1)
	go func() { watched <- r.watch(ctx, faults) }()
	err := r.trigger(ctx, st)
	if err == nil {
		_, err = r.awaitQuiet()
	}
	// What the operation leaves behind goes on a moment longer than the command.
	end := time.Now().Add(lateTime)
	n := 0
	for done := false; !done; {
		select {
		case n = <-watched:
			done = true
		case <-time.After(time.Until(end)):
			cancel()
			n, done = <-watched, true
		}
	}
	r.res.Reached = n == len(faults)
	if err == nil {
		_, err = r.awaitQuiet()
	}
	r.readTrace()
	return errors.Join(err, os.Remove(filepath.Join(r.fault, "plan")))
}

// lateTime is for what comes after the end of an operation: a last RELEASE, a STOP.
const lateTime = 500 * time.Millisecond

// watch sees faults being carried out, and does the runner's part. It returns how many
// there were.
func (r *run) watch(ctx context.Context, faults []Fault) int {
	for i, f := range faults {
		pid := 0
		for pid == 0 {
			if ctx.Err() != nil {
				return i
			}
			b, err := os.ReadFile(filepath.Join(r.fault, "fired-"+strconv.Itoa(i)))
			if pid, _ = strconv.Atoi(strings.TrimSpace(string(b))); err != nil || pid == 0 {
				time.Sleep(time.Millisecond)
			}
		}
		switch {
		case f.Action == "stop":
			time.Sleep(stopTime)
			if err := r.unit.Signal(pid, syscall.SIGCONT); err != nil && !errors.Is(err, os.ErrProcessDone) && !errors.Is(err, syscall.ESRCH) {
				r.res.wrong("SIGCONT: %v", err)
			}
		case f.Action == "nofile":
			time.Sleep(stopTime) // longer than that
		case f.held():
			r.meanwhile(f.Action)
			if err := os.WriteFile(filepath.Join(r.fault, "go-"+strconv.Itoa(i)), nil, 0o600); err != nil {
				r.res.wrong("%v", err)
			}
		}
	}
	return len(faults)
}

// meanwhile is the runner's part while a process holds.
func (r *run) meanwhile(action string) {
	switch action {
	case PeerClose, PeerReset, PeerHalf:
		r.crowd.gone = true
		for _, p := range r.crowd.peers {
			p.leave(action)
		}
	case KillOld, KillNew, KillSup:
		role := map[string]string{KillOld: "old", KillNew: "new", KillSup: "supervise"}[action]
		for _, pid := range r.unit.Processes() {
			if !plays(pid, role) {
				continue
			}
			if err := r.unit.KillProcess(pid); err != nil && !errors.Is(err, os.ErrProcessDone) {
				r.res.wrong("%s: %v", action, err)
			}
			return
		}
		r.res.NoVictim = true
	}
}

// plays says whether a process is a worker of the program of that name, or the
// supervisor.
func plays(pid int, role string) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return false
	}
	args := strings.Split(string(b), "\x00")
	return filepath.Base(args[0]) == role || len(args) > 1 && args[1] == role
}

// trafficTime is how long a case of traffic lasts if its fault is not reached.
const trafficTime = time.Second

// await waits until the last fault was carried out.
func (r *run) await(ctx context.Context, limit time.Duration) error {
	last := filepath.Join(r.fault, "fired-"+strconv.Itoa(len(r.c.faults())-1))
	for end := time.Now().Add(limit); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(time.Millisecond) {
		if _, err := os.Lstat(last); err == nil {
			break
		}
	}
	return nil
}

// trigger is the operation itself.
func (r *run) trigger(ctx context.Context, st *admin.Status) error {
	var res visor.Result
	switch r.c.Op {
	case Upgrade, Restart, Return, Committed:
		res = r.unit.Run("upgrade", "--json", "--wait", r.Patience.String(), "--command", filepath.Join(r.dir, "new"))
		_ = json.Unmarshal([]byte(res.Stdout), &r.res.Report)
	case Succession:
		res = r.unit.Run("upgrade", "--supervisor")
	case Rekey:
		res = r.unit.Run("rekey", "--request", "--wait", "5s")
	case Traffic, Exact:
		return r.await(ctx, trafficTime)
	case Adoption:
		return r.unit.KillProcess(st.Pools[0].Workers[0].PID)
	case Accept:
		for range peers {
			p, err := dialPeer(r.unit.Addr, r.Patience)
			if err != nil {
				r.res.Refused++
				continue
			}
			if err := p.end(false, r.Patience); err != nil {
				r.res.wrong("a client that came meanwhile: %v", err)
			}
		}
		return nil
	}
	r.res.Exit = res.Code
	r.res.Said = strings.TrimSpace(res.Stderr)
	if res.Code < 0 {
		return fmt.Errorf("the command did not end: %s", res)
	}
	return nil
}
