package ktls

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// peerEnd is one end of a session in a script.
type peerEnd interface {
	stock() bool
	write(p []byte, style int) error // all of p
	read(p []byte) (int, error)
	unread(p []byte) int // how much it pushed back
	move() error
	keyUpdate(request bool) error
	closeWrite() error // close_notify
	fin() error        // FIN without it
	closeAll(abort bool) error
	discard() // at the end, whatever the state
}

// endOf says what an error of read means.
func endOf(err error) (end, bool) {
	switch {
	case err == io.EOF: //nolint:errorlint // io.Reader promises EOF itself
		return endClean, true
	case errors.Is(err, ErrTruncated):
		return endTruncated, true
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return endReset, true
	}
	return "", false
}

// stockEnd is crypto/tls.
type stockEnd struct {
	*tls.Conn
	tcp *net.TCPConn
}

func (e *stockEnd) stock() bool                { return true }
func (e *stockEnd) read(p []byte) (int, error) { return e.Read(p) }
func (e *stockEnd) unread([]byte) int          { return 0 }
func (e *stockEnd) move() error                { return nil }
func (e *stockEnd) keyUpdate(bool) error       { return nil }
func (e *stockEnd) closeWrite() error          { return e.CloseWrite() }
func (e *stockEnd) fin() error                 { return e.tcp.CloseWrite() }
func (e *stockEnd) discard()                   { _ = e.tcp.Close() }

func (e *stockEnd) write(p []byte, _ int) error {
	_, err := e.Write(p)
	return err
}

func (e *stockEnd) closeAll(abort bool) error {
	if abort {
		_ = e.tcp.SetLinger(0)
		return e.tcp.Close()
	}
	return e.Close()
}

// ktlsEnd is a Conn, and each of its owners in turn.
type ktlsEnd struct {
	*Conn
}

func (e *ktlsEnd) stock() bool                { return false }
func (e *ktlsEnd) read(p []byte) (int, error) { return e.Read(p) }
func (e *ktlsEnd) closeWrite() error          { return e.CloseWrite() }
func (e *ktlsEnd) fin() error                 { return e.control(sys.ShutdownWrite) }
func (e *ktlsEnd) discard()                   { _ = e.control(sys.ShutdownBoth); _ = e.Close() }

func (e *ktlsEnd) unread(p []byte) int {
	e.Unread(p)
	return len(p)
}

func (e *ktlsEnd) keyUpdate(request bool) error { return e.KeyUpdate(request) }

func (e *ktlsEnd) move() error {
	sock, st, err := e.Detach()
	if err != nil {
		return fmt.Errorf("detach: %w", err)
	}
	defer st.Wipe()
	facts, ferr := st.MarshalFacts()
	record, rerr := st.MarshalRecord()
	var secrets []byte
	var serr error
	if e.Layer() == LayerKernel && e.p.version == tls.VersionTLS13 {
		secrets, serr = st.MarshalSecrets() // whoever has them may change keys
	}
	var moved *os.File
	cerr := onFile(sock, func(fd int) error {
		n, err := sys.Dup(fd)
		if err == nil {
			moved = os.NewFile(uintptr(n), "session")
		}
		return err
	})
	if err := errors.Join(ferr, rerr, serr, cerr, sock.Close()); err != nil {
		return err
	}
	c, err := Import(moved, facts, record)
	if err != nil {
		_ = moved.Close()
		return fmt.Errorf("import: %w", err)
	}
	if secrets != nil {
		if err := c.SetSecrets(secrets); err != nil {
			return err
		}
	}
	_ = c.SetDeadline(time.Now().Add(testWait))
	// A reader and a writer of ours may run at the same time, but not now.
	e.Conn = c
	return nil
}

func onFile(sock Socket, f func(fd int) error) error {
	rc, err := sock.SyscallConn()
	if err != nil {
		return err
	}
	cerr := rc.Control(func(fd uintptr) { err = f(int(fd)) })
	return errors.Join(cerr, err)
}

func (e *ktlsEnd) write(p []byte, style int) error {
	switch style {
	case 1, 2:
		if err := e.QueueWrite(p); err != nil {
			return err
		}
		if style == 2 {
			if err := e.move(); err != nil {
				return err
			}
		}
		return e.Flush()
	case 3:
		for step := 1; len(p) > 0; step = step*3 + 1 {
			n := min(step, len(p))
			if _, err := e.Write(p[:n]); err != nil {
				return err
			}
			p = p[n:]
		}
		return nil
	case 4, 5:
		return e.writeImpatiently(p, style == 5)
	}
	_, err := e.Write(p)
	return err
}

