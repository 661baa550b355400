package ktls

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"testing"
	"time"
)

// connect handshakes a ktls server with a stock client.
func connect(t testing.TB, cfg *Config, client *tls.Config) (*Conn, *tls.Conn) {
	t.Helper()
	c, s := tcpPair(t)
	tc := tls.Client(c, client)
	done := make(chan error, 1)
	go func() { done <- tc.Handshake() }()
	conn, err := Server(context.Background(), s, cfg)
	if err != nil {
		t.Fatalf("Server: %v (client: %v)", err, <-done)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := <-done; err != nil {
		t.Fatalf("client: %v", err)
	}
	_ = conn.SetDeadline(time.Now().Add(testWait))
	return conn, tc
}

// exchange proves that both directions work: any wrong sequence number shows.
func exchange(t testing.TB, a, b net.Conn) {
	t.Helper()
	for i := range 3 {
		for _, d := range []struct{ from, to net.Conn }{{a, b}, {b, a}} {
			want := fmt.Appendf(nil, "message %d", i)
			if _, err := d.from.Write(want); err != nil {
				t.Fatalf("write: %v", err)
			}
			got := make([]byte, len(want))
			if _, err := io.ReadFull(d.to, got); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("got %q, %v", got, err)
			}
		}
	}
}

func modeOf(layer Layer) Mode {
	if layer == LayerKernel {
		return ModeKernel
	}
	return ModeSoftware
}

var suiteNames12 = []uint16{
	tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
	tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
	tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
}

// Every suite of TLS 1.2 with a stock client; TLS 1.3 suites cannot be chosen in
// crypto/tls and have their tests with the scripted peer and OpenSSL.
func TestServerWithStockClient(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		cfg := &Config{TLS: testServerBoth(t), Mode: modeOf(layer)}
		check := func(name string, client *tls.Config, version, suite uint16) {
			t.Run(name, func(t *testing.T) {
				conn, tc := connect(t, cfg, client)
				exchange(t, tc, conn)
				cs := conn.ConnectionState()
				if cs.Version != version || suite != 0 && cs.CipherSuite != suite || cs.ServerName != "localhost" ||
					cs.NegotiatedProtocol != "echo" || !cs.HandshakeComplete {
					t.Errorf("ConnectionState: %+v", cs)
				}
				if conn.Layer() != layer || conn.LayerReason() != "" {
					t.Errorf("layer %v, reason %q", conn.Layer(), conn.LayerReason())
				}
				local, remote := conn.LocalAddr().String(), conn.RemoteAddr().String()
				conn = move(t, conn)
				exchange(t, conn, tc)
				if after := conn.ConnectionState(); after.Version != cs.Version || after.CipherSuite != cs.CipherSuite ||
					after.ServerName != cs.ServerName || after.CurveID != cs.CurveID || !bytes.Equal(after.TLSUnique, cs.TLSUnique) { //nolint:staticcheck // it travels
					t.Errorf("ConnectionState after the move: %+v", after)
				}
				if conn.LocalAddr().String() != local || conn.RemoteAddr().String() != remote || conn.RemoteAddr().Network() != "tcp" {
					t.Errorf("addresses after the move: %v, %v", conn.LocalAddr(), conn.RemoteAddr())
				}
				if err := tc.Close(); err != nil {
					t.Error(err)
				}
				if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
					t.Errorf("after the client's close_notify: %v", err)
				}
			})
		}
		check("1.3", testClientTLS(t), tls.VersionTLS13, 0)
		for _, suite := range suiteNames12 {
			client := testClientTLS(t)
			client.MaxVersion, client.CipherSuites = tls.VersionTLS12, []uint16{suite}
			check(tls.CipherSuiteName(suite), client, tls.VersionTLS12, suite)
		}
	})
}

func TestClientWithStockServer(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			c, s := tcpPair(t)
			ts := tls.Server(s, testServerTLS(t))
			done := make(chan error, 1)
			go func() { done <- ts.Handshake() }()
			client := testClientTLS(t)
			client.MaxVersion = version
			conn, err := Client(context.Background(), c, &Config{TLS: client, Mode: modeOf(layer)})
			if err != nil {
				t.Fatal(err)
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			_ = conn.SetDeadline(time.Now().Add(testWait))
			exchange(t, conn, ts) // the ticket of TLS 1.3 is on its way already
			conn = move(t, conn)
			exchange(t, ts, conn)
			if cs := conn.ConnectionState(); len(cs.PeerCertificates) != 2 || len(cs.VerifiedChains) == 0 || cs.Version != version {
				t.Errorf("ConnectionState after the move: %d certificates, %d chains", len(cs.PeerCertificates), len(cs.VerifiedChains))
			}
			_ = conn.Close()
			if _, err := ts.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("stock server after Close: %v", err)
			}
		}
	})
}

