package ktls

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

func TestListener(t *testing.T) {
	inner, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	failed := make(chan error, 10)
	ln := NewListener(inner, &Config{TLS: testServerTLS(t), Mode: ModeSoftware, OnHandshakeError: func(err error) { failed <- err }})
	dial := func() net.Conn {
		c, err := net.Dial("tcp4", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	dial() // stalls for ever, and holds up nobody
	if _, err := io.WriteString(dial(), "not TLS at all"); err != nil {
		t.Fatal(err)
	}
	var he *HandshakeError
	if err := <-failed; !errors.As(err, &he) || !he.NotTLS() {
		t.Errorf("reported: %v", err)
	}
	for range 3 {
		c := tls.Client(dial(), testClientTLS(t))
		done := make(chan error, 1)
		go func() { done <- c.Handshake() }()
		s, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		exchange(t, s, c)
		_ = s.Close()
	}
	unaccepted := tls.Client(dial(), testClientTLS(t))
	if err := unaccepted.Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := ln.Close(); err != nil {
		t.Error(err)
	}
	if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}
	_ = unaccepted.SetReadDeadline(time.Now().Add(testWait))
	if _, err := unaccepted.Read(make([]byte, 1)); err == nil || isTimeout(err) {
		t.Errorf("a session nobody accepted: %v", err)
	}
}
