package sys

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ChmodSocket sets the mode that a Unix socket's file gets when the socket is
// bound. Done between socket(2) and bind(2) it leaves no moment at which the file
// has another mode: the kernel takes the file's mode from the socket's inode
// (net/unix/af_unix.c, unix_bind_bsd).
func ChmodSocket(fd int, mode uint32) error {
	if err := unix.Fchmod(fd, mode); err != nil {
		return fmt.Errorf("set the mode of a Unix socket: %w", err)
	}
	return nil
}

// ErrLocked reports that another process has locked the directory.
var ErrLocked = errors.New("locked by another process")

// TryLockDir takes an exclusive flock(2) on a directory without waiting:
// ErrLocked when another holds it. Closing the file, which the caller owns, or the
// end of the process gives it back; nothing is left behind in the directory.
func TryLockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	rc, err := f.SyscallConn()
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	var lerr error
	if err := rc.Control(func(fd uintptr) {
		for {
			lerr = unix.Flock(int(fd), unix.LOCK_EX|unix.LOCK_NB)
			if !errors.Is(lerr, unix.EINTR) {
				return
			}
		}
	}); err != nil {
		lerr = err
	}
	if lerr != nil {
		_ = f.Close()
		if errors.Is(lerr, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s: %w", dir, ErrLocked)
		}
		return nil, fmt.Errorf("lock %s: %w", dir, lerr)
	}
	return f, nil
}
