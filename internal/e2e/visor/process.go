package visor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/pidfd"
)

const killLimit = 10 * time.Second

// Kill ends every process of the unit, wherever it has got to. It returns how many
// there were.
func (u *Unit) Kill() int {
	killed := 0
	ctx, cancel := context.WithTimeout(context.Background(), killLimit)
	defer cancel()
	// A process that is just being started appears later, so until none is left.
	for ctx.Err() == nil {
		pids := u.Processes()
		if len(pids) == 0 {
			break
		}
		for _, pid := range pids {
			if err := u.KillProcess(pid); err == nil {
				killed++
			}
		}
	}
	<-u.ended
	return killed
}

// Processes lists the live processes of the unit: what it started inherits a mark
// in the environment, so none can hide by losing its parent.
func (u *Unit) Processes() (pids []int) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil
	}
	for _, d := range dirs {
		if pid, err := strconv.Atoi(filepath.Base(d)); err == nil && u.owns(pid) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// owns is false for a zombie, which has no environment.
func (u *Unit) owns(pid int) bool {
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	return err == nil && bytes.Contains(append([]byte{0}, env...), []byte("\x00"+u.marker+"\x00"))
}

// KillProcess kills one process of the unit with -9 and waits for its death.
func (u *Unit) KillProcess(pid int) error {
	p, err := pidfd.Open(pid)
	if err != nil {
		return err
	}
	defer p.Close()
	if !u.owns(pid) {
		return fmt.Errorf("process %d is not of this unit", pid)
	}
	if err := p.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), killLimit)
	defer cancel()
	return p.Wait(ctx)
}

// Signal sends a signal to one process of the unit.
func (u *Unit) Signal(pid int, sig syscall.Signal) error {
	p, err := pidfd.Open(pid)
	if err != nil {
		return err
	}
	defer p.Close()
	if !u.owns(pid) {
		return fmt.Errorf("process %d is not of this unit", pid)
	}
	return p.Signal(sig)
}

// KillSupervisor kills the supervisor with -9 and waits until another one answers.
// back is the time from the kill to that answer.
func (u *Unit) KillSupervisor(limit time.Duration) (oldPID, newPID int, back time.Duration, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	st, err := u.Admin.Status(ctx)
	if err != nil {
		return 0, 0, 0, err
	}
	oldPID = st.Supervisor.PID
	began := time.Now()
	if err := u.KillProcess(oldPID); err != nil {
		return oldPID, 0, 0, fmt.Errorf("kill the supervisor (pid %d): %w", oldPID, err)
	}
	st, err = u.Await(limit, "another supervisor", func(st *admin.Status) bool { return st.Supervisor.PID != oldPID })
	if err != nil {
		return oldPID, 0, 0, err
	}
	return oldPID, st.Supervisor.PID, time.Since(began), nil
}

// Stop runs `ktlsvisor stop` and waits for the keeper's end.
func (u *Unit) Stop() error {
	r := u.Run("stop", "--grace", "5s")
	if r.Code != 0 {
		return fmt.Errorf("ktlsvisor stop: %s", r)
	}
	if code := u.ExitCode(killLimit); code != 0 {
		return fmt.Errorf("ktlsvisor run ended with exit code %d after a stop", code)
	}
	if left := u.Processes(); len(left) > 0 {
		return fmt.Errorf("processes %v are left after a stop", left)
	}
	if _, err := os.Lstat(u.Admin.Path()); !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("the admin socket %s is still there after a stop (%w)", u.Admin.Path(), errOr(err))
	}
	return nil
}

// Descriptors counts the open descriptors of a process.
func Descriptors(pid int) (int, error) {
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	return len(list), err
}

// DescriptorKinds counts the open descriptors of a process by what they are of: "socket",
// "pipe", the name of a memory file.
func DescriptorKinds(pid int) (map[string]int, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	list, err := os.ReadDir(dir)
	kinds := map[string]int{}
	for _, e := range list {
		if to, lerr := os.Readlink(dir + "/" + e.Name()); lerr == nil {
			kind, _, _ := strings.Cut(to, ":[")
			kinds[kind]++
		}
	}
	return kinds, err
}

// ResidentKiB is the resident memory of a process without what it shares with
// files, in KiB (proc_pid_status(5), RssAnon).
func ResidentKiB(pid int) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(b) {
		if rest, ok := bytes.CutPrefix(line, []byte("RssAnon:")); ok {
			return strconv.Atoi(string(bytes.TrimSuffix(bytes.TrimSpace(rest), []byte(" kB"))))
		}
	}
	return 0, fmt.Errorf("process %d: no RssAnon", pid)
}
