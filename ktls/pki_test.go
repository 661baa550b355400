package ktls

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"sync"
	"testing"
	"time"
)

// testPKI is a CA, a server certificate of each kind, and a client certificate.
type testPKI struct {
	pool          *x509.CertPool
	ecdsa, client tls.Certificate
	// rsa is made on first use: an RSA key takes seconds on an emulated machine.
	rsa func() (tls.Certificate, error)
}

var pki = sync.OnceValues(func() (*testPKI, error) {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"},
		NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign,
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		return nil, err
	}
	p := &testPKI{pool: x509.NewCertPool()}
	caCert, err := x509.ParseCertificate(caDER)
	if err != nil {
		return nil, err
	}
	p.pool.AddCert(caCert)
	leaf := func(name string, key any, pub any, extra int) (tls.Certificate, error) {
		tmpl := &x509.Certificate{
			SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
			NotAfter:    time.Now().Add(24 * time.Hour),
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}
		if extra > 0 {
			tmpl.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3, 4}, Value: bytes.Repeat([]byte{4}, extra)}}
		}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, ca, pub, caKey)
		return tls.Certificate{Certificate: [][]byte{der, caDER}, PrivateKey: key}, err
	}
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	p.rsa = sync.OnceValues(func() (tls.Certificate, error) {
		key, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			return tls.Certificate{}, err
		}
		return leaf("localhost", key, key.Public(), 0)
	})
	if p.ecdsa, err = leaf("localhost", ecKey, ecKey.Public(), 0); err != nil {
		return nil, err
	}
	// A chain so large that the ticket which carries it exceeds one record.
	p.client, err = leaf("client", ecKey, ecKey.Public(), 17000)
	return p, err
})

func testPKIOf(t testing.TB) *testPKI {
	t.Helper()
	p, err := pki()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func testServerTLS(t testing.TB) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{testPKIOf(t).ecdsa}, NextProtos: []string{"echo", "other"}}
}

// testServerBoth also has an RSA certificate.
func testServerBoth(t testing.TB) *tls.Config {
	t.Helper()
	cfg := testServerTLS(t)
	cert, err := testPKIOf(t).rsa()
	if err != nil {
		t.Fatal(err)
	}
	cfg.Certificates = append(cfg.Certificates, cert)
	return cfg
}

func testClientTLS(t testing.TB) *tls.Config {
	return &tls.Config{RootCAs: testPKIOf(t).pool, ServerName: "localhost", NextProtos: []string{"echo"}}
}
