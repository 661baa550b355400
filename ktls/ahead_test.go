package ktls

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

// heldConn sends what was written when its owner reads or says so: what crypto/tls
// writes last in a handshake goes out in one segment with the first data.
type heldConn struct {
	*net.TCPConn
	held  []byte
	noCCS bool // leaves out what TLS 1.3 sends only for the sake of middleboxes
}

func (c *heldConn) Write(p []byte) (int, error) {
	c.held = append(c.held, p...)
	return len(p), nil
}

func (c *heldConn) release() error {
	if c.noCCS {
		c.held = bytes.Replace(c.held, []byte("\x14\x03\x03\x00\x01\x01"), nil, 1)
	}
	_, err := c.TCPConn.Write(c.held)
	c.held = nil
	return err
}

func (c *heldConn) Read(p []byte) (int, error) {
	if err := c.release(); err != nil {
		return 0, err
	}
	return c.TCPConn.Read(p)
}

// Data that arrives together with the peer's Finished belongs to the session, in
// every shape of a handshake: nothing of it may be taken off the socket before.
func TestDataTogetherWithFinished(t *testing.T) {
	mutual := func(server, client *tls.Config) {
		server.ClientAuth = tls.RequireAnyClientCert
		client.Certificates = []tls.Certificate{testPKIOf(t).client}
	}
	curves := func(ids ...tls.CurveID) func(server, client *tls.Config) {
		return func(server, _ *tls.Config) { server.CurvePreferences = ids }
	}
	shapes := []struct {
		name  string
		setup func(server, client *tls.Config)
	}{
		{"plain", func(_, _ *tls.Config) {}},
		{"no tickets", func(server, _ *tls.Config) { server.SessionTicketsDisabled = true }},
		{"mutual", mutual},
		{"certificate asked for", func(server, _ *tls.Config) { server.ClientAuth = tls.RequestClientCert }},
		{"another curve", curves(tls.CurveP384)}, // HelloRetryRequest
		{"X25519", curves(tls.X25519)},
	}
	bothLayers(t, func(t *testing.T, layer Layer) {
		for _, shape := range shapes {
			for i, suite := range append([]uint16{0}, suiteNames12...) {
				name := "1.3"
				if suite != 0 {
					name = tls.CipherSuiteName(suite)
				}
				t.Run(shape.name+"/"+name, func(t *testing.T) {
					server, client := testServerBoth(t), testClientTLS(t)
					if i > 0 {
						client.MaxVersion, client.CipherSuites = tls.VersionTLS12, []uint16{suite}
					}
					shape.setup(server, client)
					togetherWithFinished(t, layer, server, client)
				})
			}
		}
	})
}

func togetherWithFinished(t *testing.T, layer Layer, server, client *tls.Config) {
	t.Helper()
	const data = "and data"
	for _, tc := range []struct{ weAreClient, noCCS bool }{{false, false}, {true, false}, {false, true}, {true, true}} {
		if tc.noCCS && client.MaxVersion == tls.VersionTLS12 {
			continue
		}
		weAreClient := tc.weAreClient
		c, s := tcpPair(t)
		done := make(chan error, 1)
		peer := func(held *heldConn, tc *tls.Conn) {
			err := tc.Handshake()
			if err == nil {
				_, err = tc.Write([]byte(data))
			}
			done <- errors.Join(err, held.release())
		}
		var conn *Conn
		var err error
		if weAreClient {
			held := &heldConn{TCPConn: s, noCCS: tc.noCCS}
			go peer(held, tls.Server(held, server))
			conn, err = Client(context.Background(), c, &Config{TLS: client, Mode: modeOf(layer)})
		} else {
			held := &heldConn{TCPConn: c, noCCS: tc.noCCS}
			go peer(held, tls.Client(held, client))
			conn, err = Server(context.Background(), s, &Config{TLS: server, Mode: modeOf(layer)})
		}
		if err != nil {
			_, _ = c.Close(), s.Close()
			t.Fatalf("%+v: %v (peer: %v)", tc, err, <-done)
		}
		if err := <-done; err != nil {
			t.Errorf("%+v: peer: %v", tc, err)
		}
		_ = conn.SetDeadline(time.Now().Add(testWait))
		b := make([]byte, len(data))
		if _, err := io.ReadFull(conn, b); err != nil || string(b) != data {
			t.Errorf("%+v: %q, %v", tc, b, err)
		}
		_ = conn.Close()
	}
}
