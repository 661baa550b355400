package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
)

// unit is the ktlsvisor under test: a `ktlsvisor run` of our own program.
type unit struct {
	cmd   *exec.Cmd
	ended context.Context // ends when the process is dead and reaped
	err   error           // how it ended; after ended
	log   *tail
}

// startUnit starts it in a process group of its own, so that ^C on the terminal
// ends the demo, which then ends the unit in order.
func startUnit(o Options, adminPath string) (*unit, error) {
	offload := o.Offload
	if offload == "" {
		offload = "auto"
	}
	u := &unit{log: &tail{also: o.Log}}
	u.cmd = exec.Command(o.Program, "run",
		"--listen", "127.0.0.1:0", "--self-signed",
		"--workers", fmt.Sprint(workers), "--offload", offload, "--admin", adminPath,
		"--", o.Program, "echo-worker")
	u.cmd.Stdout, u.cmd.Stderr = u.log, u.log
	u.cmd.Env = ownEnv()
	// Should the demo be killed, the unit ends too.
	u.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	// What is left of it would hold its output open for ever.
	u.cmd.WaitDelay = 2 * time.Second

	var end context.CancelFunc
	u.ended, end = context.WithCancel(context.Background())
	started := make(chan error, 1)
	go func() {
		// The death signal is that of the thread which started the child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer end()
		err := u.cmd.Start()
		started <- err
		if err == nil {
			u.err = u.cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", o.Program, err)
	}
	return u, nil
}

// ownEnv is the environment without what would make the unit another's: it must not
// meet a supervisor that runs here.
func ownEnv() []string {
	var env []string
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "KTLSVISOR_") && !strings.HasPrefix(kv, "TABLEFLIP_") {
			env = append(env, kv)
		}
	}
	return env
}

// stop ends the unit: asked properly, then told, then killed.
func (u *unit) stop(c *admin.Client) error {
	if u.ended.Err() != nil {
		return u.outcome()
	}
	ctx, cancel := context.WithTimeout(context.Background(), stopLimit)
	defer cancel()
	stopErr := c.Stop(ctx, time.Second)
	if stopErr == nil && u.wait(5*time.Second) {
		return u.outcome()
	}
	// The second signal means "at once".
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGTERM, syscall.SIGKILL} {
		_ = u.cmd.Process.Signal(sig)
		if u.wait(2 * time.Second) {
			break
		}
	}
	return fmt.Errorf("ktlsvisor had to be killed: it did not stop when it was asked to: %w", errors.Join(stopErr, u.outcome()))
}

func (u *unit) wait(limit time.Duration) bool {
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-u.ended.Done():
		return true
	case <-t.C:
		return false
	}
}

// outcome is how the unit ended; nil while it runs and when it ended well.
func (u *unit) outcome() error {
	if u.ended.Err() == nil || u.err == nil {
		return nil
	}
	return fmt.Errorf("ktlsvisor run: %w", u.err)
}

// endedEarly is the error of a unit that was not asked to end.
func (u *unit) endedEarly() error {
	if err := u.outcome(); err != nil {
		return fmt.Errorf("ktlsvisor ended by itself: %w", err)
	}
	return errors.New("ktlsvisor ended by itself, with exit code 0")
}

// withLog adds what the unit said last to an error.
func (u *unit) withLog(err error) error {
	if text := u.log.String(); text != "" {
		return fmt.Errorf("%w\nthe last lines of its log:\n%s", err, text)
	}
	return err
}

// tailLines is how much of the unit's log is kept.
const tailLines = 40

// tail keeps the last lines written to it.
type tail struct {
	also io.Writer

	mu    sync.Mutex
	lines []string
	part  string
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.also != nil {
		return t.also.Write(p)
	}
	lines := strings.Split(t.part+string(p), "\n")
	t.part = lines[len(lines)-1]
	t.lines = append(t.lines, lines[:len(lines)-1]...)
	if n := len(t.lines) - tailLines; n > 0 {
		t.lines = append(t.lines[:0], t.lines[n:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.Join(t.lines, "\n")
}