// The server's first sequence number depends on how many records of tickets
// crypto/tls wrote: none, one, or two for a huge client certificate.
func TestTicketsAndSequenceNumbers(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		for _, tc := range []struct {
			name  string
			setup func(server, client *tls.Config)
			want  uint64
		}{
			{"no ticket", func(s, _ *tls.Config) { s.SessionTicketsDisabled = true }, 0},
			{"one ticket", func(_, _ *tls.Config) {}, 1},
			{"a ticket of two records", func(s, c *tls.Config) {
				s.ClientAuth, s.ClientCAs = tls.RequireAndVerifyClientCert, testPKIOf(t).pool
				c.Certificates = []tls.Certificate{testPKIOf(t).client}
			}, 2},
		} {
			t.Run(tc.name, func(t *testing.T) {
				server, client := testServerTLS(t), testClientTLS(t)
				client.ClientSessionCache = tls.NewLRUClientSessionCache(1)
				tc.setup(server, client)
				conn, peer := connect(t, &Config{TLS: server, Mode: modeOf(layer)}, client)
				if l, ok := conn.layer.(*softLayer); ok && l.tx.dir.seq != tc.want {
					t.Errorf("first sequence number %d, expected %d", l.tx.dir.seq, tc.want)
				}
				exchange(t, conn, peer)
				if server.ClientAuth != 0 {
					conn = move(t, conn)
					if cs := conn.ConnectionState(); len(cs.PeerCertificates) == 0 || cs.PeerCertificates[0].Subject.CommonName != "client" {
						t.Error("the client's certificate did not travel")
					}
				}
			})
		}
	})
}

// TLS 1.3 sessions resume, with one Config for all connections; TLS 1.2 sessions
// do not.
func TestResumption(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		for _, tc := range []struct {
			name    string
			server  func(*tls.Config)
			version uint16
			want    bool
		}{
			{"automatic keys", func(*tls.Config) {}, tls.VersionTLS13, true},
			{"keys of our own", func(c *tls.Config) { c.SetSessionTicketKeys([][32]byte{{1}}) }, tls.VersionTLS13, true},
			{"GetConfigForClient", func(c *tls.Config) {
				inner := c.Clone()
				c.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
					if _, ok := h.Conn.(*net.TCPConn); !ok {
						return nil, fmt.Errorf("callback got a %T", h.Conn)
					}
					return inner, nil
				}
				c.Certificates = nil
				c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return nil, errors.New("outer config used") }
			}, tls.VersionTLS13, true},
			{"disabled", func(c *tls.Config) { c.SessionTicketsDisabled = true }, tls.VersionTLS13, false},
			{"TLS 1.2", func(*tls.Config) {}, tls.VersionTLS12, false},
		} {
			t.Run(tc.name, func(t *testing.T) {
				server, client := testServerTLS(t), testClientTLS(t)
				tc.server(server)
				client.ClientSessionCache = tls.NewLRUClientSessionCache(4)
				client.MaxVersion = tc.version
				cfg := &Config{TLS: server, Mode: modeOf(layer)}
				for i := range 3 {
					conn, peer := connect(t, cfg, client)
					exchange(t, conn, peer)
					want := tc.want && i > 0
					if got := conn.ConnectionState().DidResume; got != want || peer.ConnectionState().DidResume != want {
						t.Errorf("connection %d: resumed %v, expected %v", i, got, want)
					}
					_ = peer.Close()
				}
			})
		}
	})
}

// Key log lines still reach the user's writer.
func TestKeyLogWriterIsHonoured(t *testing.T) {
	var log bytes.Buffer
	server := testServerTLS(t)
	server.KeyLogWriter = &log
	conn, peer := connect(t, &Config{TLS: server, Mode: ModeSoftware}, testClientTLS(t))
	exchange(t, conn, peer)
	if n := bytes.Count(log.Bytes(), []byte("\n")); n != 4 || !bytes.Contains(log.Bytes(), []byte("SERVER_TRAFFIC_SECRET_0 ")) {
		t.Errorf("%d lines", n)
	}
}

