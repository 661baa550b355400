package ktls

import (
	"errors"
	"net"
	"os"
	"syscall"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// WaitRead waits until the next Read would most likely not have to wait, and takes
// nothing: so a program with many idle sessions need not hold a buffer for each. The
// end of the session and its errors are left to Read; WaitRead itself fails with
// os.ErrDeadlineExceeded (the read deadline) and net.ErrClosed only.
//
// A record of which only a part has arrived may end the wait in the software layer.
func (c *Conn) WaitRead() error {
	c.rmu.Lock()
	defer c.rmu.Unlock()
	if c.closed.Load() {
		return net.ErrClosed
	}
	if len(c.unread) > 0 || c.commits.waiting() > 0 || c.readEnd() != nil {
		return nil
	}
	c.settle()
	var err error
	if c.rel != nil {
		err = c.awaitKey()
	}
	if err == nil {
		err = c.layer.waitRead()
	}
	switch {
	case c.closed.Load():
		return net.ErrClosed
	case errors.Is(err, os.ErrDeadlineExceeded):
		return os.ErrDeadlineExceeded
	}
	return nil
}

// Trim gives back memory that the session can do without until its next byte: keys in
// the form in which they are used are made again then. It does nothing while a Read or
// a Write is in progress.
func (c *Conn) Trim() {
	if !c.rmu.TryLock() {
		return
	}
	defer c.rmu.Unlock()
	if !c.wmu.TryLock() {
		return
	}
	defer c.unlockInner()
	if l, ok := c.layer.(*softLayer); ok && !c.closed.Load() {
		l.rx.aead, l.tx.aead = nil, nil
	}
}

func (l *softLayer) waitRead() error {
	if len(l.rx.plain) > 0 {
		return nil
	}
	if rec, err := l.rx.whole(); rec != nil || err != nil {
		return nil
	}
	return readable(l.rc)
}

// waitRead does not believe poll, because of kernels that can change keys (6.14 and
// later): from the moment at which such a kernel has seen a KeyUpdate (in TLS 1.2, too),
// which it does when it looks for more data to give with what it has, until the next key
// is set, poll calls the socket unreadable, also while the KeyUpdate is still to be read.
// And when an owner before us read it and died, nothing would ever end the wait.
func (l *kernelLayer) waitRead() error {
	if l.readFailed.Load() != nil {
		return nil
	}
	return l.rc.Read(func(fd uintptr) bool { return sys.HasInput(fd) || l.peek(fd) })
}

// peek reports that read would not have to wait. An error is kept for read: the socket
// says some of them once only.
func (l *kernelLayer) peek(fd uintptr) bool {
	var b [1]byte
	_, _, _, err := sys.TLSPeek(int(fd), b[:])
	switch {
	case errors.Is(err, sys.EAGAIN):
		return false
	case err != nil && !errors.Is(err, sys.EKEYEXPIRED):
		l.peeked = err
	}
	return true
}

func readable(rc syscall.RawConn) error { return rc.Read(sys.HasInput) }
