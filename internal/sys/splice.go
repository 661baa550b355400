package sys

import (
	"golang.org/x/sys/unix"
)

// Pipe makes a non-blocking, close-on-exec pipe. The caller owns both ends.
func Pipe() (r, w int, err error) { return pipe(0) }

// PacketPipe is Pipe whose every write is a buffer of its own (O_DIRECT), which the
// pipe does not merge with others.
func PacketPipe() (r, w int, err error) { return pipe(unix.O_DIRECT) }

func pipe(flags int) (r, w int, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK|flags); err != nil {
		return -1, -1, err
	}
	return fds[0], fds[1], nil
}

// GrowPipe asks for a pipe of size bytes. It is refused (EPERM) to a user whose pipes
// take too much already; the pipe is as before then.
func GrowPipe(fd, size int) error {
	_, err := unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, size)
	return err
}

// Splice moves up to count bytes between a pipe and another descriptor: splice(2),
// without waiting on the pipe. Where the other end is a socket, it must be non-blocking,
// see SetNonblock. 0 with a nil error is the end of the stream. The error is a bare
// errno, nil when n > 0; EAGAIN may be about either end. EINVAL: these two cannot be
// spliced.
//
// When n < count, a kernel TLS socket may hold some of the n bytes in a record that it
// keeps open for more, as after SendFile.
func Splice(dst, src, count int) (n int, err error) {
	for {
		k, err := unix.Splice(src, nil, dst, nil, count, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		switch {
		case err == unix.EINTR: //nolint:errorlint // Splice does not wrap
		case k > 0:
			return int(k), nil
		default:
			return 0, err
		}
	}
}

// Waiting is how many bytes can be read from a pipe now (FIONREAD).
func Waiting(fd int) (int, error) { return unix.IoctlGetInt(fd, unix.TIOCINQ) }

// Read is read(2). The error is a bare errno.
func Read(fd int, p []byte) (n int, err error) {
	for {
		n, err = unix.Read(fd, p)
		if err != unix.EINTR { //nolint:errorlint // Read does not wrap
			return max(n, 0), err
		}
	}
}

// Write is write(2). The error is a bare errno.
func Write(fd int, p []byte) (n int, err error) {
	for {
		n, err = unix.Write(fd, p)
		if err != unix.EINTR { //nolint:errorlint // Write does not wrap
			return max(n, 0), err
		}
	}
}
