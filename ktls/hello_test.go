package ktls

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/big"
	"net"
	"strings"
	"testing"
)

// replaceConn changes what the client says, which crypto/tls would not say by itself.
type replaceConn struct {
	*net.TCPConn
	old, with []byte
}

func (c replaceConn) Write(p []byte) (int, error) {
	if n, err := c.TCPConn.Write(bytes.Replace(p, c.old, c.with, 1)); err != nil {
		return n, err
	}
	return len(p), nil
}

// A handshake may not end in a session that Import would refuse in the next process.
func TestHandshakeRefusesWhatCannotMove(t *testing.T) {
	refused := func(t *testing.T, cfg, client *tls.Config, old, with, why string) {
		t.Helper()
		c, s := tcpPair(t)
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = tls.Client(replaceConn{c, []byte(old), []byte(with)}, client).Handshake()
		}()
		conn, err := Server(context.Background(), s, &Config{TLS: cfg, Mode: ModeSoftware})
		var he *HandshakeError
		if !errors.As(err, &he) || !strings.Contains(err.Error(), why) {
			if err == nil {
				_ = conn.Close()
			}
			t.Errorf("Server: %v, expected a HandshakeError about %q", err, why)
		}
		_ = c.Close()
		<-done
	}
	t.Run("server name", func(t *testing.T) {
		client := testClientTLS(t)
		refused(t, testServerTLS(t), client, "localhost", "local\xffost", "server name")
	})
	t.Run("certificates", func(t *testing.T) {
		leaf := testPKIOf(t).client
		cert := tls.Certificate{Certificate: [][]byte{leaf.Certificate[0]}, PrivateKey: leaf.PrivateKey}
		for i := range maxCerts {
			tmpl := &x509.Certificate{SerialNumber: big.NewInt(int64(i) + 1)}
			der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, leaf.PrivateKey.(crypto.Signer).Public(), leaf.PrivateKey)
			if err != nil {
				t.Fatal(err)
			}
			cert.Certificate = append(cert.Certificate, der)
		}
		server, client := testServerTLS(t), testClientTLS(t)
		server.ClientAuth = tls.RequireAnyClientCert
		client.Certificates = []tls.Certificate{cert}
		refused(t, server, client, "", "", "65 certificates")
	})
}
