package pidfd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// ErrDead reports that the process has died: it is os.ErrProcessDone, so that code
// written for os.Process works with this package too.
var ErrDead = os.ErrProcessDone

// Process is one process, held by a pidfd. All methods may be called at the same
// time by several goroutines.
type Process struct {
	f    *os.File // the pidfd
	rc   syscall.RawConn
	wait *os.File // what the poller waits for: f, or an epoll instance that watches it

	watch  sync.Once
	done   chan struct{} // closed when the process has died
	closed chan struct{} // closed by Close
	ended  chan struct{} // closed when the watching goroutine has returned
	failed error         // why the goroutine gave up; read after ended
	close  sync.Once
	err    error // of Close
}

// Open opens a process by its id. The id is only as good as the caller's reason to
// believe that it still belongs to the process meant: a child that was not waited
// for, a parent, or a check afterwards of something only that process has. A process
// that has died and was waited for gives ErrDead; one that was not waited for yet
// can be opened and counts as dead.
func Open(pid int) (*Process, error) {
	fd, err := sys.PidfdOpen(pid)
	switch {
	case errors.Is(err, syscall.ESRCH):
		return nil, fmt.Errorf("open process %d: %w", pid, ErrDead)
	case errors.Is(err, syscall.ENOSYS):
		return nil, fmt.Errorf("open process %d: this kernel has no pidfd_open, Linux 5.3 or newer is needed: %w", pid, err)
	case errors.Is(err, syscall.EPERM):
		return nil, fmt.Errorf("open process %d: pidfd_open is forbidden, most likely by a seccomp filter of the container: %w", pid, err)
	case err != nil:
		return nil, fmt.Errorf("open process %d: no process has this id (it may be that of a thread): %w", pid, err)
	}
	return newProcess(fd)
}

// FromFD makes a Process of a pidfd received from elsewhere, or of the one that
// [syscall.SysProcAttr] gives. It takes ownership of fd, also when it fails. The flags
// of the open file description stay as they are, because others may share it, and
// O_NONBLOCK would make their waitid(P_PIDFD), for example that of [os.Process.Wait],
// give EAGAIN. A pidfd that is blocking therefore costs one more descriptor. A
// descriptor that is no pidfd is refused.
func FromFD(fd int) (*Process, error) {
	if fd < 0 {
		return nil, fmt.Errorf("pidfd %d: %w", fd, syscall.EBADF)
	}
	if _, err := readPid(fd); err != nil && !errors.Is(err, ErrDead) && !errors.Is(err, ErrOtherNamespace) {
		_ = sys.Close(fd)
		return nil, err
	}
	syscall.CloseOnExec(fd)
	return newProcess(fd)
}

// newProcess takes ownership of fd, also when it fails.
func newProcess(fd int) (_ *Process, err error) {
	f := os.NewFile(uintptr(fd), "pidfd")
	if f == nil {
		return nil, fmt.Errorf("pidfd %d: %w", fd, syscall.EBADF)
	}
	wait := f
	defer func() {
		if err != nil {
			if wait != f {
				_ = wait.Close()
			}
			_ = f.Close()
		}
	}()
	// NewFile registers only non-blocking descriptors with Go's poller.
	nonblock, err := sys.IsNonblock(fd)
	if err != nil {
		return nil, fmt.Errorf("pidfd: %w", err)
	}
	if !nonblock {
		ep, err := sys.EpollReadable(fd)
		if err != nil {
			return nil, fmt.Errorf("pidfd: %w", err)
		}
		wait = os.NewFile(uintptr(ep), "pidfd's epoll")
	}
	// Without the poller a wait would block a thread; better to know now.
	if err := wait.SetReadDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("pidfd cannot be waited for in the poller: %w", err)
	}
	rc, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("pidfd: %w", err)
	}
	return &Process{
		f:      f,
		rc:     rc,
		wait:   wait,
		done:   make(chan struct{}),
		closed: make(chan struct{}),
		ended:  make(chan struct{}),
	}, nil
}

// control runs fn with the descriptor, which stays open meanwhile. After Close it
// returns os.ErrClosed.
func (p *Process) control(fn func(fd int) error) error {
	var err error
	if cerr := p.rc.Control(func(fd uintptr) { err = fn(int(fd)) }); cerr != nil {
		return os.ErrClosed
	}
	return err
}

// PID returns the process's id in the pid namespace of /proc. A process that has
// died keeps its id until it was waited for; after that PID returns ErrDead.
func (p *Process) PID() (pid int, err error) {
	err = p.control(func(fd int) (err error) {
		pid, err = readPid(fd)
		return err
	})
	if err != nil {
		return 0, err
	}
	return pid, nil
}

