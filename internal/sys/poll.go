package sys

import "golang.org/x/sys/unix"

// HasInput reports, without waiting, whether a read of fd would not have to wait: there
// is data (in kernel TLS, a whole record), an end or an error. It does not allocate.
// What cannot be found out counts as readable: the read says why.
func HasInput(fd uintptr) bool {
	fds := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds[:], 0)
		if err == unix.EINTR {
			continue
		}
		return err != nil || n > 0
	}
}
