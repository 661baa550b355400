package ktls

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"reflect"
	"testing"
	"time"
)

// stockServer is a crypto/tls server that echoes.
func stockServer(t *testing.T, conf *tls.Config) (addr string) {
	t.Helper()
	ln := tls.NewListener(listenTCP(t), conf)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				_ = c.SetDeadline(time.Now().Add(testWait))
				_, _ = io.Copy(c, c)
				_ = c.Close()
			}()
		}
	}()
	t.Cleanup(func() { _ = ln.Close(); <-done })
	return ln.Addr().String()
}

func sayAndHear(t *testing.T, c net.Conn, n int) {
	t.Helper()
	_ = c.SetDeadline(time.Now().Add(testWait))
	want := pattern(n)
	go func() { _, _ = c.Write(want) }()
	got := make([]byte, n)
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("echo of %d bytes: %v", n, err)
	}
}

// A Dialer takes the host for the server's name, as crypto/tls does.
func TestDialer(t *testing.T) {
	addr := stockServer(t, testServerTLS(t))
	_, port, _ := net.SplitHostPort(addr)
	bothLayers(t, func(t *testing.T, layer Layer) {
		conf := testClientTLS(t)
		conf.ServerName = ""
		d := &Dialer{Config: &Config{TLS: conf, Mode: modeOf(layer)}}
		c, err := d.DialContext(context.Background(), "tcp4", "localhost:"+port)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		if c.(*Conn).Layer() != layer {
			t.Errorf("layer %v", c.(*Conn).Layer())
		}
		sayAndHear(t, c, 40_000)
		cs := c.(*Conn).ConnectionState()
		if cs.ServerName != "localhost" || cs.NegotiatedProtocol != "echo" || len(cs.VerifiedChains) == 0 {
			t.Errorf("name %q, protocol %q, %d chains", cs.ServerName, cs.NegotiatedProtocol, len(cs.VerifiedChains))
		}
		if conf.ServerName != "" {
			t.Error("the user's configuration was changed")
		}
		// The certificate has no address in it.
		var he *HandshakeError
		if c, err := d.DialContext(context.Background(), "tcp4", addr); !errors.As(err, &he) || c != nil {
			t.Errorf("by address: %v, %v", c, err)
		}
	})
}

// Everything that ends a Dial, ends it soon and leaves no connection.
func TestDialerErrors(t *testing.T) {
	before := countFDs(t)
	silent := listenTCP(t)
	cfg := &Config{TLS: testClientTLS(t)}
	closed := listenTCP(t)
	_ = closed.Close()
	done, cancel := context.WithCancel(context.Background())
	cancel()
	for _, tc := range []struct {
		name, addr string
		ctx        context.Context
		d          *Dialer
		timeout    bool
	}{
		{name: "no Config", addr: silent.Addr().String(), d: &Dialer{}},
		{name: "no port", addr: "localhost", d: &Dialer{Config: cfg}},
		{name: "nobody listens", addr: closed.Addr().String(), d: &Dialer{Config: cfg}},
		{name: "context done", addr: silent.Addr().String(), ctx: done, d: &Dialer{Config: cfg}},
		{name: "HandshakeTimeout", addr: silent.Addr().String(), timeout: true,
			d: &Dialer{Config: &Config{TLS: cfg.TLS, HandshakeTimeout: 30 * time.Millisecond}}},
		{name: "NetDialer's Timeout", addr: silent.Addr().String(), timeout: true,
			d: &Dialer{NetDialer: &net.Dialer{Timeout: 30 * time.Millisecond}, Config: cfg}},
		{name: "NetDialer's Deadline", addr: silent.Addr().String(), timeout: true,
			d: &Dialer{NetDialer: &net.Dialer{Deadline: time.Now().Add(50 * time.Millisecond)}, Config: cfg}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.ctx == nil {
				tc.ctx = context.Background()
			}
			start := time.Now()
			c, err := tc.d.DialContext(tc.ctx, "tcp4", tc.addr)
			if err == nil || c != nil {
				t.Fatalf("%v, %v", c, err)
			}
			var nerr net.Error
			if tc.timeout && (!errors.As(err, &nerr) || !nerr.Timeout()) {
				t.Errorf("not a timeout: %v", err)
			}
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("took %v", took)
			}
		})
	}
	if after := countFDs(t); after > before+2 {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

// The client role verifies, presents certificates and calls back as crypto/tls does.
func TestClientCallbacks(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		var asked bool
		server := testServerTLS(t)
		server.ClientAuth, server.ClientCAs = tls.RequireAndVerifyClientCert, testPKIOf(t).pool
		addr := stockServer(t, server)
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			conf := testClientTLS(t)
			conf.MaxVersion = version
			conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				asked = true
				return &testPKIOf(t).client, nil
			}
			conf.VerifyConnection = func(cs tls.ConnectionState) error {
				if cs.Version != version {
					return errors.New("another version")
				}
				return nil
			}
			c, err := Dial("tcp4", addr, &Config{TLS: conf, Mode: modeOf(layer)})
			if err != nil {
				t.Fatal(err)
			}
			sayAndHear(t, c, 5000)
			_ = c.Close()
			if !asked {
				t.Error("no certificate was asked for")
			}
			refused := errors.New("not this one")
			conf.VerifyConnection = func(tls.ConnectionState) error { return refused }
			if _, err := Dial("tcp4", addr, &Config{TLS: conf, Mode: modeOf(layer)}); !errors.Is(err, refused) {
				t.Errorf("VerifyConnection: %v", err)
			}
		}
	})
}