// writeImpatiently gives up again and again, and goes on with what was not taken.
func (e *ktlsEnd) writeImpatiently(p []byte, moving bool) error {
	for wait := 50 * time.Microsecond; len(p) > 0; wait *= 2 {
		_ = e.SetWriteDeadline(time.Now().Add(wait))
		n, err := e.Write(p)
		p = p[n:]
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		if err != nil && moving {
			if err := e.move(); err != nil {
				return err
			}
		}
	}
	_ = e.SetWriteDeadline(time.Now().Add(testWait))
	return e.Flush()
}

func (e *ktlsEnd) closeAll(abort bool) error {
	if !abort {
		return e.Close()
	}
	reset := func(fd int) error {
		return syscall.SetsockoptLinger(fd, syscall.SOL_SOCKET, syscall.SO_LINGER, &syscall.Linger{Onoff: 1})
	}
	return errors.Join(onFile(e.sock, reset), e.sock.Close())
}

// connectPair makes a session between the ends that p names.
func connectPair(t *testing.T, p pairing) (ends [2]peerEnd, err error) {
	pair := tcpPair
	if p.small {
		pair = func(t testing.TB) (_, _ *net.TCPConn) { return tcpPairSmall(t, 32<<10) }
	}
	c, s := pair(t)
	if p.server != stock && p.client != stock && p.version == tls.VersionTLS13 {
		return keyedPair(c, s, p)
	}
	server, client := testServerTLS(t), testClientTLS(t)
	client.MinVersion, client.MaxVersion = p.version, p.version
	if p.version == tls.VersionTLS12 {
		client.CipherSuites = []uint16{p.suite}
	}
	mode := map[string]Mode{soft: ModeSoftware, kernel: ModeKernel}
	done := make(chan error, 1)
	go func() (err error) {
		defer func() { done <- err }()
		if p.client != stock {
			var conn *Conn
			conn, err = Client(context.Background(), c, &Config{TLS: client, Mode: mode[p.client]})
			ends[1] = newKTLSEnd(conn)
			return err
		}
		tc := tls.Client(c, client)
		ends[1] = &stockEnd{tc, c}
		return tc.Handshake()
	}()
	if p.server != stock {
		var conn *Conn
		conn, err = Server(context.Background(), s, &Config{TLS: server, Mode: mode[p.server]})
		ends[0] = newKTLSEnd(conn)
	} else {
		tc := tls.Server(s, server)
		ends[0] = &stockEnd{tc, s}
		err = tc.Handshake()
	}
	return ends, errors.Join(err, <-done)
}

func newKTLSEnd(c *Conn) peerEnd {
	if c == nil {
		return nil
	}
	_ = c.SetDeadline(time.Now().Add(testWait))
	return &ktlsEnd{c}
}

// keyedPair makes a session of any suite of TLS 1.3 without a handshake, in which
// crypto/tls would choose the suite by itself.
func keyedPair(c, s *net.TCPConn, p pairing) (ends [2]peerEnd, err error) {
	suite, err := lookupSuite(p.version, p.suite)
	if err != nil {
		return ends, err
	}
	var dirs [2]direction
	for e := range dirs {
		secret := make([]byte, suite.hashLen)
		_, _ = rand.Read(secret)
		if dirs[e], err = suite.direction13(secret, 0); err != nil {
			return ends, err
		}
	}
	id := make([]byte, sessionIDLen)
	for e, sock := range []*net.TCPConn{s, c} {
		pp := params{version: p.version, suite: p.suite, client: e == 1}
		tx, rx := dirs[e].clone(), dirs[1-e].clone()
		f := newFacts(id, &tls.ConnectionState{Version: p.version, CipherSuite: p.suite, ServerName: "keyed"}, e == 1, sock.LocalAddr(), sock.RemoteAddr())
		var l recordLayer
		if [...]string{p.server, p.client}[e] == kernel {
			f.Layer = LayerKernel
			if err = attachKernel(sock); err == nil {
				l, err = newKernelLayer(sock, pp, &tx, &rx)
			}
		} else {
			f.Layer = LayerSoftware
			l, err = newSoftLayer(sock, pp, tx.clone(), rx.clone())
		}
		if err != nil {
			return ends, err
		}
		conn := newConn(sock, l, pp, f)
		conn.local, conn.remote = sock.LocalAddr(), sock.RemoteAddr()
		if kl, ok := l.(*kernelLayer); ok {
			conn.secrets = &secrets{tx: tx, rx: rx}
			kl.secrets = conn.secrets
		}
		ends[e] = newKTLSEnd(conn)
	}
	return ends, nil
}
