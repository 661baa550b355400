package handoff

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// clientConn is a client's TLS session.
type clientConn interface {
	net.Conn
	CloseWrite() error
}

// sess is one session: the client's end, and what a supervisor keeps.
type sess struct {
	t      *testing.T
	id     uint64
	cli    clientConn
	fd     int // the supervisor's duplicate
	facts  []byte
	cargo  wire.Cargo
	keys   *ktls.Secrets // kernel layer
	group  string
	flags  wire.Flags
	epoch  wire.Epoch // of the ownership
	closed bool
}

var (
	certOnce sync.Once
	certTest tls.Certificate
)

func testCert(t *testing.T) tls.Certificate {
	t.Helper()
	certOnce.Do(func() {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"}, NotAfter: time.Now().Add(time.Hour)}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
		if err != nil {
			t.Fatal(err)
		}
		certTest = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	})
	return certTest
}

var lastID atomic.Uint64

// newSession makes a connection with a crypto/tls client and takes it as far as a
// supervisor does before it gives it to a worker.
func newSession(t *testing.T, mode ktls.Mode, version uint16) *sess {
	t.Helper()
	return newSessionOf(t, mode, func(addr string) (clientConn, error) {
		return tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, MinVersion: version, MaxVersion: version})
	})
}

func software(t *testing.T) *sess {
	t.Helper()
	return newSession(t, ktls.ModeSoftware, 0)
}

func newSessionOf(t *testing.T, mode ktls.Mode, dial func(addr string) (clientConn, error)) *sess {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	type result struct {
		c   clientConn
		err error
	}
	dialed := make(chan result, 1)
	go func() {
		c, err := dial(ln.Addr().String())
		dialed <- result{c, err}
	}()
	tcp, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	srv, err := ktls.Server(t.Context(), tcp.(*net.TCPConn), &ktls.Config{Mode: mode,
		TLS: &tls.Config{Certificates: []tls.Certificate{testCert(t)}}})
	if err != nil {
		t.Fatal(err)
	}
	d := <-dialed
	if d.err != nil {
		t.Fatal(d.err)
	}
	sock, st, err := srv.Detach()
	if err != nil {
		t.Fatal(err)
	}
	s := &sess{t: t, id: lastID.Add(1), cli: d.c}
	if s.facts, err = st.MarshalFacts(); err != nil {
		t.Fatal(err)
	}
	if s.cargo.Record, err = st.MarshalRecord(); err != nil {
		t.Fatal(err)
	}
	if st.Layer() == ktls.LayerKernel {
		b, err := st.MarshalSecrets()
		if err == nil {
			s.keys, err = ktls.ParseSecrets(b)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	st.Wipe()
	rc, err := sock.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := rc.Control(func(fd uintptr) { s.fd, err = sys.Dup(int(fd)) }); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	_ = sock.Close()
	_ = s.cli.SetDeadline(time.Now().Add(4 * patience))
	t.Cleanup(s.close)
	return s
}

func (s *sess) close() {
	if !s.closed {
		s.closed = true
		_ = s.cli.Close()
		sys.CloseAll([]int{s.fd})
	}
}

func (s *sess) item(e wire.Epoch) wire.Item {
	c := s.cargo
	c.Facts = s.facts
	return wire.Item{Ref: wire.Ref{ID: s.id, Epoch: e}, Cargo: c, Group: s.group, Flags: s.flags, Socket: s.fd}
}

func (s *sess) ref(e wire.Epoch) wire.Ref { return wire.Ref{ID: s.id, Epoch: e} }

// tcp is the client's TCP connection.
func (s *sess) tcp() *net.TCPConn {
	switch c := s.cli.(type) {
	case *tls.Conn:
		return c.NetConn().(*net.TCPConn)
	case *ktls.Conn:
		return c.Socket().(*net.TCPConn)
	}
	return nil
}

// own is the supervisor's record of its own session: id and epoch of the ownership.
func (s *sess) own() wire.Ref { return s.ref(s.epoch) }

// move is the whole way from one worker to another.
func move(s *sess, from, to *proc) {
	s.t.Helper()
	e := from.freeze(s)
	to.adopt(s, e)
	s.epoch = e
	to.refs(wire.TypeResume, s.ref(e))
	from.refs(wire.TypeRelease, s.ref(e))
}

// say sends a line and expects the answer to it.
func (s *sess) say(line, want string) {
	s.t.Helper()
	s.write(line)
	s.read(want)
}

func (s *sess) write(text string) {
	s.t.Helper()
	if _, err := io.WriteString(s.cli, text); err != nil {
		s.t.Fatalf("session %d: client's write: %v", s.id, err)
	}
}

func (s *sess) read(want string) {
	s.t.Helper()
	buf := make([]byte, len(want))
	if n, err := io.ReadFull(s.cli, buf); err != nil || string(buf) != want {
		s.t.Fatalf("session %d: client got %q (error %v), want %q", s.id, buf[:n], err, want)
	}
}

// eof expects close_notify.
func (s *sess) eof() {
	s.t.Helper()
	if n, err := s.cli.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		s.t.Fatalf("session %d: client got %d bytes and error %v, want close_notify", s.id, n, err)
	}
}
