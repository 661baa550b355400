package handoff

import (
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// socket is the ktls.Socket of a session that came from the supervisor. It is registered
// with Go's poller only when somebody first has to wait for it: most sessions of a big
// move wait in the epoll set of rest.go, if they wait here at all before they go on to the
// next worker, and os.NewFile with its Close takes more time than everything else that an
// adoption does.
type socket struct {
	mu     sync.Mutex
	fd     int
	users  int             // calls that use fd without mu and without file
	closed bool            // fd is closed, or will be by the last of users
	file   *os.File        // owns fd, once it is registered
	rc     syscall.RawConn // of file, when it can be waited for
	rdl    time.Time       // deadlines that file does not know yet
	wdl    time.Time
}

var (
	_ ktls.Socket     = (*socket)(nil)
	_ syscall.RawConn = (*socket)(nil)
)

// newSocket takes ownership of fd, which must be non-blocking.
func newSocket(fd int) *socket { return &socket{fd: fd} }

// IsTCP tells ktls what package wire has seen already.
func (s *socket) IsTCP() bool { return true }

// SyscallConn returns s itself: it is its own RawConn.
func (s *socket) SyscallConn() (syscall.RawConn, error) { return s, nil }

// borrow lends the descriptor until giveBack, or the RawConn of the poller when it is
// registered.
func (s *socket) borrow() (fd int, rc syscall.RawConn, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return -1, nil, net.ErrClosed
	case s.rc != nil:
		return -1, s.rc, nil
	}
	s.users++
	return s.fd, nil, nil
}

func (s *socket) giveBack() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.users--; s.users == 0 && s.closed {
		_ = s.closeLocked() // a socket's close has nothing to tell
	}
}

func (s *socket) closeLocked() error {
	if s.file != nil {
		return s.file.Close()
	}
	return sys.Close(s.fd)
}

// Control runs f on the descriptor.
func (s *socket) Control(f func(fd uintptr)) error {
	fd, rc, err := s.borrow()
	switch {
	case err != nil:
		return err
	case rc != nil:
		return rc.Control(f)
	}
	defer s.giveBack()
	f(uintptr(fd))
	return nil
}

// Read runs f until it returns true, and waits for input in between.
func (s *socket) Read(f func(fd uintptr) bool) error {
	rc, done, err := s.try(f, &s.rdl)
	if done || err != nil {
		return err
	}
	return s.ended(rc.Read(f))
}

// Write runs f until it returns true, and waits for room in between.
func (s *socket) Write(f func(fd uintptr) bool) error {
	rc, done, err := s.try(f, &s.wdl)
	if done || err != nil {
		return err
	}
	return s.ended(rc.Write(f))
}

// ended makes net.ErrClosed of what a RawConn says after Close, which is an error internal
// to package os.
func (s *socket) ended(err error) error {
	if err == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	return err
}

// try runs f once without the poller. done says that this was enough; otherwise rc is the
// poller's.
func (s *socket) try(f func(fd uintptr) bool, deadline *time.Time) (rc syscall.RawConn, done bool, err error) {
	fd, rc, err := s.borrow()
	if rc != nil || err != nil {
		return rc, false, err
	}
	s.mu.Lock()
	late := !deadline.IsZero() && !time.Now().Before(*deadline)
	s.mu.Unlock()
	if !late {
		done = f(uintptr(fd))
	}
	s.giveBack()
	switch {
	case late:
		return nil, false, os.ErrDeadlineExceeded
	case done:
		return nil, true, nil
	}
	rc, err = s.register()
	return rc, false, err
}

// register gives the descriptor to the poller. Until now only calls that do not wait have
// used it, and these may go on.
func (s *socket) register() (syscall.RawConn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return nil, net.ErrClosed
	case s.rc != nil:
		return s.rc, nil
	}
	f := os.NewFile(uintptr(s.fd), "session")
	rc, err := f.SyscallConn()
	s.file = f // it owns the descriptor now, whatever comes
	if err == nil {
		err = f.SetReadDeadline(s.rdl)
	}
	if err == nil {
		err = f.SetWriteDeadline(s.wdl)
	}
	if err != nil {
		return nil, err
	}
	s.rc = rc
	return rc, nil
}

// Close closes the descriptor and ends every wait. What uses it at this moment, which
// waits for nothing, has it to its end.
func (s *socket) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	s.closed = true
	if s.users > 0 {
		return nil
	}
	return s.closeLocked()
}

// SetDeadline sets both deadlines.
func (s *socket) SetDeadline(t time.Time) error {
	return s.deadline(func() { s.rdl, s.wdl = t, t }, func() error { return s.file.SetDeadline(t) })
}

// SetReadDeadline bounds pending and later calls of Read.
func (s *socket) SetReadDeadline(t time.Time) error {
	return s.deadline(func() { s.rdl = t }, func() error { return s.file.SetReadDeadline(t) })
}

// SetWriteDeadline bounds pending and later calls of Write.
func (s *socket) SetWriteDeadline(t time.Time) error {
	return s.deadline(func() { s.wdl = t }, func() error { return s.file.SetWriteDeadline(t) })
}

func (s *socket) deadline(note func(), set func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	if s.rc == nil {
		note()
		return nil
	}
	return set()
}