// The client role stores the tickets of TLS 1.3 and resumes; TLS 1.2 does neither,
// even from a cache that crypto/tls has filled.
func TestClientResumes(t *testing.T) {
	addr := stockServer(t, testServerTLS(t))
	bothLayers(t, func(t *testing.T, layer Layer) {
		for _, tc := range testSuites {
			t.Run(suiteTestName(tc.version, tc.suite), func(t *testing.T) {
				conf := testClientTLS(t)
				conf.MaxVersion = tc.version
				if tc.version == tls.VersionTLS12 {
					conf.CipherSuites = []uint16{tc.suite}
					conf.ClientSessionCache = tls.NewLRUClientSessionCache(4)
					filled, err := tls.Dial("tcp4", addr, conf)
					if err != nil {
						t.Fatal(err)
					}
					_ = filled.Close()
				} else {
					conf.ClientSessionCache = tls.NewLRUClientSessionCache(4)
				}
				for i := range 3 {
					c, err := Dial("tcp4", addr, &Config{TLS: conf, Mode: modeOf(layer)})
					if err != nil {
						t.Fatal(err)
					}
					want := i > 0 && tc.version == tls.VersionTLS13
					if got := c.ConnectionState().DidResume; got != want {
						t.Errorf("connection %d: resumed %v, expected %v", i, got, want)
					}
					sayAndHear(t, c, 1000) // the ticket is in front of the data
					if c.tickets != nil {
						t.Error("the handshake is still kept after data")
					}
					c = move(t, c)
					sayAndHear(t, c, 1000)
					_ = c.Close()
				}
			})
		}
	})
}

// Without a cache nothing is kept of the handshake, and a ticket that crypto/tls
// refuses costs the session nothing.
func TestClientTicketsKept(t *testing.T) {
	addr := stockServer(t, testServerTLS(t))
	conf := testClientTLS(t)
	c, err := Dial("tcp4", addr, &Config{TLS: conf, Mode: ModeSoftware})
	if err != nil {
		t.Fatal(err)
	}
	if c.tickets != nil {
		t.Error("kept without a cache")
	}
	_ = c.Close()
	conf.ClientSessionCache = tls.NewLRUClientSessionCache(4)
	if c, err = Dial("tcp4", addr, &Config{TLS: conf, Mode: ModeSoftware}); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	eightDays := []byte{0, 10, 0x8c, 0, 0, 0, 0, 0, 1, 1, 0, 1, 'T', 0, 0}
	c.storeTicket(eightDays)
	if c.tickets != nil {
		t.Error("a ticket of eight days was stored")
	}
	sayAndHear(t, c, 1000)
}

// A dialer may change what is offered, and nothing else of what its Config says.
func TestDialerKeepsConfig(t *testing.T) {
	c := &Config{
		Mode: ModeSoftware, RequireRekey: true, HandshakeTimeout: time.Minute,
		Established:      func(tls.ConnectionState) error { return nil },
		OnHandshakeError: func(error) {},
	}
	got := c.withServerName("name.example")
	if got.TLS == nil || got.TLS.ServerName != "name.example" {
		t.Errorf("TLS %+v", got.TLS)
	}
	v := reflect.ValueOf(got).Elem()
	for _, f := range reflect.VisibleFields(v.Type()) {
		if f.IsExported() && v.FieldByIndex(f.Index).IsZero() {
			t.Errorf("%s was lost", f.Name)
		}
	}
}
