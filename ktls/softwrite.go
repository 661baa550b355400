package ktls

import (
	"errors"
	"os"
	"syscall"

	"github.com/ktlsvisor/ktlsvisor/internal/fault"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// softWriter is the sending half. buf[start:end] was sealed and not sent: it goes
// out as these bytes or never, because its sequence numbers are used up.
type softWriter struct {
	half
	plain      uint64 // bytes of application data sealed since Import
	sent       uint64 // position in the TCP stream of buf[start], if softLayer.counted
	j          writeJournal
	buf        *buffer // nil when nothing is kept
	start, end int

	sendWait func(fd uintptr) bool // sendFD, bound at the first write, so that later ones do not allocate
	sendNow  func(fd uintptr)
	errno    syscall.Errno
}

func (w *softWriter) kept() []byte {
	if w.buf == nil {
		return nil
	}
	return w.buf.b[w.start:w.end]
}

func (w *softWriter) release() {
	if w.buf != nil && w.start == w.end {
		// The register may go on referring to a chunk of which all was sent.
		w.j.place.put(w.buf)
		w.buf, w.start, w.end = nil, 0, 0
	}
}

// room makes sure that n more bytes fit behind what is kept.
func (w *softWriter) room(n int) {
	if w.buf == nil {
		w.buf, w.start, w.end = w.j.place.get(n), 0, 0
		return
	}
	if len(w.buf.b)-w.end >= n {
		return
	}
	kept := w.kept()
	if w.j.place != nil {
		// What is published stays where it is until the register refers to the copy.
		b := w.j.place.get(len(kept) + n)
		copy(b.b, kept)
		w.retire(w.buf)
		w.buf = b
	} else if len(w.buf.b) < len(kept)+n {
		b := getBuffer(len(kept) + n)
		copy(b.b, kept)
		putBuffer(w.buf)
		w.buf = b
	} else {
		copy(w.buf.b, kept)
	}
	w.start, w.end = 0, len(kept)
}

func (w *softWriter) sealNext(typ recordType, p []byte) error {
	n, err := w.seal(w.buf.b[w.end:], typ, p)
	w.end += n
	w.j.dirty = true
	if typ == typeData && err == nil {
		w.plain += uint64(len(p))
	}
	return err
}

// sendFD sends as much as the socket takes. It reports whether it is done, well
// or badly.
func (w *softWriter) sendFD(fd uintptr) bool {
	for w.start < w.end {
		fault.Step("before-socket-send")
		n, errno := sys.Send(fd, w.buf.b[w.start:w.end])
		fault.Step("after-socket-send")
		if errno != 0 {
			w.errno = errno
			return errno != syscall.EAGAIN
		}
		w.start += n
		w.sent += uint64(n)
	}
	w.errno = 0
	return true
}

func (l *softLayer) unsent() int { return len(l.tx.kept()) }

func (l *softLayer) flush(wait bool) error {
	w := &l.tx
	if w.start == w.end {
		return nil
	}
	if w.j.dirty && w.j.place != nil {
		w.publish() // before any of it is sent
	}
	var err error
	if wait {
		if w.sendWait == nil {
			w.sendWait = w.sendFD
		}
		err = l.rc.Write(w.sendWait)
	} else {
		if w.sendNow == nil {
			w.sendNow = func(fd uintptr) { w.sendFD(fd) }
		}
		err = l.rc.Control(w.sendNow)
	}
	if err == nil && w.errno != 0 {
		err = w.errno
	}
	w.release()
	switch {
	case err == nil:
		return nil
	case !wait && (errors.Is(err, sys.EAGAIN) || errors.Is(err, os.ErrDeadlineExceeded)):
		return errWouldBlock
	}
	return socketError(err)
}

func (l *softLayer) write(p []byte) (int, error) {
	if err := l.flush(true); err != nil {
		return 0, err
	}
	w := &l.tx
	taken := 0
	for taken < len(p) {
		// Several full records a system call, but never more than one buffer.
		batch := min(len(p)-taken, sendRecords*maxPlaintext)
		records := (batch + maxPlaintext - 1) / maxPlaintext
		w.room(batch + records*w.sealedLen(0))
		for batch > 0 {
			n := min(batch, maxPlaintext)
			if err := w.sealNext(typeData, p[taken:taken+n]); err != nil {
				w.release()
				return taken, err
			}
			taken += n
			batch -= n
			if w.j.queued {
				w.retire(w.j.queue.take(n))
			}
		}
		if err := l.flush(true); err != nil {
			return taken, err
		}
	}
	return taken, nil
}

func (l *softLayer) writeControl(typ recordType, p []byte, wait bool) (bool, error) {
	w := &l.tx
	w.room(w.sealedLen(len(p)))
	if err := w.sealNext(typ, p); err != nil {
		w.release()
		return false, err
	}
	if w.j.place != nil {
		w.j.seals(typ, p)
	}
	return true, l.flush(wait)
}
