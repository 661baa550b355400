package ktls

import (
	"context"
	"crypto/tls"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// tailingConn is a TLS 1.2 peer's connection that puts another handshake message into
// the record of its Finished.
type tailingConn struct {
	*wire
	t *testing.T
}

func (c *tailingConn) Write(p []byte) (int, error) {
	for b := p; len(b) > 0; {
		n := recordHeaderLen + int(b[3])<<8 + int(b[4])
		rec := b[:n]
		b = b[n:]
		if c.out.ccs {
			rec = c.tail(rec)
		} else {
			c.wrote(rec)
		}
		if _, err := c.Conn.Write(rec); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// tail opens the record of a Finished and seals it anew with an empty ClientHello, or a
// HelloRequest, behind it.
func (c *tailingConn) tail(rec []byte) []byte {
	info, err := lookupSuite(tls.VersionTLS12, c.hello.suite())
	if err != nil {
		c.t.Error(err)
		return rec
	}
	key, server := info.directions12(c.master, c.clientRandom, c.hello.random())
	extra := byte(msgClientHello)
	if !c.client {
		key, extra = server, msgHelloRequest
	}
	h := half{suite: info, dir: key}
	_, finished, err := h.open(rec, make([]byte, 100))
	if err != nil {
		c.t.Error(err)
		return rec
	}
	both := append(append([]byte(nil), finished...), extra, 0, 0, 0)
	out := make([]byte, h.sealedLen(len(both)))
	h.dir.seq = 0
	if _, err := h.seal(out, typeHandshake, both); err != nil {
		c.t.Error(err)
	}
	return out
}

// crypto/tls keeps a message behind the Finished to itself, and the session would
// go on as if it had not been sent: it must end instead, with the right alert.
func TestMessageInTheRecordOfFinished(t *testing.T) {
	server := testServerBoth(t)
	for _, suite := range suiteNames12 {
		c, s := tcpPair(t)
		w := &wire{Conn: c, client: true}
		client := testClientTLS(t)
		client.MaxVersion, client.CipherSuites, client.KeyLogWriter = tls.VersionTLS12, []uint16{suite}, keyLogWriter{w}
		tc := tls.Client(&tailingConn{w, t}, client)
		wantUnexpectedMessage(t, suite, tc, func() (*Conn, error) {
			return Server(context.Background(), s, &Config{TLS: server, Mode: ModeSoftware})
		})
	}
}

// wantUnexpectedMessage has ours refuse a handshake with peer, who must hear why.
func wantUnexpectedMessage(t *testing.T, suite uint16, peer *tls.Conn, ours func() (*Conn, error)) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		err := peer.Handshake()
		if err == nil {
			_, err = peer.Read(make([]byte, 1))
		}
		done <- err
	}()
	conn, err := ours()
	if err == nil {
		_ = conn.Close()
	}
	var alert *AlertError
	if !errors.As(err, &alert) || alert.Alert != alertUnexpectedMessage || !alert.Sent {
		t.Errorf("%s: %v", tls.CipherSuiteName(suite), err)
	}
	if err := <-done; err == nil || !strings.Contains(err.Error(), "unexpected message") {
		t.Errorf("%s: the peer got %v", tls.CipherSuiteName(suite), err)
	}
}

// The same in the client role.
func TestMessageInTheRecordOfServersFinished(t *testing.T) {
	for _, suite := range suiteNames12 {
		c, s := tcpPair(t)
		w := &wire{Conn: s}
		server, client := testServerBoth(t), testClientTLS(t)
		server.KeyLogWriter = keyLogWriter{w}
		client.MaxVersion, client.CipherSuites = tls.VersionTLS12, []uint16{suite}
		ts := tls.Server(&tailingConn{w, t}, server)
		wantUnexpectedMessage(t, suite, ts, func() (*Conn, error) {
			return Client(context.Background(), c, &Config{TLS: client, Mode: ModeSoftware})
		})
	}
}

const fipsChild = "KTLSVISOR_TEST_FIPS_CHILD"

// With fips140=only crypto/cipher refuses AES-GCM with our nonces: the software
// layer says so, and the kernel layer works. The setting is read when a process
// starts, so the test starts itself.
func TestFIPSOnly(t *testing.T) {
	if os.Getenv(fipsChild) != "" {
		fipsOnlyChild(t)
		return
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*testWait)
	defer cancel()
	cmd := exec.CommandContext(ctx, exe, "-test.run=^TestFIPSOnly$", "-test.v")
	cmd.Env = append(os.Environ(), "GODEBUG=fips140=only", fipsChild+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "PASS: TestFIPSOnly") {
		t.Errorf("%v\n%s", err, out)
	}
}

func fipsOnlyChild(t *testing.T) {
	_, s := tcpPair(t)
	if _, err := Server(context.Background(), s, &Config{TLS: testServerTLS(t), Mode: ModeSoftware}); !errors.Is(err, ErrNoSoftware) {
		t.Errorf("mode software: %v", err)
	}
	if ok, _ := kernelPossible(); !ok {
		_, s = tcpPair(t)
		if _, err := Server(context.Background(), s, &Config{TLS: testServerTLS(t)}); !errors.Is(err, ErrNoSoftware) {
			t.Errorf("mode auto without kernel TLS: %v", err)
		}
		return
	}
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		client := testClientTLS(t)
		client.MaxVersion = version
		conn, peer := connect(t, &Config{TLS: testServerTLS(t)}, client)
		_ = peer.SetDeadline(time.Now().Add(testWait))
		if conn.Layer() != LayerKernel {
			t.Errorf("layer %v", conn.Layer())
		}
		exchange(t, conn, peer)
	}
}
