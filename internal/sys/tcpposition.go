package sys

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// TCPPosition is how far the users of a TCP socket have come in both streams.
// Origins are arbitrary but fixed for the life of a connection, so only differences
// mean anything.
type TCPPosition struct {
	Read    uint64 // bytes taken off the socket; a FIN is not counted
	Written uint64 // bytes given to the socket, acknowledged or not; a FIN is not counted

	SentFIN bool // our end shut down sending
	Shut    bool // and receiving, before the peer did
	// Closed: both directions have ended, or the connection was reset. Then Written is
	// not known, and Read may count a FIN.
	Closed bool
}

// PositionTCP reads both positions. They are exact if nobody uses the socket
// meanwhile, whatever its peer does.
func PositionTCP(fd int) (TCPPosition, error) {
	// Four numbers that no single call gives, so they count only if nothing moved
	// around them.
	const tries = 256
	before, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return TCPPosition{}, fmt.Errorf("TCP_INFO: %w", err)
	}
	for range tries {
		unread, err := unix.IoctlGetInt(fd, unix.SIOCINQ)
		if err != nil {
			return TCPPosition{}, fmt.Errorf("SIOCINQ: %w", err)
		}
		queued, err := unix.IoctlGetInt(fd, unix.SIOCOUTQ)
		if err != nil {
			return TCPPosition{}, fmt.Errorf("SIOCOUTQ: %w", err)
		}
		after, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			return TCPPosition{}, fmt.Errorf("TCP_INFO: %w", err)
		}
		if before.Bytes_acked == after.Bytes_acked && before.Bytes_received == after.Bytes_received && before.State == after.State {
			p := TCPPosition{Read: after.Bytes_received - uint64(unread), Written: after.Bytes_acked + uint64(queued)}
			switch after.State { // a FIN takes a sequence number, like a byte
			case tcpCloseWait, tcpLastAck, tcpClosing, tcpTimeWait:
				p.Read--
			}
			switch after.State {
			case tcpFinWait1, tcpFinWait2, tcpClosing, tcpLastAck, tcpTimeWait:
				p.Written--
				p.SentFIN = true
				if after.State == tcpFinWait1 || after.State == tcpFinWait2 {
					p.Shut = hungUp(fd)
				}
			case tcpClose:
				p.Closed = true
			}
			if p.Shut { // unless the peer's FIN came in between
				if before, err = unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO); err != nil {
					return TCPPosition{}, fmt.Errorf("TCP_INFO: %w", err)
				}
				if before.State != after.State {
					continue
				}
			}
			return p, nil
		}
		before = after
	}
	return TCPPosition{}, fmt.Errorf("TCP_INFO: %w", unix.EAGAIN)
}

// hungUp reports that nothing can be received any more (POLLRDHUP). Without a FIN of the
// peer that is our own doing.
func hungUp(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n == 1 && fds[0].Revents&unix.POLLRDHUP != 0
}

// SetOOBInline makes urgent data a part of the stream (SO_OOBINLINE). Otherwise it
// would be skipped, and reads would fall behind the positions of PositionTCP.
func SetOOBInline(fd int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1); err != nil {
		return fmt.Errorf("SO_OOBINLINE: %w", err)
	}
	return nil
}
