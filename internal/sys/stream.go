package sys

import (
	"fmt"
	"net"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Recv reads from a connected stream socket without waiting, whatever the state
// of O_NONBLOCK, which every holder of a duplicate can change. n is 0 with a nil
// error at the end of the stream; EAGAIN means that nothing is there. It does not
// allocate. p must not be empty.
func Recv(fd uintptr, p []byte) (n int, err error) {
	for {
		r, _, errno := unix.Syscall6(unix.SYS_RECVFROM, fd,
			uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), unix.MSG_DONTWAIT, 0, 0)
		if errno == 0 {
			return int(r), nil
		}
		if errno != unix.EINTR {
			return 0, errnoError(errno)
		}
	}
}

// Send writes to a connected stream socket without waiting and without SIGPIPE;
// EAGAIN means that the socket takes nothing now. It does not allocate.
func Send(fd uintptr, p []byte) (n int, err error) {
	for {
		r, _, errno := unix.Syscall6(unix.SYS_SENDTO, fd,
			uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
		if errno == 0 {
			return int(r), nil
		}
		if errno != unix.EINTR {
			return 0, errnoError(errno)
		}
	}
}

// errAgain is EAGAIN boxed once: it is the everyday result of Recv and Send.
var errAgain error = unix.EAGAIN

func errnoError(e syscall.Errno) error {
	if e == unix.EAGAIN {
		return errAgain
	}
	return e
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
