package visor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
)

// Limits of a unit, generous because machines that test are busy.
const (
	startLimit   = 60 * time.Second
	commandLimit = 90 * time.Second
	poll         = 2 * time.Millisecond
)

// Options say what to run. Program and either Command or Args are needed.
type Options struct {
	Program string   // path of ktlsvisor
	Command []string // the workers' command, in the flags form of run
	Workers int      // in the flags form, default 2
	Args    []string // instead of the flags form: everything after "run", without --admin
	Env     []string // added to the unit's environment
	Dir     string   // for the socket and the log; it must be short (108 bytes in all)
	// Wrap is a command that gets the unit's command line as arguments; nil runs it
	// directly.
	Wrap []string
	// NotReady: do not wait until the unit serves.
	NotReady bool
}

// A Unit is a ktlsvisor that runs. Kill must be called.
type Unit struct {
	Admin *admin.Client
	Addr  string // of the first listener

	opts   Options
	cmd    *exec.Cmd
	marker string
	log    string
	ended  chan struct{} // closed when the keeper is dead and reaped
	err    error         // how it ended; after ended
}

// Start starts a unit and waits until every worker is ready and a listener is
// bound. On error nothing is left running, and the error has the end of the log.
func Start(o Options) (*Unit, error) {
	u := &Unit{opts: o, log: filepath.Join(o.Dir, "log"), ended: make(chan struct{}),
		marker: fmt.Sprintf("VISOR_UNIT=%d-%d", os.Getpid(), time.Now().UnixNano())}
	socket := filepath.Join(o.Dir, "a.sock")
	u.Admin = admin.Dial(socket)
	args := o.Args
	if args == nil {
		workers := o.Workers
		if workers == 0 {
			workers = 2
		}
		args = append([]string{"--listen", "127.0.0.1:0", "--self-signed", "--workers", fmt.Sprint(workers), "--"}, o.Command...)
	}
	line := append(append([]string{}, o.Wrap...), o.Program, "run", "--admin", socket)
	line = append(line, args...)
	u.cmd = exec.Command(line[0], line[1:]...)
	log, err := os.OpenFile(u.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	u.cmd.Stdout, u.cmd.Stderr = log, log
	u.cmd.Env = append(append(cleanEnv(), o.Env...), u.marker)
	u.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := u.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		u.err = u.cmd.Wait()
		close(u.ended)
	}()
	if o.NotReady {
		return u, nil
	}
	st, err := u.Await(startLimit, "the unit to serve", func(st *admin.Status) bool { return len(st.Listeners) > 0 && Settled(st) })
	if err != nil {
		u.Kill()
		return nil, fmt.Errorf("%w\n%s", err, u.LogTail())
	}
	u.Addr = st.Listeners[0].Address
	return u, nil
}

// cleanEnv is the environment without what would make the unit another's.
func cleanEnv() []string {
	var env []string
	for _, kv := range os.Environ() {
		if strings.HasPrefix(kv, "KTLSVISOR_") && !strings.HasPrefix(kv, "KTLSVISOR_GUEST=") || strings.HasPrefix(kv, "TABLEFLIP_") {
			continue
		}
		env = append(env, kv)
	}
	return env
}

// KeeperPID is the pid of `ktlsvisor run`; with Wrap, that of the wrapper.
func (u *Unit) KeeperPID() int { return u.cmd.Process.Pid }

// Ended is closed when the keeper has ended.
func (u *Unit) Ended() <-chan struct{} { return u.ended }

// ExitCode is the keeper's; it waits for the end, at most limit, and is -1 if that
// does not come or a signal ended it.
func (u *Unit) ExitCode(limit time.Duration) int {
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-u.ended:
		return u.cmd.ProcessState.ExitCode()
	case <-t.C:
		return -1
	}
}

