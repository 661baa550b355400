package ktls

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
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

// foreignListener gives connections of another kind.
type foreignListener struct{ net.Listener }

func (l foreignListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return struct{ net.Conn }{c}, nil
}

// A connection that is no TCP connection is closed and reported, and the listener goes
// on.
func TestListenerOfOthers(t *testing.T) {
	failed := make(chan error, 1)
	ln := NewListener(foreignListener{listenTCP(t)}, &Config{TLS: testServerTLS(t), OnHandshakeError: func(err error) { failed <- err }})
	defer func() { _ = ln.Close() }()
	for range 2 {
		c, err := net.Dial("tcp4", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if err := <-failed; !strings.Contains(err.Error(), "*net.TCPConn") {
			t.Errorf("reported: %v", err)
		}
		_ = c.SetReadDeadline(time.Now().Add(testWait))
		if _, err := c.Read(make([]byte, 1)); err == nil || isTimeout(err) {
			t.Errorf("the connection is open: %v", err)
		}
		_ = c.Close()
	}
}

// Listen is what a program that used tls.Listen calls instead.
func TestListen(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		ln, err := Listen("tcp4", "127.0.0.1:0", &Config{TLS: testServerTLS(t), Mode: modeOf(layer)})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = ln.Close() }()
		go func() {
			c, err := ln.Accept()
			if err == nil {
				_, _ = io.Copy(c, c)
				_ = c.Close()
			}
		}()
		c, err := tls.Dial("tcp4", ln.Addr().String(), testClientTLS(t))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		sayAndHear(t, c, 30_000)
	})
	for name, try := range map[string]func() (net.Listener, error){
		"no Config":     func() (net.Listener, error) { return Listen("tcp", "127.0.0.1:0", nil) },
		"no TLS":        func() (net.Listener, error) { return Listen("tcp", "127.0.0.1:0", &Config{}) },
		"a unix socket": func() (net.Listener, error) { return Listen("unix", t.TempDir()+"/s", &Config{TLS: testServerTLS(t)}) },
	} {
		if ln, err := try(); err == nil || ln != nil {
			t.Errorf("%s: %v, %v", name, ln, err)
		}
	}
}
