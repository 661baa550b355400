package ktls

import (
	"context"
	"crypto/tls"
	"errors"
	"strings"
	"testing"
)

// An alert of the application's own: the peer gets it, nothing after it, and both
// directions end.
func TestAbort(t *testing.T) {
	eachSuite(t, func(t *testing.T, layer Layer, version, suite uint16) {
		const accessDenied Alert = 49
		s := newScripted(t, layer, version, suite)
		if _, err := s.conn.Write([]byte("so long")); err != nil {
			t.Fatal(err)
		}
		for _, a := range []Alert{alertCloseNotify, alertUserCanceled, alertNoRenegotiation} {
			if err := s.conn.Abort(a); err == nil {
				t.Errorf("%s was sent as a fatal alert", a)
			}
		}
		if err := s.conn.Abort(accessDenied); err != nil {
			t.Fatal(err)
		}
		s.want(typeData, "so long")
		s.want(typeAlert, string([]byte{levelFatal, byte(accessDenied)}))
		var alert *AlertError
		if _, err := s.conn.Write([]byte("x")); !errors.As(err, &alert) || alert.Alert != accessDenied || !alert.Sent {
			t.Errorf("Write: %v", err)
		}
		if _, err := s.conn.Read(make([]byte, 1)); !errors.As(err, &alert) || alert.Alert != accessDenied {
			t.Errorf("Read: %v", err)
		}
		if err := s.conn.Abort(alertInternalError); !errors.As(err, &alert) || alert.Alert != accessDenied {
			t.Errorf("Abort again: %v", err)
		}
		if err := s.conn.Close(); err != nil {
			t.Fatal(err)
		}
		if typ, p, err := s.next(); err == nil {
			t.Errorf("after the alert came a record of type %d: %q", typ, p)
		}
	})
}

// What only crypto/tls can compute can be taken when the handshake ends; an error
// refuses the session.
func TestEstablished(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		var ours []byte
		cfg := &Config{TLS: testServerTLS(t), Mode: ModeSoftware, Established: func(cs tls.ConnectionState) (err error) {
			ours, err = cs.ExportKeyingMaterial("EXPORTER-Channel-Binding", nil, 32)
			return err
		}}
		client := testClientTLS(t)
		client.MaxVersion = version
		conn, peer := connect(t, cfg, client)
		cs := peer.ConnectionState()
		theirs, err := cs.ExportKeyingMaterial("EXPORTER-Channel-Binding", nil, 32)
		if err != nil || len(ours) != 32 || string(ours) != string(theirs) {
			t.Errorf("exported %x, the peer %x, %v", ours, theirs, err)
		}
		exchange(t, conn, peer)
	}

	refused := errors.New("not this one")
	c, s := tcpPair(t)
	go func() { _ = tls.Client(c, testClientTLS(t)).Handshake() }()
	_, err := Server(context.Background(), s, &Config{TLS: testServerTLS(t), Mode: ModeSoftware,
		Established: func(tls.ConnectionState) error { return refused }})
	if !errors.Is(err, refused) {
		t.Errorf("Server: %v", err)
	}
}

// A server that refuses at once begins with an alert, which is TLS all the same.
func TestFirstRecordIsAnAlert(t *testing.T) {
	c, s := tcpPair(t)
	if _, err := s.Write([]byte{byte(typeAlert), 3, 1, 0, 2, levelFatal, 40}); err != nil {
		t.Fatal(err)
	}
	_, err := Client(context.Background(), c, &Config{TLS: testClientTLS(t), Mode: ModeSoftware})
	var he *HandshakeError
	if !errors.As(err, &he) || he.NotTLS() || !strings.Contains(err.Error(), "handshake failure") {
		t.Errorf("%v", err)
	}
}