// Await asks for the status until it is as wanted. Having no answer between two
// supervisors is no error before the limit.
func (u *Unit) Await(limit time.Duration, what string, ok func(*admin.Status) bool) (*admin.Status, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	t := time.NewTicker(poll)
	defer t.Stop()
	var (
		seen *admin.Status
		last error
	)
	for {
		st, err := u.Admin.Status(ctx)
		switch {
		case err == nil && ok(st):
			return st, nil
		case err == nil:
			seen = st
		case ctx.Err() == nil:
			last = err
		}
		select {
		case <-t.C:
		case <-u.ended:
			return nil, fmt.Errorf("waited for %s, but the unit has ended: %w", what, errors.Join(u.err, last))
		case <-ctx.Done():
			return nil, fmt.Errorf("waited %s for %s; the last status was %s, the last error %w", limit, what, Describe(seen), errOr(last))
		}
	}
}

func errOr(err error) error {
	if err == nil {
		return errors.New("none")
	}
	return err
}

// AwaitLog waits until the log has text that ok likes.
func (u *Unit) AwaitLog(limit time.Duration, what string, ok func(log string) bool) error {
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for {
		if ok(u.Log()) {
			return nil
		}
		select {
		case <-t.C:
		case <-deadline.C:
			return fmt.Errorf("waited %s for the log to say %s", limit, what)
		}
	}
}

// Log is everything the unit has logged.
func (u *Unit) Log() string {
	b, err := os.ReadFile(u.log)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// LogTail is the end of the log, for people.
func (u *Unit) LogTail() string {
	log := u.Log()
	if n := len(log) - 24<<10; n > 0 {
		log = "[...]" + log[n:]
	}
	return "the unit's log:\n" + log
}

// A Result is what a command of the CLI said.
type Result struct {
	Code           int
	Stdout, Stderr string
}

func (r Result) String() string {
	return fmt.Sprintf("exit code %d\nstdout: %s\nstderr: %s", r.Code, r.Stdout, r.Stderr)
}

// Run runs `ktlsvisor ARGS` against this unit.
func (u *Unit) Run(args ...string) Result {
	return Run(u.opts.Program, append([]string{"--admin", u.Admin.Path()}, args...)...)
}

// Run runs a program to its end; code -1 means that it did not end by itself.
func Run(program string, args ...string) Result {
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = cleanEnv()
	cmd.WaitDelay = time.Second
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	r := Result{Code: cmd.ProcessState.ExitCode(), Stdout: out.String(), Stderr: errs.String()}
	if err != nil && r.Code <= 0 {
		r.Stderr += err.Error()
	}
	return r
}

// WorkerPIDs are the pids of all workers.
func WorkerPIDs(st *admin.Status) (pids []int) {
	for _, p := range st.Pools {
		for _, w := range p.Workers {
			pids = append(pids, w.PID)
		}
	}
	return pids
}

// Settled says that in every pool there are workers, all of the serving generation
// and ready, and no upgrade runs.
func Settled(st *admin.Status) bool {
	for _, p := range st.Pools {
		if p.Upgrading || len(p.Workers) == 0 {
			return false
		}
		for _, w := range p.Workers {
			if w.State != "ready" || w.Generation != p.Generation {
				return false
			}
		}
	}
	return len(st.Pools) > 0 && st.Sessions.Parked == 0
}

// Describe puts a status into one line.
func Describe(st *admin.Status) string {
	if st == nil {
		return "none"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "supervisor %d (generation %d), sessions %+v, counters %+v", st.Supervisor.PID, st.Supervisor.Generation, st.Sessions, st.Counters)
	for _, p := range st.Pools {
		fmt.Fprintf(&b, ", pool %s generation %d upgrading %v:", p.Name, p.Generation, p.Upgrading)
		for _, w := range p.Workers {
			fmt.Fprintf(&b, " [%d gen %d %s %d sessions]", w.PID, w.Generation, w.State, w.Sessions)
		}
	}
	return b.String()
}