// Peers that do not finish a handshake get an error that says which kind they are,
// and cost no descriptor.
func TestBadClients(t *testing.T) {
	before := countFDs(t)
	for _, tc := range []struct {
		name                  string
		send                  string
		close                 bool
		notTLS, timeout, gone bool
		stage                 Stage
	}{
		{name: "HTTP", send: "GET / HTTP/1.1\r\nHost: x\r\n\r\n", notTLS: true, stage: StageHandshake},
		{name: "silent", timeout: true},
		{name: "gone at once", close: true, gone: true},
		{name: "stalls in a record", send: "\x16\x03\x01\x02\x00\x01", timeout: true, stage: StageHandshake},
		{name: "gone in a record", send: "\x16\x03\x01\x02\x00\x01", close: true, gone: true, stage: StageHandshake},
		{name: "stalls in a header", send: "\x16\x03", timeout: true},
		{name: "nonsense in a record", send: "\x16\x03\x01\x00\x04zzzz", stage: StageHandshake},
		{name: "an empty record", send: "\x16\x03\x01\x00\x00", stage: StageHandshake},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, s := tcpPair(t)
			if _, err := io.WriteString(c, tc.send); err != nil {
				t.Fatal(err)
			}
			if tc.close {
				_ = c.Close()
			}
			_, err := Server(context.Background(), s, &Config{TLS: testServerTLS(t), HandshakeTimeout: 50 * time.Millisecond})
			var he *HandshakeError
			if !errors.As(err, &he) {
				t.Fatalf("%v", err)
			}
			if he.NotTLS() != tc.notTLS || he.Timeout() != tc.timeout || he.Gone() != tc.gone || he.Stage != tc.stage {
				t.Errorf("%v: not TLS %v, timeout %v, gone %v, stage %v", err, he.NotTLS(), he.Timeout(), he.Gone(), he.Stage)
			}
			if err := s.Close(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("the connection was left open: %v", err)
			}
			_ = c.Close()
		})
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, s := tcpPair(t)
	if _, err := Server(ctx, s, &Config{TLS: testServerTLS(t)}); !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that is done: %v", err)
	}
	_, s = tcpPair(t)
	if _, err := Server(context.Background(), s, &Config{}); err == nil || s.Close() == nil {
		t.Errorf("without TLS config: %v", err)
	}
	_, s = tcpPair(t)
	weak := testServerTLS(t)
	weak.MaxVersion, weak.CipherSuites = tls.VersionTLS12, []uint16{tls.TLS_RSA_WITH_AES_128_CBC_SHA}
	if _, err := Server(context.Background(), s, &Config{TLS: weak}); !errors.Is(err, ErrUnsupportedSuite) {
		t.Errorf("with CBC suites only: %v", err)
	}
	if after := countFDs(t); after > before+6 { // the pairs of this function close at its end
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

func countFDs(t testing.TB) int {
	t.Helper()
	ents, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(ents)
}

// A TLS 1.2 client with only CBC suites is refused by the handshake.
func TestOnlyAEADSuites(t *testing.T) {
	c, s := tcpPair(t)
	client := testClientTLS(t)
	client.MaxVersion, client.CipherSuites = tls.VersionTLS12, []uint16{tls.TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA, tls.TLS_RSA_WITH_AES_128_GCM_SHA256}
	go func() { _ = tls.Client(c, client).Handshake() }()
	var he *HandshakeError
	if _, err := Server(context.Background(), s, &Config{TLS: testServerTLS(t)}); !errors.As(err, &he) {
		t.Errorf("%v", err)
	}
	_ = c.Close()
}

// Where the kernel cannot, auto takes the software layer and says why; kernel
// refuses.
func TestAutoFallsBackWithReason(t *testing.T) {
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(true)
	ln, err := lc.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	accept := func(client *tls.Config) *net.TCPConn {
		d := net.Dialer{}
		d.SetMultipathTCP(true)
		c, err := d.Dial("tcp4", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		go func() {
			tc := tls.Client(c, client)
			_, _ = io.Copy(tc, tc)
		}()
		s, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		return s.(*net.TCPConn)
	}
	s := accept(testClientTLS(t))
	if mp, _ := s.MultipathTCP(); !mp {
		if ok, _ := kernelPossible(); ok {
			return // this kernel has kernel TLS and no MPTCP: nothing stands in the way
		}
	}
	conn, err := Server(context.Background(), s, &Config{TLS: testServerTLS(t), Mode: ModeAuto})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if conn.Layer() != LayerSoftware || conn.LayerReason() == "" {
		t.Errorf("layer %v, reason %q", conn.Layer(), conn.LayerReason())
	}
	conn = move(t, conn)
	if conn.LayerReason() == "" {
		t.Error("the reason did not travel")
	}
	if _, err := Server(context.Background(), accept(testClientTLS(t)), &Config{TLS: testServerTLS(t), Mode: ModeKernel}); !errors.Is(err, ErrNoKernelTLS) {
		t.Errorf("mode kernel: %v", err)
	}
}
