package ktls

import (
	"os"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

var _ fileSender = (*kernelLayer)(nil)

// prepareFile undoes what another holder of a duplicate may have done: O_NONBLOCK is
// shared, and sendfile has no MSG_DONTWAIT.
func (l *kernelLayer) prepareFile() error { return l.control(sys.SetNonblock) }

// sendFile asks for no more than the file has, because below 6.5 the kernel keeps
// the last record open when sendfile ends at the end of the file.
func (l *kernelLayer) sendFile(file uintptr, count int) (n int, err error) {
	var ferr error
	err = l.rc.Write(func(fd uintptr) bool {
		for n < count {
			var k int
			k, ferr = sys.SendFile(int(fd), int(file), count-n)
			n += k
			if k == 0 {
				return ferr != sys.EAGAIN
			}
		}
		return true
	})
	l.wire.plain += uint64(n)
	switch {
	case err != nil:
		return n, err
	case ferr == nil:
		return n, nil
	case ferr == sys.EPIPE || ferr == sys.ECONNRESET:
		return n, os.NewSyscallError("sendfile", ferr)
	}
	// The file, or a record from the peer that could not be opened: a plain write
	// knows which.
	return n, errNoSendfile
}
