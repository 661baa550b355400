package sys

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// AllowTracer lets a process and its descendants take descriptors of this one
// (pidfd_getfd) where Yama asks for more than the same user: PR_SET_PTRACER, see
// Documentation/admin-guide/LSM/Yama.rst of the kernel. Without Yama nothing is needed,
// and nothing is done.
func AllowTracer(pid int) error {
	err := unix.Prctl(unix.PR_SET_PTRACER, uintptr(pid), 0, 0, 0)
	if err == nil || errors.Is(err, unix.EINVAL) { // EINVAL: no Yama, or no such process
		return nil
	}
	return fmt.Errorf("PR_SET_PTRACER %d: %w", pid, err)
}

// SocketCookie returns the number that the kernel gave a socket (SO_COOKIE, Linux 4.12):
// the same for all duplicates, and never another socket's as long as the machine runs.
func SocketCookie(fd int) (uint64, error) {
	return unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
}
