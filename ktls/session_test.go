package ktls

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// bothLayers runs a test for each record layer. The kernel's needs a guest.
func bothLayers(t *testing.T, f func(t *testing.T, layer Layer)) {
	t.Helper()
	t.Run("software", func(t *testing.T) { f(t, LayerSoftware) })
	t.Run("kernel", func(t *testing.T) {
		guest.NeedKernelTLS(t)
		f(t, LayerKernel)
	})
}

// eachSuite is bothLayers for every suite.
func eachSuite(t *testing.T, f func(t *testing.T, layer Layer, version, suite uint16)) {
	t.Helper()
	bothLayers(t, func(t *testing.T, layer Layer) {
		for _, tc := range testSuites {
			t.Run(suiteTestName(tc.version, tc.suite), func(t *testing.T) { f(t, layer, tc.version, tc.suite) })
		}
	})
}

// scripted is a session whose peer does what the test says, record by record.
type scripted struct {
	*rawPeer
	conn      *Conn
	outSecret []byte // TLS 1.3: the peer's
	inSecret  []byte
	gotAlert  Alert
	first     []byte // our first sending secret, and the peer's
	firstOut  []byte
	changer   *keyChanger // kernel layer: who changes our keys; nil: nobody
}

// newScripted makes a session in the server role.
func newScripted(t testing.TB, layer Layer, version, suite uint16) *scripted {
	t.Helper()
	return newScriptedRole(t, layer, version, suite, false)
}

func newScriptedRole(t testing.TB, layer Layer, version, suite uint16, client bool) *scripted {
	t.Helper()
	peer, sock := tcpPair(t)
	s := &scripted{rawPeer: &rawPeer{t: t, c: peer, version: version}}
	p := params{version: version, suite: suite, client: client}
	info, err := lookupSuite(version, suite)
	if err != nil {
		t.Fatal(err)
	}
	half := func(secret *[]byte) direction {
		d := direction{key: make([]byte, info.keyLen), iv: make([]byte, info.ivLen()), seq: 1}
		_, _ = rand.Read(d.key)
		_, _ = rand.Read(d.iv)
		if version == tls.VersionTLS13 {
			*secret = make([]byte, info.hashLen)
			_, _ = rand.Read(*secret)
			if d, err = info.direction13(append([]byte(nil), *secret...), 0); err != nil {
				t.Fatal(err)
			}
		}
		return d
	}
	tx, rx := half(&s.inSecret), half(&s.outSecret)
	s.first, s.firstOut = bytes.Clone(s.inSecret), bytes.Clone(s.outSecret)
	s.in, s.out = rawHalfOf(t, info, &tx), rawHalfOf(t, info, &rx)
	var l recordLayer
	if layer == LayerKernel {
		if err := attachKernel(sock); err != nil {
			t.Fatal(err)
		}
		l, err = newKernelLayer(sock, p, &tx, &rx)
	} else {
		l, err = newSoftLayer(sock, p, tx, rx)
	}
	if err != nil {
		t.Fatal(err)
	}
	id := make([]byte, sessionIDLen)
	_, _ = rand.Read(id)
	f := newFacts(id, &tls.ConnectionState{Version: version, CipherSuite: suite, ServerName: "scripted"}, client, sock.LocalAddr(), sock.RemoteAddr())
	f.Layer = layer
	s.conn = newConn(sock, l, p, f)
	s.conn.local, s.conn.remote = sock.LocalAddr(), sock.RemoteAddr()
	t.Cleanup(func() { _ = s.conn.Close() })
	return s
}

func rawHalfOf(t testing.TB, info *suiteInfo, d *direction) rawHalf {
	t.Helper()
	a, err := info.newAEAD(d.key)
	if err != nil {
		t.Fatal(err)
	}
	return rawHalf{suite: info.id, aead: a, iv: append([]byte(nil), d.iv...), seq: d.seq, explicit: info.explicitNonce()}
}

