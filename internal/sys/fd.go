package sys

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Errno values that callers decide on, so that they need not import x/sys.
const (
	EAGAIN   = unix.EAGAIN
	EBADF    = unix.EBADF
	EBUSY    = unix.EBUSY
	EEXIST   = unix.EEXIST
	EMFILE   = unix.EMFILE
	ENFILE   = unix.ENFILE
	ENOENT   = unix.ENOENT
	ENOTCONN = unix.ENOTCONN
	EPIPE    = unix.EPIPE
	ESRCH    = unix.ESRCH
)

// Dup returns a close-on-exec duplicate of fd, which the caller owns.
func Dup(fd int) (int, error) {
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return -1, fmt.Errorf("duplicate descriptor: %w", err)
	}
	return n, nil
}

// Close closes one descriptor.
func Close(fd int) error { return unix.Close(fd) }

// ShutdownBoth ends a connected socket in both directions for every holder of a
// duplicate: the peer sees FIN. close(2) of one duplicate does not do that.
func ShutdownBoth(fd int) error { return unix.Shutdown(fd, unix.SHUT_RDWR) }

// ShutdownWrite sends FIN and leaves the receiving direction open.
func ShutdownWrite(fd int) error { return unix.Shutdown(fd, unix.SHUT_WR) }

// IsTCP reports whether fd is a TCP socket (SO_PROTOCOL), which every session's
// descriptor must be before anything is done with it.
func IsTCP(fd int) bool {
	typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || typ != unix.SOCK_STREAM {
		return false
	}
	proto, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	return err == nil && proto == unix.IPPROTO_TCP
}

// SetNonblock puts the open file description of fd into non-blocking mode, for
// every holder of a duplicate.
func SetNonblock(fd int) error { return unix.SetNonblock(fd, true) }

// SetRlimitNofile sets both NOFILE limits of another process.
func SetRlimitNofile(pid int, n uint64) error {
	lim := unix.Rlimit{Cur: n, Max: n}
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &lim, nil); err != nil {
		return fmt.Errorf("set NOFILE limit %d of process %d: %w", n, pid, err)
	}
	return nil
}

// RlimitNofile returns the soft NOFILE limit of this process.
func RlimitNofile() (uint64, error) {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return 0, err
	}
	return lim.Cur, nil
}

// SetSubreaper makes this process the parent of orphaned descendants
// (PR_SET_CHILD_SUBREAPER, Linux 3.4).
func SetSubreaper() error {
	return unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
}

// KernelRelease returns uname's release, for example "6.12.57+deb12-cloud-amd64".
func KernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// PeerUID returns the uid of the process at the other end of a connected Unix
// socket, as the kernel recorded it at connect time (SO_PEERCRED).
func PeerUID(fd int) (uint32, error) {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return 0, fmt.Errorf("SO_PEERCRED: %w", err)
	}
	return cred.Uid, nil
}

// TCPOpen reports whether a TCP connection is open in the sending direction:
// ESTABLISHED or CLOSE_WAIT (tcp(7), TCP_INFO).
func TCPOpen(fd int) bool {
	const established, closeWait = 1, 8 // enum in the kernel's include/net/tcp_states.h
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	return err == nil && (info.State == established || info.State == closeWait)
}
