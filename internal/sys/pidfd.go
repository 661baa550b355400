package sys

import (
	"errors"
	"syscall"

	"golang.org/x/sys/unix"
)

// PidfdOpen returns a close-on-exec, non-blocking pidfd of a process (pidfd_open,
// Linux 5.3; non-blocking at once since 5.10, by a second call before). The caller
// owns it.
func PidfdOpen(pid int) (int, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if !errors.Is(err, unix.EINVAL) {
		return fd, err
	}
	if fd, err = unix.PidfdOpen(pid, 0); err != nil {
		return -1, err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// PidfdSendSignal sends a signal to the process behind a pidfd, the way kill(2)
// does (Linux 5.1). Signal 0 only checks.
func PidfdSendSignal(fd int, sig syscall.Signal) error {
	return unix.PidfdSendSignal(fd, sig, nil, 0)
}

// PidfdGetfd duplicates descriptor target of the process behind a pidfd into this
// process, close-on-exec (Linux 5.6). The caller owns the result. It needs
// PTRACE_MODE_ATTACH_REALCREDS rights over the process.
func PidfdGetfd(fd, target int) (int, error) {
	return unix.PidfdGetfd(fd, target, 0)
}

// Readable reports whether fd is readable (POLLIN) now, without waiting. A pidfd is
// from the moment when every thread of the process has exited.
func Readable(fd int) (bool, error) {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		_, err := unix.Poll(p, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return false, err
		case p[0].Revents&unix.POLLNVAL != 0:
			return false, unix.EBADF
		}
		return p[0].Revents&unix.POLLIN != 0, nil
	}
}
