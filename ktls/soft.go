package ktls

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	"github.com/ktlsvisor/ktlsvisor/internal/fault"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// softLayer seals and opens records in this process.
type softLayer struct {
	rc syscall.RawConn
	rx softReader
	tx softWriter

	counted bool // the positions in the TCP streams are known
}

// newSoftLayer takes over the keys in tx and rx, which may be at any sequence
// number. It does not own sock.
func newSoftLayer(sock Socket, p params, tx, rx direction) (*softLayer, error) {
	suite, err := lookupSuite(p.version, p.suite)
	if err != nil {
		return nil, err
	}
	if err := softwareWorks(); err != nil {
		return nil, err
	}
	rc, err := sock.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("session socket: %w", err)
	}
	l := &softLayer{rc: rc}
	l.rx.half = half{suite: suite, dir: rx}
	l.tx.half = half{suite: suite, dir: tx}
	return l, nil
}

func (l *softLayer) kind() Layer    { return LayerSoftware }
func (l *softLayer) canRekey() bool { return l.rx.suite.version == tls.VersionTLS13 }

// broken is nil: a record waits in raw until read opens it.
func (l *softLayer) broken() error { return nil }

func (l *softLayer) rearm() error { return nil }
func (l *softLayer) rekeyRead() error {
	err := l.rx.rekey()
	if err == nil && l.rx.j.place != nil {
		l.rx.rekeyed()
	}
	return err
}

func (l *softLayer) rekeyWrite() error {
	err := l.tx.rekey()
	if err == nil && l.tx.j.place != nil {
		l.tx.rekeyed()
	}
	return err
}

func (l *softLayer) export(st *layerState) {
	st.tx, st.rx = l.tx.dir, l.rx.dir
	l.tx.dir, l.rx.dir = direction{}, direction{}
	st.raw = append([]byte(nil), l.rx.raw()...)
	st.plain = append([]byte(nil), l.rx.plain...)
	st.sealed = append([]byte(nil), l.tx.kept()...)
	if l.counted {
		st.rxPos, st.txPos = l.rx.pos+1, l.tx.sent+1
	}
}

// restore puts back what export took, except for the keys.
func (l *softLayer) restore(st *layerState) {
	if n := len(st.raw) + len(st.plain); n > 0 {
		l.rx.buf = getBuffer(n)
		// Opened bytes first: they are consumed before anything is moved.
		k := copy(l.rx.buf.b, st.plain)
		l.rx.plain = l.rx.buf.b[:k]
		l.rx.start = k
		l.rx.end = k + copy(l.rx.buf.b[k:], st.raw)
	}
	if n := len(st.sealed); n > 0 {
		l.tx.buf = getBuffer(n)
		l.tx.end = copy(l.tx.buf.b, st.sealed)
	}
	if st.rxPos > 0 && st.txPos > 0 {
		l.rx.pos, l.tx.sent, l.counted = st.rxPos-1, st.txPos-1, true
	}
}

func (l *softLayer) wipe() {
	l.rx.half.wipe()
	l.tx.half.wipe()
	if p := l.rx.j.place; p != nil {
		// What is published goes on referring to these until the place is freed.
		for _, list := range [][]*buffer{{l.rx.buf, l.rx.j.unread.buf, l.tx.buf, l.tx.j.queue.buf}, l.rx.j.old, l.tx.j.old} {
			for _, b := range list {
				p.hold(b)
			}
		}
		l.rx.releaseOpened()
		l.rx.buf, l.tx.buf = nil, nil
		l.rx.j, l.tx.j = readJournal{}, writeJournal{}
	}
	l.rx.start, l.rx.end, l.rx.plain = 0, 0, nil
	l.rx.release()
	l.tx.start, l.tx.end = 0, 0
	l.tx.release()
}

// socketError puts an error of the socket or the poller into the words that net
// uses, so that callers can compare with os.ErrDeadlineExceeded and net.ErrClosed.
func socketError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return os.ErrDeadlineExceeded
	case errors.Is(err, net.ErrClosed), errors.Is(err, os.ErrClosed):
		return net.ErrClosed
	}
	return err
}

// softReader is the receiving half. buf[start:end] was received and not opened;
// plain, a part of buf before start, was opened and not read.
type softReader struct {
	half
	pos        uint64 // in the TCP stream, of buf[end], if softLayer.counted
	j          readJournal
	buf        *buffer // nil when nothing is in progress
	start, end int
	plain      []byte

	recv  func(fd uintptr) bool // recvFD, bound at the first read, so that later ones do not allocate
	got   int
	errno syscall.Errno
	large bool // the last time more came than a small message
}

func (r *softReader) raw() []byte {
	if r.buf == nil {
		return nil
	}
	return r.buf.b[r.start:r.end]
}

