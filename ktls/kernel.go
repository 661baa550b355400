package ktls

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// kernelLayer is the record layer in the socket. Everything a session is made of
// (keys, sequence numbers, records received and sent by halves) lives there and
// travels with the descriptor; this type only asks for it.
//
// Plain read(2) is never used: it stops at a control record and fails with EIO for
// ever, consuming nothing, while poll keeps reporting the socket as readable.
type kernelLayer struct {
	rc     syscall.RawConn
	p      params
	cipher kernelCipher
	wire   wirePosition

	// Reading, under Conn's read lock. try is made once because a closure made for
	// each call would be an allocation for each call.
	in struct {
		try func(fd uintptr) bool
		p   []byte
		n   int
		typ int
		eor bool
		err error
	}
	ctl     []byte // control record in progress, or given with the last read
	ctlType recordType
	ctlDone bool // ctl was given; the next read starts afresh

	// Writing, under Conn's write lock.
	out struct {
		try  func(fd uintptr) bool
		p    []byte
		typ  recordType
		wait bool
		n    int
		err  error
	}
	alerted bool // an alert was sent, so a shutdown may follow

	// A received record that the kernel cannot open fails the next system call on the
	// socket, whichever direction it is of. When that is a write, the error is kept
	// here for the reader, because the kernel may report it only once.
	readFailed atomic.Pointer[syscall.Errno]
}

// attachKernel attaches the ULP to a new connection. It changes nothing until keys
// are set. nil when it is attached already.
func attachKernel(sock Socket) error {
	var err error
	rc, rerr := sock.SyscallConn()
	if rerr != nil {
		return fmt.Errorf("kernel TLS: %w", rerr)
	}
	if cerr := rc.Control(func(fd uintptr) { err = attachFD(int(fd)) }); cerr != nil {
		return fmt.Errorf("kernel TLS: %w", cerr)
	}
	return err
}

func attachFD(fd int) error {
	err := sys.AttachTLS(fd)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, sys.EOPNOTSUPP) || sys.IsMPTCP(fd):
		return fmt.Errorf("%w on a multipath TCP connection; listen with net.ListenConfig.SetMultipathTCP(false)", ErrNoKernelTLS)
	case errors.Is(err, sys.ENOENT):
		return fmt.Errorf("%w: the tls module is not loaded (modprobe tls)", ErrNoKernelTLS)
	case errors.Is(err, sys.ENOTCONN):
		return fmt.Errorf("%w on this connection: it is not established, or its peer has finished already", ErrNoKernelTLS)
	}
	return fmt.Errorf("%w: %w", ErrNoKernelTLS, err)
}

