package sys

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// WaitHangup blocks until the peer of the stream socket fd sends nothing more (FIN or
// RST), whatever is unread before that, and reports whether it did within limit. It
// reads nothing. Needs Linux 2.6.17 (POLLRDHUP).
func WaitHangup(fd int, limit time.Duration) (bool, error) {
	end := time.Now().Add(limit)
	for {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		left := max(0, time.Until(end))
		n, err := unix.Poll(fds, int((left+time.Millisecond-1)/time.Millisecond))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return false, fmt.Errorf("poll: %w", err)
		}
		return n > 0, nil
	}
}
