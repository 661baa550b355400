package ktls

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

func (l *kernelLayer) read(p []byte) (n int, ctl control, err error) {
	if l.ctlDone {
		l.ctl, l.ctlType, l.ctlDone = l.ctl[:0], 0, false
	}
	for {
		into := p
		if l.ctlType != 0 {
			// The rest of a control record is next, whatever p could hold.
			into = l.ctlRoom()
		}
		if err := l.receive(into); err != nil {
			return 0, control{}, err
		}
		n, typ := l.in.n, l.in.typ
		if typ == sys.NoRecordType {
			if n != 0 {
				return 0, control{}, fmt.Errorf("%w: the kernel gave %d bytes without a record type", ErrNoKernelTLS, n)
			}
			return 0, control{}, io.EOF
		}
		if l.ctlType == 0 && typ == int(typeData) {
			// n may be 0: an empty record.
			return n, control{}, nil
		}
		if l.ctlType == 0 {
			if typ == 0 {
				// Only TLS 1.2 has a type the peer can choose freely in the header, and 0
				// would read as "no control record" above.
				return 0, control{}, &recordError{alertUnexpectedMessage, "record of type 0"}
			}
			l.ctlType = recordType(typ)
			l.ctl = append(l.ctl[:0], p[:n]...)
		} else {
			if typ != int(l.ctlType) {
				return 0, control{}, fmt.Errorf("the kernel went on to a record of type %d in the middle of one of type %d", typ, l.ctlType)
			}
			l.ctl = l.ctl[:len(l.ctl)+n]
		}
		if l.in.eor {
			l.ctlDone = true
			return 0, control{typ: l.ctlType, data: l.ctl}, nil
		}
		if len(l.ctl) >= maxPlaintext || n == 0 {
			return 0, control{}, &recordError{alertRecordOverflow, "control record without an end"}
		}
	}
}

// ctlRoom returns the free part of the buffer for a control record.
func (l *kernelLayer) ctlRoom() []byte {
	if cap(l.ctl) < maxPlaintext {
		whole := make([]byte, len(l.ctl), maxPlaintext)
		copy(whole, l.ctl)
		l.ctl = whole
	}
	return l.ctl[len(l.ctl):maxPlaintext]
}

// receive waits for something to read and reads once.
func (l *kernelLayer) receive(p []byte) error {
	l.in.p, l.in.err = p, nil
	err := l.rc.Read(l.in.try)
	l.in.p = nil
	if err != nil {
		return err
	}
	if l.in.err != nil {
		return l.readError(l.in.err)
	}
	return nil
}

func (l *kernelLayer) tryRead(fd uintptr) bool {
	if l.peeked != nil {
		l.in.n, l.in.err = 0, l.peeked
	} else {
		l.recv(fd)
	}
	if l.in.err == nil {
		return true
	}
	if failed := l.readFailed.Load(); failed != nil {
		l.in.err = *failed
	}
	if l.in.err == sys.EAGAIN {
		return false
	}
	if recordFailure(l.in.err) {
		// Otherwise the alert could not be sent.
		_ = sys.TakeSocketError(int(fd))
	}
	return true
}

// recordFailure reports that err means a received record and not the connection.
func recordFailure(err error) bool {
	return err == sys.EBADMSG || err == sys.EMSGSIZE || err == sys.EINVAL
}

// readError names the alert for what the kernel said (net/tls/tls_sw.c). It says so
// once for a bad header and then nothing any more, so each of these is final.
func (l *kernelLayer) readError(err error) error {
	switch {
	case errors.Is(err, sys.EBADMSG):
		return &recordError{alertBadRecordMAC, "a record did not authenticate"}
	case errors.Is(err, sys.EMSGSIZE):
		return &recordError{alertRecordOverflow, "a record longer than the protocol allows"}
	case errors.Is(err, sys.EINVAL):
		return &recordError{alertProtocolVersion, "a record header of another version, or none at all"}
	case errors.Is(err, sys.EKEYEXPIRED):
		return fmt.Errorf("the peer changed its key and the kernel was not given the next one: %w", err)
	}
	return os.NewSyscallError("recvmsg", err)
}

func (l *kernelLayer) write(p []byte) (n int, err error) {
	for n < len(p) {
		sent, err := l.send(typeData, p[n:], true)
		n += sent
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

func (l *kernelLayer) writeControl(typ recordType, p []byte, wait bool) (taken bool, err error) {
	for off := 0; off < len(p); {
		n, err := l.send(typ, p[off:], wait)
		if err != nil {
			// Nothing of a record this short can have been taken without all of it.
			return off > 0, err
		}
		off += n
	}
	l.alerted = l.alerted || typ == typeAlert && len(p) == 2 && (p[0] == levelFatal || Alert(p[1]) == alertCloseNotify)
	return true, l.flush(wait)
}

// send seals and sends once, waiting for room if wants be.
func (l *kernelLayer) send(typ recordType, p []byte, wait bool) (n int, err error) {
	o := &l.out
	o.p, o.typ, o.wait, o.n, o.err = p, typ, wait, 0, nil
	err = l.rc.Write(o.try)
	o.p = nil
	l.wire.plain += uint64(o.n)
	if err != nil {
		return o.n, err
	}
	if o.err == sys.EAGAIN {
		return o.n, errWouldBlock
	}
	if o.err != nil {
		return o.n, os.NewSyscallError("sendmsg", o.err)
	}
	return o.n, nil
}

func (l *kernelLayer) tryWrite(fd uintptr) bool {
	o := &l.out
	for retried := false; ; retried = true {
		switch {
		case o.noted:
			l.notedWrite(fd)
		case o.typ == typeData:
			o.n, o.err = sys.TLSSendData(int(fd), o.p)
		default:
			o.n, o.err = sys.TLSSendRecord(int(fd), byte(o.typ), o.p)
		}
		if retried || !recordFailure(o.err) {
			break
		}
		// A record from the peer that cannot be opened. It is the reader's, who needs
		// to hear of it before the socket forgets it.
		errno, ok := errors.AsType[syscall.Errno](o.err)
		if !ok {
			break
		}
		l.readFailed.CompareAndSwap(nil, &errno)
		if sys.TakeSocketError(int(fd)) == nil {
			l.readFailed.CompareAndSwap(&errno, nil) // it was about the write after all
			break
		}
	}
	return o.err != sys.EAGAIN || !o.wait
}

// flush has nothing to do while the session is open: the kernel sends what it has
// sealed by itself. After an alert comes a shutdown, which drops what the kernel has
// sealed and not handed to TCP; so then, with wait, it waits until nothing is left.
func (l *kernelLayer) flush(wait bool) error {
	if !l.alerted || !wait {
		return nil
	}
	return l.drain()
}

// drainLimit bounds drain where the caller set no write deadline.
const drainLimit = 5 * time.Second

// drain waits until every sealed record has been handed to TCP, which sends it also
// after close and shutdown. There is nothing to be woken by: the kernel hands over
// in a work item after the socket became writable.
func (l *kernelLayer) drain() error {
	const shortest, longest = 200 * time.Microsecond, 20 * time.Millisecond
	end := time.Now().Add(drainLimit)
	for pause := shortest; ; pause = min(2*pause, longest) {
		var (
			drained bool
			werr    error
		)
		err := l.rc.Write(func(fd uintptr) bool {
			drained, werr = l.wire.drained(int(fd), l.cipher, l.p.version)
			return true
		})
		if err == nil {
			err = werr
		}
		if err != nil || drained {
			return err
		}
		if time.Now().After(end) {
			return os.ErrDeadlineExceeded
		}
		time.Sleep(pause)
	}
}
