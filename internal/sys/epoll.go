package sys

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// IsNonblock reports whether the open file description of fd is non-blocking.
func IsNonblock(fd int) (bool, error) {
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return false, fmt.Errorf("flags of descriptor %d: %w", fd, err)
	}
	return flags&unix.O_NONBLOCK != 0, nil
}

// EpollReadable returns a close-on-exec, non-blocking epoll instance that is readable
// while fd is. It lets Go's poller wait for a descriptor whose own flags must stay as
// they are, because others share its open file description. The caller owns it, and
// closes it before fd: the instance keeps watching as long as any duplicate of fd is
// open.
func EpollReadable(fd int) (int, error) {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("epoll_create1: %w", err)
	}
	if err := unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}); err != nil {
		_ = unix.Close(ep)
		return -1, fmt.Errorf("epoll_ctl: %w", err)
	}
	if err := unix.SetNonblock(ep, true); err != nil {
		_ = unix.Close(ep)
		return -1, fmt.Errorf("epoll instance: %w", err)
	}
	return ep, nil
}
