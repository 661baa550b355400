package sys

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// ETOOMANYREFS is what sendmsg gives when more descriptors of this user are in
// flight between processes than the sender's NOFILE limit allows (unix(7)).
const ETOOMANYREFS = unix.ETOOMANYREFS

// RaiseNofile raises the soft NOFILE limit of this process to the hard one and
// returns it. Children started afterwards inherit it.
func RaiseNofile() (uint64, error) {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return 0, fmt.Errorf("NOFILE limit: %w", err)
	}
	lim.Cur = lim.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return 0, fmt.Errorf("raise NOFILE limit to %d: %w", lim.Max, err)
	}
	return lim.Cur, nil
}

// StartChild starts path with argv and env in a process group of its own, so
// that a terminal's ^C does not reach it. The child gets files as descriptors
// 0, 1, 2, …; the caller keeps its own copies. The pidfd, close-on-exec, is the
// caller's; it comes from the clone itself (CLONE_PIDFD, Linux 5.2) and so cannot
// name another process. The caller reaps the child (ReapDead).
func StartChild(path string, argv, env []string, files []int) (pid, pidfd int, err error) {
	fds := make([]uintptr, len(files))
	for i, f := range files {
		fds[i] = uintptr(f)
	}
	pidfd = -1
	pid, err = syscall.ForkExec(path, argv, &syscall.ProcAttr{
		Env:   env,
		Files: fds,
		Sys:   &syscall.SysProcAttr{Setpgid: true, PidFD: &pidfd},
	})
	if err != nil {
		if pidfd >= 0 {
			_ = unix.Close(pidfd)
		}
		return 0, -1, fmt.Errorf("start %s: %w", path, err)
	}
	return pid, pidfd, nil
}

// ReapDead takes one dead child's status away, whichever child it is, without
// waiting: its exit code, or 128 plus the number of the signal that killed it. ok
// is false when no child is dead. It takes the status from anybody else in this
// process who waits for that child, so only a process that starts all its
// children with StartChild may use it.
func ReapDead() (pid, code int, ok bool) {
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil || pid <= 0:
			return 0, 0, false
		case ws.Signaled():
			return pid, 128 + int(ws.Signal()), true
		default:
			return pid, ws.ExitStatus(), true
		}
	}
}

// ErrNotPidfd reports a descriptor that is something else than a pidfd.
var ErrNotPidfd = errors.New("the descriptor is not a pidfd")

// PidOfPidfd returns the pid behind a pidfd in this process's pid namespace: -1
// for a process that was reaped, 0 for one of another namespace.
func PidOfPidfd(fd int) (int, error) {
	f, err := os.Open("/proc/self/fdinfo/" + strconv.Itoa(fd))
	if err != nil {
		return 0, fmt.Errorf("pidfd: %w", err)
	}
	defer f.Close()
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		if v, found := strings.CutPrefix(sc.Text(), "Pid:"); found {
			pid, err := strconv.Atoi(strings.TrimSpace(v))
			if err != nil {
				return 0, fmt.Errorf("pidfd: %w", err)
			}
			return pid, nil
		}
	}
	return 0, ErrNotPidfd
}

// ExitWatch waits for the death of one process, child or not, in Go's poller.
type ExitWatch struct {
	f      *os.File
	rc     syscall.RawConn
	closed atomic.Bool
}

// NewExitWatch takes ownership of pidfd, also when it fails. It puts the pidfd's
// open file description into non-blocking mode, which only waitid looks at.
func NewExitWatch(pidfd int) (*ExitWatch, error) {
	if err := unix.SetNonblock(pidfd, true); err != nil {
		_ = unix.Close(pidfd)
		return nil, fmt.Errorf("pidfd: %w", err)
	}
	f := os.NewFile(uintptr(pidfd), "pidfd")
	if f == nil {
		return nil, fmt.Errorf("pidfd: %w", unix.EBADF)
	}
	rc, err := f.SyscallConn()
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("pidfd: %w", err)
	}
	return &ExitWatch{f: f, rc: rc}, nil
}

// Wait returns nil once the process is dead (all its threads are gone), and
// os.ErrClosed after Close.
func (w *ExitWatch) Wait() error {
	var perr error
	err := w.rc.Read(func(fd uintptr) bool {
		var dead bool
		dead, perr = Readable(int(fd))
		return dead || perr != nil
	})
	if w.closed.Load() {
		return os.ErrClosed
	}
	return errors.Join(err, perr)
}

// Dead reports whether the process is dead by now.
func (w *ExitWatch) Dead() bool {
	var dead bool
	err := w.rc.Control(func(fd uintptr) { dead, _ = Readable(int(fd)) })
	return err == nil && dead
}

// Kill sends SIGKILL. A process that is dead already is no error.
func (w *ExitWatch) Kill() error {
	var kerr error
	err := w.rc.Control(func(fd uintptr) {
		kerr = PidfdSendSignal(int(fd), unix.SIGKILL)
	})
	if errors.Is(kerr, unix.ESRCH) {
		kerr = nil
	}
	return errors.Join(err, kerr)
}

// Close closes the pidfd; a pending Wait returns.
func (w *ExitWatch) Close() error {
	w.closed.Store(true)
	return w.f.Close()
}

// ReopenPipe opens the pipe behind fd again for reading: a second, non-blocking
// open file description, so that O_NONBLOCK is not forced on the other holders of
// fd. Where /proc does not allow that (no /proc, a socket instead of a pipe) it
// returns a duplicate of fd, and O_NONBLOCK is then shared with them. The caller
// owns the file; fd stays as it was.
func ReopenPipe(fd int) (*os.File, error) {
	n, err := unix.Open("/proc/self/fd/"+strconv.Itoa(fd), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err == unix.EMFILE || err == unix.ENFILE {
		return nil, fmt.Errorf("open pipe: %w", err)
	}
	if err != nil {
		n, err = Dup(fd)
		if err != nil {
			return nil, err
		}
		if err := unix.SetNonblock(n, true); err != nil {
			_ = unix.Close(n)
			return nil, fmt.Errorf("pipe: %w", err)
		}
	}
	return os.NewFile(uintptr(n), "pipe"), nil
}
