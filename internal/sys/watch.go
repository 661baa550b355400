package sys

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// Watch waits for input on many descriptors with one goroutine, which calls Wait; the
// other methods may be called from others. A descriptor is reported once after each
// Add: then it must be added again.
type Watch struct {
	f      *os.File
	rc     syscall.RawConn
	closed atomic.Bool

	mu sync.RWMutex // read-locked while ep is used
	ep int          // -1 once closed

	events [128]unix.EpollEvent // of Wait
	ready  []uint64
	err    error
}

// NewWatch returns a Watch without descriptors. Close must be called.
func NewWatch() (*Watch, error) {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll_create1: %w", err)
	}
	if err := unix.SetNonblock(ep, true); err != nil {
		_ = unix.Close(ep)
		return nil, fmt.Errorf("epoll instance: %w", err)
	}
	w := &Watch{f: os.NewFile(uintptr(ep), "epoll"), ep: ep}
	if w.rc, err = w.f.SyscallConn(); err != nil {
		_ = w.f.Close()
		return nil, fmt.Errorf("epoll instance: %w", err)
	}
	return w, nil
}

// Add has id reported when there is input on fd, an end or an error, also if that is
// so already. It does not own fd.
func (w *Watch) Add(fd int, id uint64) error {
	e := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLONESHOT, Fd: int32(id), Pad: int32(id >> 32)}
	err := w.control(unix.EPOLL_CTL_ADD, fd, &e)
	if errors.Is(err, unix.EEXIST) {
		err = w.control(unix.EPOLL_CTL_MOD, fd, &e)
	}
	return err
}

// Remove takes back Add. It must come before fd is closed: as long as there is a
// duplicate anywhere the kernel would go on watching.
func (w *Watch) Remove(fd int) error {
	err := w.control(unix.EPOLL_CTL_DEL, fd, nil)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

func (w *Watch) control(op, fd int, e *unix.EpollEvent) error {
	w.mu.RLock()
	defer w.mu.RUnlock()
	if w.ep < 0 {
		return os.ErrClosed
	}
	if err := unix.EpollCtl(w.ep, op, fd, e); err != nil {
		return os.NewSyscallError("epoll_ctl", err)
	}
	return nil
}

// Wait gives the ids of descriptors with input; the slice is good until the next call.
// After Close it fails with os.ErrClosed.
func (w *Watch) Wait() ([]uint64, error) {
	err := w.rc.Read(func(ep uintptr) bool {
		n, err := unix.EpollWait(int(ep), w.events[:], 0)
		if err == unix.EINTR {
			n, err = 0, nil
		}
		w.ready, w.err = w.ready[:0], err
		for i := range n {
			e := &w.events[i]
			w.ready = append(w.ready, uint64(uint32(e.Fd))|uint64(uint32(e.Pad))<<32)
		}
		return n > 0 || err != nil
	})
	if err != nil {
		return nil, w.rawError(err)
	}
	if w.err != nil {
		err = os.NewSyscallError("epoll_wait", w.err)
	}
	return w.ready, err
}

// rawError makes os.ErrClosed of what a RawConn says after Close, which is an error
// internal to package os.
func (w *Watch) rawError(err error) error {
	if w.closed.Load() {
		return os.ErrClosed
	}
	return err
}

// Close ends Wait.
func (w *Watch) Close() error {
	w.closed.Store(true)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ep = -1
	return w.f.Close()
}