// Dead reports whether every thread of the process has exited, whether or not it was
// waited for.
func (p *Process) Dead() (dead bool, err error) {
	err = p.control(func(fd int) (err error) {
		dead, err = sys.Readable(fd)
		return err
	})
	return dead, err
}

// Signal sends a signal to the process, and to no other, ever. It returns ErrDead
// when the process has died, also while nobody has waited for it yet. Signal 0 only
// checks. nil means that the signal was sent, not that it had its effect: for
// SIGKILL, [Process.Wait] tells when.
func (p *Process) Signal(sig syscall.Signal) error {
	return p.control(func(fd int) error {
		if dead, err := sys.Readable(fd); err == nil && dead {
			return ErrDead
		}
		err := sys.PidfdSendSignal(fd, sig)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, syscall.ESRCH):
			return ErrDead
		case errors.Is(err, syscall.EPERM):
			return fmt.Errorf("signal %v to %s: it runs as another user (CAP_KILL is needed): %w", sig, describe(fd), err)
		}
		return fmt.Errorf("signal %v to %s: %w", sig, describe(fd), err)
	})
}

// GetFD duplicates descriptor fd of the process into this one (pidfd_getfd, Linux
// 5.6). The result is close-on-exec and belongs to the caller; it shares offset and
// file status flags, O_NONBLOCK too, with the original. It returns ErrDead when the
// process has died, and its descriptors with it.
func (p *Process) GetFD(fd int) (got int, err error) {
	got = -1
	err = p.control(func(pfd int) error {
		var err error
		if got, err = sys.PidfdGetfd(pfd, fd); err == nil {
			return nil
		}
		got = -1
		// A process that is about to be waited for gives ESRCH or EBADF, depending on
		// the kernel; what counts is that it has died.
		if dead, derr := sys.Readable(pfd); errors.Is(err, syscall.ESRCH) || derr == nil && dead {
			return fmt.Errorf("take descriptor %d of %s: %w", fd, describe(pfd), ErrDead)
		}
		var why string
		switch {
		case errors.Is(err, syscall.EBADF):
			why = "it has no such descriptor: "
		case errors.Is(err, syscall.EMFILE):
			why = "this process is out of descriptors, raise its NOFILE limit: "
		case errors.Is(err, syscall.EPERM):
			why = "that needs ptrace rights: the same user, the target not PR_SET_DUMPABLE 0, and where Yama is strict an ancestor or PR_SET_PTRACER: "
		case errors.Is(err, syscall.ENOSYS):
			why = "this kernel has no pidfd_getfd, Linux 5.6 or newer is needed: "
		}
		return fmt.Errorf("take descriptor %d of %s: %s%w", fd, describe(pfd), why, err)
	})
	return got, err
}

// FD returns a close-on-exec duplicate of the pidfd, which the caller owns, for
// sending it to another process. It shares O_NONBLOCK with this one.
func (p *Process) FD() (dup int, err error) {
	dup = -1
	err = p.control(func(fd int) (err error) {
		dup, err = sys.Dup(fd)
		return err
	})
	return dup, err
}

// Done returns a channel that is closed when the process has died. It is never
// closed because of Close. The first call starts a goroutine, which ends with the
// process or with Close.
func (p *Process) Done() <-chan struct{} {
	p.watch.Do(func() { go p.watchDeath() })
	return p.done
}

// watchDeath waits in the poller, so that no thread is blocked.
func (p *Process) watchDeath() {
	defer close(p.ended)
	var dead bool
	var err error
	rc, rerr := p.wait.SyscallConn()
	if rerr == nil {
		rerr = rc.Read(func(fd uintptr) bool {
			dead, err = sys.Readable(int(fd))
			return dead || err != nil
		})
	}
	switch {
	case dead:
		close(p.done)
	case err != nil:
		p.failed = err
	default:
		p.failed = rerr
	}
}

// Wait returns nil when the process has died, the context's error when that ended
// first, or os.ErrClosed after Close. It does not collect the exit status: a child
// still has to be waited for by its parent. Any number of goroutines may wait.
func (p *Process) Wait(ctx context.Context) error {
	done := p.Done()
	select {
	case <-done: // a death that is known goes before everything else
		return nil
	default:
	}
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-p.ended:
	}
	select {
	case <-done:
		return nil
	case <-p.closed:
		return os.ErrClosed
	default:
		return fmt.Errorf("wait for the death of a process: %w", p.failed)
	}
}

// Close closes the pidfd; the process is left alone. Pending calls to Wait return
// os.ErrClosed. A second Close does nothing.
func (p *Process) Close() error {
	p.close.Do(func() {
		close(p.closed)
		if p.wait != p.f {
			p.err = p.wait.Close()
		}
		p.err = errors.Join(p.err, p.f.Close())
		// No goroutine may be started any more, and one that was must have ended.
		p.watch.Do(func() { close(p.ended) })
		<-p.ended
	})
	return p.err
}
