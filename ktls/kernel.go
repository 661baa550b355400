package ktls

import (
	"errors"
	"fmt"
	"sync/atomic"
	"syscall"

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
	noted  []byte // the slot of Commits, nil when there is none

	secrets *secrets // Conn's; nil in a process that was never given them
	relayed bool     // somebody else changes the keys

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
	ctlDone bool  // ctl was given; the next read starts afresh
	peeked  error // what waitRead met, and read has to say

	// Writing, under Conn's write lock.
	out struct {
		try   func(fd uintptr) bool
		p     []byte
		typ   recordType
		noted bool // committed output
		wait  bool
		n     int
		err   error
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

func (l *kernelLayer) broken() error {
	if l.peeked != nil {
		return l.readError(l.peeked)
	}
	if failed := l.readFailed.Load(); failed != nil {
		return l.readError(*failed)
	}
	return nil
}

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
	l.noted = nil
	l.ctl, l.ctlType, l.ctlDone = nil, 0, false
}
