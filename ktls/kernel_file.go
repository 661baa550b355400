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

var _ pipeSender = (*kernelLayer)(nil)

func (l *kernelLayer) splices() bool {
	k := kernelProbe.ask(probeAgain).find(FeatureSplice, "", "", DirectionSend)
	return k != nil && k.Status == StatusSupported
}

func (l *kernelLayer) sendPipe(pipe uintptr, count int) (n int, records uint64, err error) {
	var (
		ferr          error
		before, after uint64
		counted       bool
	)
	err = l.rc.Write(func(fd uintptr) bool {
		if !counted {
			before, ferr = sendSeq(int(fd), l.cipher)
			counted = ferr == nil
		}
		for ferr = nil; n < count; {
			var k int
			k, ferr = sys.Splice(int(fd), int(pipe), count-n)
			n += k
			if k == 0 {
				return ferr != sys.EAGAIN
			}
		}
		return true
	})
	l.wire.plain += uint64(n)
	_ = l.control(func(fd int) error {
		var serr error
		if after, serr = sendSeq(fd, l.cipher); serr != nil || !counted || after < before {
			// Not told: as many as there can be.
			before, after = 0, uint64(n)/16+1
		}
		return nil
	})
	records = after - before
	switch {
	case err != nil:
		return n, records, err
	case ferr == nil && n == count:
		return n, records, nil
	case ferr == sys.EPIPE || ferr == sys.ECONNRESET:
		return n, records, os.NewSyscallError("splice", ferr)
	}
	// A record from the peer that could not be opened: a plain write knows.
	return n, records, errNoSendfile
}