// release gives the buffer back when nothing is left in it.
func (r *softReader) release() {
	if r.buf == nil || r.base() != r.end || len(r.plain) > 0 {
		return
	}
	if p := r.j.place; p != nil {
		if r.j.dirty {
			r.publish() // from here on, nothing is in the chunk that anyone needs
		}
		p.put(r.buf)
		r.j.keep = 0
	} else {
		putBuffer(r.buf)
	}
	r.buf, r.start, r.end, r.plain = nil, 0, 0, nil
}

func (l *softLayer) buffered() int { return len(l.rx.plain) }

func (l *softLayer) read(p []byte) (int, control, error) {
	r := &l.rx
	journaled := r.j.place != nil
	if journaled && r.j.lazy {
		r.j.lazy = false
		if !r.j.hold {
			r.consumed()
		}
	}
	for {
		if len(r.plain) > 0 {
			n := copy(p, r.plain)
			r.plain = r.plain[n:]
			if journaled {
				r.deliverOpened(p[:n])
			}
			r.release()
			return n, control{}, nil
		}
		rec, err := r.whole()
		if err != nil {
			return 0, control{}, err
		}
		if rec == nil {
			if err := r.fill(l.rc); err != nil {
				return 0, control{}, err
			}
			continue
		}
		dst := p
		if journaled {
			dst = r.private(rec, p)
		}
		typ, plain, err := r.open(rec, dst)
		if err != nil {
			return 0, control{}, err
		}
		r.start += len(rec)
		if typ == 0 {
			// Only TLS 1.2 has a type the peer can choose freely in the header, and a
			// control record of type 0 would read as none.
			return 0, control{}, &recordError{alertUnexpectedMessage, "record of type 0"}
		}
		if typ != typeData {
			// A control record's buffer stays until the next call: data points into it.
			r.j.lazy = true
			return 0, control{typ, plain}, nil
		}
		if len(plain) > 0 && len(p) > 0 && &plain[0] == &p[0] {
			if journaled {
				r.deliver(plain)
				r.consumed()
				r.publish()
			}
			r.release()
			return len(plain), control{}, nil
		}
		r.plain = plain
		if len(plain) == 0 {
			r.j.lazy = true
			r.release()
			return 0, control{}, nil
		}
	}
}

// whole returns the next record when all of it is here, nil when it is not.
func (r *softReader) whole() ([]byte, error) {
	raw := r.raw()
	if len(raw) < recordHeaderLen {
		return nil, nil
	}
	n, rerr := r.checkHeader(raw)
	if rerr != nil {
		return nil, rerr
	}
	if len(raw) < recordHeaderLen+n {
		return nil, nil
	}
	return raw[:recordHeaderLen+n], nil
}

// fill receives more, at least one byte.
func (r *softReader) fill(rc syscall.RawConn) error {
	r.release()
	r.got, r.errno = 0, 0
	if r.recv == nil {
		r.recv = r.recvFD
	}
	if err := rc.Read(r.recv); err != nil {
		r.park()
		return socketError(err)
	}
	if r.errno != 0 {
		r.park()
		return r.errno
	}
	if r.got == 0 {
		r.park()
		return io.EOF
	}
	r.end += r.got
	r.pos += uint64(r.got)
	return nil
}

// recvFD is called by the poller, first at once and then whenever the socket may
// be readable. While it waits, the session holds no more than its half record.
func (r *softReader) recvFD(fd uintptr) bool {
	r.unpark()
	fault.Step("before-socket-recv")
	r.got, r.errno = sys.Recv(fd, r.buf.b[r.end:], !r.large)
	fault.Step("after-socket-recv")
	if r.errno == syscall.EAGAIN {
		r.park()
		return false
	}
	r.large = r.got > smallBuf
	return true
}

// unpark makes room to receive into.
func (r *softReader) unpark() {
	switch {
	case r.j.place != nil:
		r.journalRoom()
	case r.buf == nil:
		r.buf = bigPool.Get().(*buffer)
	case len(r.buf.b) != bigBuf:
		b := bigPool.Get().(*buffer)
		r.end = copy(b.b, r.raw())
		r.start = 0
		putBuffer(r.buf)
		r.buf = b
	case r.start > 0:
		// The rest of a record always fits behind what is here already.
		r.end = copy(r.buf.b, r.raw())
		r.start = 0
	}
}

// park leaves the half record in the smallest buffer that fits.
func (r *softReader) park() {
	if r.buf == nil {
		return
	}
	n := r.end - r.base()
	if n == 0 {
		r.release()
		return
	}
	if len(r.buf.b) != bigBuf || n > midBuf {
		return
	}
	if p := r.j.place; p != nil {
		r.journalMove(p.get(n))
		return
	}
	b := getBuffer(n)
	copy(b.b, r.raw())
	putBuffer(r.buf)
	r.buf, r.start, r.end = b, 0, n
}