// newKernelLayer sets both keys on a socket to which the ULP is attached. It does
// not keep tx and rx; the caller wipes them. When the first setsockopt failed, the
// socket is untouched and the error wraps errKernelUntouched; after that the
// session can only be ended.
func newKernelLayer(sock Socket, p params, tx, rx *direction) (recordLayer, error) {
	l, err := makeKernelLayer(sock, p)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errKernelUntouched)
	}
	var send, receive cryptoInfo
	defer send.wipe()
	defer receive.wipe()
	err = send.pack(p.version, p.suite, tx.key, tx.iv, tx.seq)
	if err == nil {
		err = receive.pack(p.version, p.suite, rx.key, rx.iv, rx.seq)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errKernelUntouched)
	}
	err = l.control(func(fd int) error {
		// Everything written so far is in TCP: the handshake's records were.
		l.wire.start(fd, tx.seq)
		if err := sys.SetTLSKeys(fd, sys.TLSSend, send.bytes()); err != nil {
			return fmt.Errorf("%w: set send keys of %s: %w: %w", ErrNoKernelTLS, l.cipher.name, err, errKernelUntouched)
		}
		if err := sys.SetTLSKeys(fd, sys.TLSReceive, receive.bytes()); err != nil {
			return fmt.Errorf("%w: set receive keys of %s: %w", ErrNoKernelTLS, l.cipher.name, err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return l, nil
}

// importKernelLayer goes on with a session whose socket came from another process.
// It checks that the socket really has keys both ways, of p's version and suite,
// so that no plaintext can go out in the clear.
func importKernelLayer(sock Socket, p params, st *layerState) (recordLayer, error) {
	if len(st.raw)+len(st.plain)+len(st.sealed) > 0 {
		return nil, fmt.Errorf("session of the kernel layer comes with %d bytes of records: these belong into the socket", len(st.raw)+len(st.plain)+len(st.sealed))
	}
	if len(st.ctl) > maxPlaintext || (len(st.ctl) > 0) != (st.typ != 0) || st.typ == typeData {
		return nil, fmt.Errorf("session of the kernel layer comes with %d bytes of a control record of type %d", len(st.ctl), st.typ)
	}
	l, err := makeKernelLayer(sock, p)
	if err != nil {
		return nil, err
	}
	err = l.control(func(fd int) error {
		if !sys.IsTCP(fd) || !sys.HasTLS(fd) {
			return fmt.Errorf("%w on the socket of an imported session: it is no TCP socket with the tls protocol", ErrNoKernelTLS)
		}
		for _, dir := range []sys.TLSDirection{sys.TLSSend, sys.TLSReceive} {
			version, cipher, err := kernelVersion(fd, dir)
			if err != nil {
				return fmt.Errorf("%w on the socket of an imported session: it has no keys to %s: %w", ErrNoKernelTLS, directionWord(dir), err)
			}
			if version != p.version || cipher != l.cipher.id {
				return fmt.Errorf("%w: the socket's keys to %s are of version %#04x and cipher %d, the session's of %#04x and %d",
					ErrNoKernelTLS, directionWord(dir), version, cipher, p.version, l.cipher.id)
			}
		}
		l.wire.resume(fd, l.cipher, st.wire, st.wireSeq)
		return nil
	})
	if err != nil {
		return nil, err
	}
	l.ctl, l.ctlType, l.alerted = st.ctl, st.typ, st.alerted
	return l, nil
}

func directionWord(dir sys.TLSDirection) string {
	if dir == sys.TLSSend {
		return DirectionSend
	}
	return DirectionReceive
}

func makeKernelLayer(sock Socket, p params) (*kernelLayer, error) {
	cipher, ok := kernelCipherOf(p.version, p.suite)
	if !ok {
		return nil, ErrUnsupportedSuite
	}
	rc, err := sock.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("kernel TLS: %w", err)
	}
	l := &kernelLayer{rc: rc, p: p, cipher: cipher}
	l.in.try = l.tryRead
	l.out.try = l.tryWrite
	return l, nil
}

// control runs f on the descriptor.
func (l *kernelLayer) control(f func(fd int) error) (err error) {
	cerr := l.rc.Control(func(fd uintptr) { err = f(int(fd)) })
	if cerr != nil {
		return cerr
	}
	return err
}

func (l *kernelLayer) kind() Layer { return LayerKernel }

// buffered is 0: plaintext the kernel has opened stays in the socket.
func (l *kernelLayer) buffered() int { return 0 }

// unsent is 0: what the kernel sealed and could not send stays in the socket.
func (l *kernelLayer) unsent() int { return 0 }

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
	l.in.n, l.in.typ, l.in.eor, l.in.err = sys.TLSRecv(int(fd), l.in.p)
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
	l.alerted = l.alerted || typ == typeAlert
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
		if o.typ == typeData {
			o.n, o.err = sys.TLSSendData(int(fd), o.p)
		} else {
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

// canRekey is false until the supervisor can set the next keys: a process that was
// given a socket has no secrets to make them of.
func (l *kernelLayer) canRekey() bool { return false }

func (l *kernelLayer) rekeyRead() error { return ErrKeyUpdateUnsupported }

func (l *kernelLayer) rekeyWrite() error { return ErrKeyUpdateUnsupported }

func (l *kernelLayer) export(st *layerState) {
	if !l.ctlDone && l.ctlType != 0 {
		st.ctl, st.typ = l.ctl, l.ctlType
	}
	l.ctl, l.ctlType, l.ctlDone = nil, 0, false
	_ = l.control(func(fd int) error {
		st.wire, st.wireSeq = l.wire.position(fd, l.cipher, l.p.version)
		return nil
	})
}

func (l *kernelLayer) wipe() {
	clear(l.ctl)
	l.ctl, l.ctlType, l.ctlDone = nil, 0, false
}
