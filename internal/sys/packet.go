package sys

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// MaxPacket is the largest message this project sends over a packet socket, in
// bytes. The kernel takes up to 212,960 with default socket buffers
// (net.core.wmem_default), but a few large messages fill the peer's queue, so
// messages stay small and large state travels in a sealed memfd.
const MaxPacket = 64 << 10

// MaxFDs is the largest number of descriptors in one message
// (SCM_MAX_FD in the kernel's include/net/scm.h).
const MaxFDs = 253

// ErrControlTruncated reports that the kernel dropped descriptors of a message
// (MSG_CTRUNC): the receiver is out of descriptors, or the sender sent more than
// MaxFDs. The descriptors that did arrive were closed.
var ErrControlTruncated = errors.New("descriptors of a message were dropped (MSG_CTRUNC); raise the NOFILE limit of the receiver")

// ErrMessageTruncated reports a message larger than the receiver's buffer. Its
// descriptors were closed.
var ErrMessageTruncated = errors.New("message larger than the receive buffer (MSG_TRUNC)")

// PacketPair returns the two ends of a connected AF_UNIX SOCK_SEQPACKET pair,
// non-blocking and close-on-exec. The caller owns both descriptors.
func PacketPair() (a, b int, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, -1, fmt.Errorf("socketpair: %w", err)
	}
	return fds[0], fds[1], nil
}

// PacketConn carries messages and descriptors over one end of a SOCK_SEQPACKET
// socket. Recv and Send wait in Go's poller, never in the kernel, so a peer that
// does not read cannot pin a thread. One goroutine may receive while another
// sends.
type PacketConn struct {
	f      *os.File
	rc     syscall.RawConn
	closed atomic.Bool
}

// NewPacketConn takes ownership of fd, also when it fails.
func NewPacketConn(fd int) (*PacketConn, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	unix.CloseOnExec(fd)
	f := os.NewFile(uintptr(fd), "packet")
	if f == nil {
		return nil, fmt.Errorf("packet socket: %w", unix.EBADF)
	}
	rc, err := f.SyscallConn()
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	return &PacketConn{f: f, rc: rc}, nil
}

// Close closes the socket; a pending Recv or Send returns os.ErrClosed.
func (c *PacketConn) Close() error {
	c.closed.Store(true)
	return c.f.Close()
}

// rawError makes os.ErrClosed of what a RawConn says after Close, which is an error
// internal to package os.
func (c *PacketConn) rawError(err error) error {
	if err != nil && c.closed.Load() {
		return os.ErrClosed
	}
	return err
}

// Dup returns a close-on-exec duplicate of the descriptor, which the caller owns.
func (c *PacketConn) Dup() (fd int, err error) {
	cerr := c.rc.Control(func(s uintptr) { fd, err = Dup(int(s)) })
	if cerr != nil {
		return -1, cerr
	}
	return fd, err
}

// SetReadDeadline bounds pending and later Recv calls.
func (c *PacketConn) SetReadDeadline(t time.Time) error { return c.f.SetReadDeadline(t) }

// SetWriteDeadline bounds pending and later Send calls.
func (c *PacketConn) SetWriteDeadline(t time.Time) error { return c.f.SetWriteDeadline(t) }

// Recv reads one message into buf and returns its length and the descriptors
// that came with it, close-on-exec, which the caller owns. io.EOF means that the
// peer is gone and everything it sent was received. On any error the descriptors of the message have been closed.
func (c *PacketConn) Recv(buf []byte) (n int, fds []int, err error) {
	oob := make([]byte, unix.CmsgSpace(4*MaxFDs))
	var flags, oobn int
	rerr := c.rc.Read(func(fd uintptr) bool {
		for {
			n, oobn, flags, _, err = unix.Recvmsg(int(fd), buf, oob, unix.MSG_CMSG_CLOEXEC)
			// ECONNRESET says, once, that the peer closed with messages of ours unread;
			// what it sent before is still there to be received.
			if !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ECONNRESET) {
				break
			}
		}
		return !errors.Is(err, unix.EAGAIN)
	})
	if rerr != nil {
		return 0, nil, c.rawError(rerr)
	}
	if err != nil {
		return 0, nil, fmt.Errorf("recvmsg: %w", err)
	}
	fds, err = parseRights(oob[:oobn])
	switch {
	case err != nil:
	case flags&unix.MSG_CTRUNC != 0:
		err = ErrControlTruncated
	case flags&unix.MSG_TRUNC != 0:
		err = ErrMessageTruncated
	case n == 0 && len(fds) == 0:
		// We never send empty messages, so this is the end of the stream.
		err = io.EOF
	}
	if err != nil {
		CloseAll(fds)
		return 0, nil, err
	}
	return n, fds, nil
}

func parseRights(oob []byte) (fds []int, err error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("control message: %w", err)
	}
	for i := range msgs {
		if msgs[i].Header.Level != unix.SOL_SOCKET || msgs[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		got, perr := unix.ParseUnixRights(&msgs[i])
		if perr != nil {
			err = fmt.Errorf("SCM_RIGHTS: %w", perr)
			continue
		}
		fds = append(fds, got...)
	}
	return fds, err
}

// Send sends one message with descriptors, which are duplicated into the message:
// the caller keeps its own. It waits in the poller while the peer's queue is full.
func (c *PacketConn) Send(p []byte, fds []int) error {
	return c.send(p, fds, true)
}

// TrySend is Send without waiting: a full queue gives unix.EAGAIN
// (os.ErrDeadlineExceeded is never returned).
func (c *PacketConn) TrySend(p []byte, fds []int) error {
	return c.send(p, fds, false)
}

func (c *PacketConn) send(p []byte, fds []int, wait bool) error {
	if len(p) == 0 {
		return errors.New("packet socket: an empty message would read as the end of the stream")
	}
	if len(fds) > MaxFDs {
		return fmt.Errorf("packet socket: %d descriptors in one message, the limit is %d", len(fds), MaxFDs)
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	var err error
	werr := c.rc.Write(func(fd uintptr) bool {
		for {
			err = unix.Sendmsg(int(fd), p, oob, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
			if !errors.Is(err, unix.EINTR) {
				break
			}
		}
		return !wait || !errors.Is(err, unix.EAGAIN)
	})
	if werr != nil {
		return c.rawError(werr)
	}
	if err != nil {
		return fmt.Errorf("sendmsg (%d bytes, %d descriptors): %w", len(p), len(fds), err)
	}
	return nil
}

// CloseAll closes descriptors, ignoring errors: it is for error paths, on which
// nothing can be done about a close that fails.
func CloseAll(fds []int) {
	for _, fd := range fds {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}
