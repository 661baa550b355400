// Package bench measures ktls and ktlsvisor against crypto/tls: both in one run, in
// turns of a fraction of a second, so that whatever else the machine does meets both
// alike. What counts is the median of the ratios of neighbouring turns; absolute
// figures are of this machine at this hour.
package bench

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"time"

	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// library is whose record layer is measured.
type library string

const (
	ours  library = "ktls"
	stock library = "crypto/tls"
)

var libraries = [...]library{ours, stock}

// credentials are those of the loopback server, good for an hour.
type credentials struct {
	cert  tls.Certificate
	roots *x509.CertPool
}

const serverName = "bench.test"

func newCredentials() (*credentials, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: serverName},
		DNSNames:     []string{serverName},
		NotBefore:    time.Now().Add(-time.Minute),
		NotAfter:     time.Now().Add(time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		IsCA:         true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	c := &credentials{roots: x509.NewCertPool()}
	c.cert = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
	c.roots.AddCert(leaf)
	return c, nil
}

// protocol is a version of TLS and its one cipher suite. crypto/tls lets nobody choose
// those of TLS 1.3: it takes AES-128-GCM where the processor has instructions for that
// and ChaCha20-Poly1305 elsewhere, so never AES-256-GCM.
type protocol struct {
	version uint16
	suite   uint16
}

var (
	aes128TLS13 = protocol{tls.VersionTLS13, tls.TLS_AES_128_GCM_SHA256}
	chachaTLS13 = protocol{tls.VersionTLS13, tls.TLS_CHACHA20_POLY1305_SHA256}
	aes128TLS12 = protocol{tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256}
	aes256TLS12 = protocol{tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384}
	chachaTLS12 = protocol{tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256}
)

func (p protocol) String() string {
	name := "AES-128-GCM"
	switch p.suite {
	case aes256TLS12.suite:
		name = "AES-256-GCM"
	case chachaTLS13.suite, chachaTLS12.suite:
		name = "ChaCha20-Poly1305"
	}
	return tls.VersionName(p.version) + " " + name
}

func (p protocol) config() *tls.Config {
	return &tls.Config{MinVersion: p.version, MaxVersion: p.version, CipherSuites: []uint16{p.suite}}
}

func (c *credentials) server(p protocol) *tls.Config {
	conf := p.config()
	conf.Certificates = []tls.Certificate{c.cert}
	return conf
}

func (c *credentials) client(p protocol) *tls.Config {
	conf := p.config()
	conf.RootCAs, conf.ServerName = c.roots, serverName
	return conf
}

// listen does without multipath TCP, which the kernel layer cannot be used with.
func listen() (*net.TCPListener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	return ln.(*net.TCPListener), nil
}

// pair is one session over the loopback, with the same library at both ends.
type pair struct {
	server, client net.Conn
}

func (p *pair) close() {
	_ = p.client.Close()
	_ = p.server.Close()
}

func newPair(lib library, mode ktls.Mode, proto protocol, creds *credentials) (*pair, error) {
	ln, err := listen()
	if err != nil {
		return nil, err
	}
	defer func() { _ = ln.Close() }()
	cc, err := net.DialTCP("tcp4", nil, ln.Addr().(*net.TCPAddr))
	if err != nil {
		return nil, err
	}
	sc, err := ln.AcceptTCP()
	if err != nil {
		_ = cc.Close()
		return nil, err
	}
	p := &pair{}
	done := make(chan error, 1)
	go func() {
		var err error
		p.client, err = connect(lib, mode, cc, creds.client(proto))
		done <- err
	}()
	p.server, err = newServer(lib, mode, creds.server(proto)).handshake(sc)
	if err != nil {
		_ = sc.Close() // lets the client go
	}
	if err := errors.Join(err, <-done); err != nil {
		_ = cc.Close()
		_ = sc.Close()
		return nil, fmt.Errorf("%s, %s: %w", lib, proto, err)
	}
	if got := p.server.(stateful).ConnectionState().CipherSuite; got != proto.suite {
		p.close()
		return nil, fmt.Errorf("%s: the suite is %s, not %s", lib, tls.CipherSuiteName(got), tls.CipherSuiteName(proto.suite))
	}
	return p, nil
}

type stateful interface{ ConnectionState() tls.ConnectionState }

// server keeps one configuration for all its connections, as a listener does.
type server struct {
	lib  library
	tls  *tls.Config
	ktls *ktls.Config
}

func newServer(lib library, mode ktls.Mode, conf *tls.Config) *server {
	return &server{lib: lib, tls: conf, ktls: &ktls.Config{TLS: conf, Mode: mode}}
}

func (s *server) handshake(c *net.TCPConn) (net.Conn, error) {
	ctx := context.Background()
	if s.lib == ours {
		return ktls.Server(ctx, c, s.ktls)
	}
	tc := tls.Server(c, s.tls)
	return tc, tc.HandshakeContext(ctx)
}

func connect(lib library, mode ktls.Mode, c *net.TCPConn, conf *tls.Config) (net.Conn, error) {
	ctx := context.Background()
	if lib == ours {
		return ktls.Client(ctx, c, &ktls.Config{TLS: conf, Mode: mode})
	}
	tc := tls.Client(c, conf)
	return tc, tc.HandshakeContext(ctx)
}
