// Package bench measures the software record layer against crypto/tls: both in one
// process and one run, in turns of a fraction of a second, so that whatever else
// the machine does meets both alike. What counts is the median of the ratios of
// neighbouring turns; absolute figures are of this machine at this hour.
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
	"sync"
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

// config allows one version, and with TLS 1.2 one suite; crypto/tls prefers the
// same one in TLS 1.3 on machines with AES instructions.
func config(version uint16) *tls.Config {
	return &tls.Config{
		MinVersion: version, MaxVersion: version,
		CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256},
	}
}

func (c *credentials) server(version uint16) *tls.Config {
	conf := config(version)
	conf.Certificates = []tls.Certificate{c.cert}
	return conf
}

func (c *credentials) client(version uint16) *tls.Config {
	conf := config(version)
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

func newPair(lib library, version uint16, creds *credentials) (*pair, error) {
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
		p.client, err = connect(lib, cc, creds.client(version))
		done <- err
	}()
	p.server, err = newServer(lib, creds.server(version)).handshake(sc)
	if err != nil {
		_ = sc.Close() // lets the client go
	}
	if err := errors.Join(err, <-done); err != nil {
		_ = cc.Close()
		_ = sc.Close()
		return nil, fmt.Errorf("%s, %s: %w", lib, tls.VersionName(version), err)
	}
	return p, nil
}

// server keeps one configuration for all its connections, as a listener does.
type server struct {
	lib  library
	tls  *tls.Config
	ktls *ktls.Config

	closing sync.WaitGroup
}

func newServer(lib library, conf *tls.Config) *server {
	return &server{lib: lib, tls: conf, ktls: &ktls.Config{TLS: conf, Mode: ktls.ModeSoftware}}
}

func (s *server) handshake(c *net.TCPConn) (net.Conn, error) {
	ctx := context.Background()
	if s.lib == ours {
		return ktls.Server(ctx, c, s.ktls)
	}
	tc := tls.Server(c, s.tls)
	return tc, tc.HandshakeContext(ctx)
}

func connect(lib library, c *net.TCPConn, conf *tls.Config) (net.Conn, error) {
	ctx := context.Background()
	if lib == ours {
		return ktls.Client(ctx, c, &ktls.Config{TLS: conf, Mode: ktls.ModeSoftware})
	}
	tc := tls.Client(c, conf)
	return tc, tc.HandshakeContext(ctx)
}
