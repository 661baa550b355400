package ktls

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/chacha20poly1305"
)

// rawPeer seals and opens single records by hand, straight from the RFCs and
// independently of the package's own layers, so that tests can send what no TLS
// library would and see exactly what arrives.
type rawPeer struct {
	t       testing.TB
	c       *net.TCPConn
	version uint16
	out, in rawHalf
}

type rawHalf struct {
	suite    uint16
	aead     cipher.AEAD
	key, iv  []byte
	seq      uint64
	explicit bool // TLS 1.2 AES-GCM: half of the nonce is in the record
}

// testSuites are the suites both layers carry, one row for each cipher and version.
var testSuites = []struct {
	version, suite uint16
}{
	{tls.VersionTLS13, tls.TLS_AES_128_GCM_SHA256},
	{tls.VersionTLS13, tls.TLS_AES_256_GCM_SHA384},
	{tls.VersionTLS13, tls.TLS_CHACHA20_POLY1305_SHA256},
	{tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256},
	{tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384},
	{tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256},
}

func suiteTestName(version, suite uint16) string {
	return fmt.Sprintf("%s_%s", tls.VersionName(version)[4:], tls.CipherSuiteName(suite))
}

func newRawHalf(t testing.TB, version, suite uint16, seq uint64) rawHalf {
	t.Helper()
	c, ok := kernelCipherOf(version, suite)
	if !ok {
		t.Fatalf("no cipher for %#04x %#04x", version, suite)
	}
	h := rawHalf{suite: suite, key: make([]byte, c.key), iv: make([]byte, 12), seq: seq}
	_, _ = rand.Read(h.key)
	_, _ = rand.Read(h.iv)
	var err error
	switch c.name {
	case "ChaCha20-Poly1305":
		h.aead, err = chacha20poly1305.New(h.key)
	default:
		if version == tls.VersionTLS12 {
			h.iv, h.explicit = h.iv[:4], true
		}
		var b cipher.Block
		if b, err = aes.NewCipher(h.key); err == nil {
			h.aead, err = cipher.NewGCM(b)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func (h *rawHalf) direction() *direction {
	return &direction{key: append([]byte(nil), h.key...), iv: append([]byte(nil), h.iv...), seq: h.seq}
}

func (h *rawHalf) nonce(explicit []byte) []byte {
	if h.explicit {
		return append(append([]byte(nil), h.iv...), explicit...)
	}
	n := append([]byte(nil), h.iv...)
	for i := range 8 {
		n[4+i] ^= byte(h.seq >> (56 - 8*i))
	}
	return n
}

// seal makes one record of the wire.
func (p *rawPeer) seal(typ recordType, plain []byte) []byte {
	h := &p.out
	seq := binary.BigEndian.AppendUint64(nil, h.seq)
	rec := []byte{byte(typ), 3, 3, 0, 0}
	var body, aad []byte
	if p.version == tls.VersionTLS13 {
		rec[0] = byte(typeData)
		inner := append(append([]byte(nil), plain...), byte(typ))
		binary.BigEndian.PutUint16(rec[3:], uint16(len(inner)+16))
		body = h.aead.Seal(nil, h.nonce(nil), inner, rec)
	} else {
		aad = append(append(aad, seq...), byte(typ), 3, 3, byte(len(plain)>>8), byte(len(plain)))
		if h.explicit {
			body = append(body, seq...)
		}
		body = h.aead.Seal(body, h.nonce(seq), plain, aad)
		binary.BigEndian.PutUint16(rec[3:], uint16(len(body)))
	}
	h.seq++
	return append(rec, body...)
}

// send seals one record and writes it.
func (p *rawPeer) send(typ recordType, plain []byte) {
	p.t.Helper()
	p.sendRaw(p.seal(typ, plain))
}

func (p *rawPeer) sendRaw(b []byte) {
	p.t.Helper()
	if _, err := p.c.Write(b); err != nil {
		p.t.Errorf("peer: write: %v", err)
	}
}

// next reads and opens one record.
func (p *rawPeer) next() (recordType, []byte, error) {
	h := &p.in
	hdr := make([]byte, 5)
	if _, err := io.ReadFull(p.c, hdr); err != nil {
		return 0, nil, err
	}
	body := make([]byte, binary.BigEndian.Uint16(hdr[3:]))
	if _, err := io.ReadFull(p.c, body); err != nil {
		return 0, nil, fmt.Errorf("record cut short: %w", err)
	}
	if hdr[1] != 3 || hdr[2] != 3 {
		return 0, nil, fmt.Errorf("record header % x", hdr)
	}
	typ := recordType(hdr[0])
	var nonce, aad []byte
	if p.version == tls.VersionTLS13 {
		nonce, aad = h.nonce(nil), hdr
	} else {
		var explicit []byte
		if h.explicit {
			explicit, body = body[:8], body[8:]
			// What crypto/tls did and the kernel must go on with: a nonce used twice
			// would give the key away.
			if got := binary.BigEndian.Uint64(explicit); got != h.seq {
				return 0, nil, fmt.Errorf("explicit nonce %d for record %d", got, h.seq)
			}
		}
		n := len(body) - 16
		aad = append(binary.BigEndian.AppendUint64(nil, h.seq), hdr[0], 3, 3, byte(n>>8), byte(n))
		nonce = h.nonce(explicit)
	}
	plain, err := h.aead.Open(nil, nonce, body, aad)
	if err != nil {
		return 0, nil, fmt.Errorf("record %d does not open: %w", h.seq, err)
	}
	h.seq++
	if p.version == tls.VersionTLS13 {
		i := len(plain) - 1
		for i >= 0 && plain[i] == 0 {
			i--
		}
		if i < 0 {
			return 0, nil, fmt.Errorf("record %d has no type", h.seq-1)
		}
		typ, plain = recordType(plain[i]), plain[:i]
	}
	return typ, plain, nil
}

// want reads one record and checks what it is.
func (p *rawPeer) want(typ recordType, plain string) {
	p.t.Helper()
	gotTyp, got, err := p.next()
	if err != nil {
		p.t.Errorf("peer: %v", err)
		return
	}
	if gotTyp != typ || string(got) != plain {
		p.t.Errorf("peer: got a record of type %d, %d bytes %.40q; expected type %d, %d bytes %.40q", gotTyp, len(got), got, typ, len(plain), plain)
	}
}

// wantData reads n bytes of data records.
func (p *rawPeer) wantData(n int) []byte {
	p.t.Helper()
	var all []byte
	for len(all) < n {
		typ, got, err := p.next()
		if err != nil {
			p.t.Fatalf("peer: after %d of %d bytes: %v", len(all), n, err)
		}
		if typ != typeData {
			p.t.Fatalf("peer: record of type %d after %d of %d bytes of data", typ, len(all), n)
		}
		all = append(all, got...)
	}
	return all
}

// rawSession connects a rawPeer to a socket on which the kernel holds the keys.
// sendSeq and receiveSeq are the layer's first sequence numbers.
func rawSession(t testing.TB, version, suite uint16, sendSeq, receiveSeq uint64) (*rawPeer, recordLayer, *net.TCPConn) {
	t.Helper()
	peer, sock := unkeyedSession(t, version, suite, sendSeq, receiveSeq)
	l, err := newKernelLayer(sock, params{version: version, suite: suite}, peer.in.direction(), peer.out.direction())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.wipe)
	return peer, l, sock
}

// unkeyedSession is rawSession before the kernel has keys.
func unkeyedSession(t testing.TB, version, suite uint16, sendSeq, receiveSeq uint64) (*rawPeer, *net.TCPConn) {
	t.Helper()
	c, sock := tcpPair(t)
	return keysFor(t, c, sock, version, suite, sendSeq, receiveSeq), sock
}

// keysFor makes keys for a connection and attaches kernel TLS at the server's end.
func keysFor(t testing.TB, c, sock *net.TCPConn, version, suite uint16, sendSeq, receiveSeq uint64) *rawPeer {
	t.Helper()
	if err := attachKernel(sock); err != nil {
		t.Fatal(err)
	}
	return &rawPeer{
		t: t, c: c, version: version,
		out: newRawHalf(t, version, suite, receiveSeq),
		in:  newRawHalf(t, version, suite, sendSeq),
	}
}

// testWait bounds every wait of a test for something that should happen at once.
const testWait = 20 * time.Second

func tcpPair(t testing.TB) (client, server *net.TCPConn) {
	t.Helper()
	return tcpPairWindow(t, 0)
}

// tcpPairOf has multipath TCP at the listener, the client, or both.
func tcpPairOf(t testing.TB, listener, client bool) (c, s *net.TCPConn) {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(listener)
	d := net.Dialer{Timeout: testWait}
	d.SetMultipathTCP(client)
	return connectTCP(t, &lc, &d)
}

// tcpPairWindow gives the client a receive buffer of the given size from the start,
// so that the server's TCP makes small segments of what it is given.
func tcpPairWindow(t testing.TB, window int) (client, server *net.TCPConn) {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	d := net.Dialer{Timeout: testWait}
	if window > 0 {
		d.Control = setBuffers(window, 0)
	}
	return connectTCP(t, &lc, &d)
}

// tcpPairSmall gives both ends buffers of the given size. They have them from the
// start: one that shrinks below the window that was promised drops what comes, and TCP
// then waits for many seconds.
func tcpPairSmall(t testing.TB, size int) (client, server *net.TCPConn) {
	t.Helper()
	lc := net.ListenConfig{Control: setBuffers(size, size)}
	lc.SetMultipathTCP(false)
	d := net.Dialer{Timeout: testWait, Control: setBuffers(size, size)}
	return connectTCP(t, &lc, &d)
}

func setBuffers(receive, send int) func(_, _ string, rc syscall.RawConn) error {
	return func(_, _ string, rc syscall.RawConn) (err error) {
		cerr := rc.Control(func(fd uintptr) {
			if receive > 0 {
				err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, receive)
			}
			if send > 0 {
				err = errors.Join(err, syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF, send))
			}
		})
		return errors.Join(err, cerr)
	}
}

func connectTCP(t testing.TB, lc *net.ListenConfig, d *net.Dialer) (client, server *net.TCPConn) {
	t.Helper()
	l, err := lc.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	c, err := d.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		_ = c.Close()
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = c.Close(), s.Close() })
	end := time.Now().Add(testWait)
	_, _ = c.SetDeadline(end), s.SetDeadline(end)
	return c.(*net.TCPConn), s.(*net.TCPConn)
}
