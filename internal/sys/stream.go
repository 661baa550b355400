package sys

import (
	"fmt"
	"net"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// brief is up to how many bytes Send does not tell the scheduler of the system call,
// which takes as long as a part of a small one. The call cannot wait, so that others
// miss this thread for no longer than they do for a function that computes.
const brief = 4 << 10

// Recv reads from a connected stream socket without waiting, whatever the state
// of O_NONBLOCK, which every holder of a duplicate can change. n is 0 with errno 0
// at the end of the stream; EAGAIN means that nothing is there. little says that the
// caller expects no more than a few kilobytes. It does not allocate. p must not be
// empty, and the socket none with kernel TLS, whose locks others may hold for long.
func Recv(fd uintptr, p []byte, little bool) (n int, errno syscall.Errno) {
	for {
		var r uintptr
		if little {
			r, _, errno = syscall.RawSyscall6(syscall.SYS_RECVFROM, fd,
				uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), syscall.MSG_DONTWAIT, 0, 0)
		} else {
			r, _, errno = syscall.Syscall6(syscall.SYS_RECVFROM, fd,
				uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), syscall.MSG_DONTWAIT, 0, 0)
		}
		if errno == 0 {
			return int(r), 0
		}
		if errno != syscall.EINTR {
			return 0, errno
		}
	}
}

// Send writes to a connected stream socket without waiting and without SIGPIPE;
// EAGAIN means that the socket takes nothing now. It does not allocate. The socket
// must be none with kernel TLS, see Recv.
func Send(fd uintptr, p []byte) (n int, errno syscall.Errno) {
	for {
		var r uintptr
		if len(p) <= brief {
			r, _, errno = syscall.RawSyscall6(syscall.SYS_SENDTO, fd,
				uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), syscall.MSG_DONTWAIT|syscall.MSG_NOSIGNAL, 0, 0)
		} else {
			r, _, errno = syscall.Syscall6(syscall.SYS_SENDTO, fd,
				uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), syscall.MSG_DONTWAIT|syscall.MSG_NOSIGNAL, 0, 0)
		}
		if errno == 0 {
			return int(r), 0
		}
		if errno != syscall.EINTR {
			return 0, errno
		}
	}
}

// SocketAddrs returns both addresses of a connected TCP socket. A peer that is
// gone gives ENOTCONN.
func SocketAddrs(fd int) (local, remote *net.TCPAddr, err error) {
	l, err := unix.Getsockname(fd)
	if err != nil {
		return nil, nil, fmt.Errorf("getsockname: %w", err)
	}
	r, err := unix.Getpeername(fd)
	if err != nil {
		return tcpAddr(l), nil, fmt.Errorf("getpeername: %w", err)
	}
	return tcpAddr(l), tcpAddr(r), nil
}

func tcpAddr(sa unix.Sockaddr) *net.TCPAddr {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return &net.TCPAddr{IP: append(net.IP(nil), sa.Addr[:]...), Port: sa.Port}
	case *unix.SockaddrInet6:
		a := &net.TCPAddr{IP: append(net.IP(nil), sa.Addr[:]...), Port: sa.Port}
		if sa.ZoneId != 0 {
			if ifi, err := net.InterfaceByIndex(int(sa.ZoneId)); err == nil {
				a.Zone = ifi.Name
			}
		}
		return a
	}
	return nil
}
