package sys

import (
	"golang.org/x/sys/unix"
)

// SendFile sends up to count bytes of a file, from its offset on, which it moves,
// to a socket: sendfile(2). 0 with a nil error is the end of the file. dst must be
// non-blocking, see SetNonblock, because there is no MSG_DONTWAIT for it; then
// EAGAIN means that the socket takes nothing now. The error is a bare errno, nil
// when n > 0.
//
// When n < count, a kernel TLS socket may hold some of the n bytes in a record that
// it keeps open for more. The next send without MSG_MORE, of data or of a control
// record, sends it; close and shutdown would drop it.
func SendFile(dst, src, count int) (n int, err error) {
	for {
		n, err = unix.Sendfile(dst, src, nil, count)
		switch {
		case err == unix.EINTR: //nolint:errorlint // Sendfile does not wrap
		case n > 0:
			return n, nil
		case err != nil:
			return 0, err
		default:
			return 0, nil
		}
	}
}