// rekeyOut and rekeyIn take the peer to its next keys.
func (s *scripted) rekeyOut() { s.rekey(&s.outSecret, &s.out) }
func (s *scripted) rekeyIn()  { s.rekey(&s.inSecret, &s.in) }

func (s *scripted) rekey(secret *[]byte, h *rawHalf) {
	s.t.Helper()
	info, err := lookupSuite(s.version, h.suite)
	if err != nil {
		s.t.Fatal(err)
	}
	d, err := info.next(&direction{secret: *secret})
	if err != nil {
		s.t.Fatal(err)
	}
	*secret = d.secret
	*h = rawHalfOf(s.t, info, &d)
}

// wantEnd reads what Read says last.
func (s *scripted) wantEnd(want error) {
	s.t.Helper()
	n, err := s.conn.Read(make([]byte, 100))
	if n != 0 || !errors.Is(err, want) {
		s.t.Fatalf("Read gave %d bytes and %v, expected %v", n, err, want)
	}
}

// wantRead reads exactly want.
func (s *scripted) wantRead(want string) {
	s.t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(s.conn, got); err != nil || string(got) != want {
		s.t.Fatalf("Read gave %.60q and %v, expected %.60q", got, err, want)
	}
}

// wantFIN reads the end of the TCP stream at the peer.
func (s *scripted) wantFIN() {
	s.t.Helper()
	if typ, p, err := s.next(); !errors.Is(err, io.EOF) {
		s.t.Fatalf("peer: record of type %d, %.40q, error %v; expected FIN", typ, p, err)
	}
}

// move takes the session through Detach and Import, as if into another process:
// over an *os.File of a duplicate of the socket.
func (s *scripted) move() {
	s.t.Helper()
	if s.changer != nil {
		s.changer.settle(s.t, s.conn)
	}
	s.conn = moveWith(s.t, s.conn, s.changer)
}

func move(t testing.TB, c *Conn) *Conn { return moveWith(t, c, nil) }

func moveWith(t testing.TB, c *Conn, changer *keyChanger) *Conn {
	t.Helper()
	sock, st, err := c.Detach()
	if err != nil {
		t.Fatalf("detach: %v", err)
	}
	secrets, _ := st.MarshalSecrets()
	facts, err := st.MarshalFacts()
	if err != nil {
		t.Fatal(err)
	}
	rec, err := st.MarshalRecord()
	if err != nil {
		t.Fatal(err)
	}
	st.Wipe()
	moved := duplicate(t, sock)
	_ = sock.Close()
	n, err := Import(moved, facts, rec)
	if err != nil {
		_ = moved.Close()
		t.Fatalf("import: %v", err)
	}
	t.Cleanup(func() { _ = n.Close() })
	changer.attach(t, n, secrets)
	_ = n.SetDeadline(time.Now().Add(testWait))
	return n
}

// duplicate is what arrives by SCM_RIGHTS: a new descriptor of the same socket.
func duplicate(t testing.TB, sock Socket) *os.File {
	t.Helper()
	var f *os.File
	rc, err := sock.SyscallConn()
	if err == nil {
		cerr := rc.Control(func(fd uintptr) {
			var n int
			if n, err = dupFD(int(fd)); err == nil {
				f = os.NewFile(uintptr(n), "session")
			}
		})
		err = errors.Join(err, cerr)
	}
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// smallBuffers makes a socket pair full soon.
func (s *scripted) smallBuffers() {
	_ = s.c.SetReadBuffer(32 << 10)
	if tc, ok := s.conn.sock.(*net.TCPConn); ok {
		_ = tc.SetWriteBuffer(32 << 10)
	}
}

var (
	past  = time.Unix(1, 0)
	never time.Time
)

// listenTCP listens on the loopback without multipath TCP.
func listenTCP(t testing.TB) *net.TCPListener {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln.(*net.TCPListener)
}
