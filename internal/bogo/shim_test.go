package bogo

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// wait bounds everything in these tests.
const wait = 20 * time.Second

// peer is a crypto/tls peer that a shim connects to, as it would to the runner.
type peer struct {
	t        *testing.T
	listener *net.TCPListener
	tls      *tls.Config
	flags    []string // certificate
	server   bool     // the shim's role
}

func newPeer(t *testing.T, network, host string, server bool) *peer {
	t.Helper()
	l, err := net.Listen(network, net.JoinHostPort(host, "0"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	p := &peer{t: t, listener: l.(*net.TCPListener), server: server}
	_ = p.listener.SetDeadline(time.Now().Add(wait))

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: defaultName}, DNSNames: []string{defaultName},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert"), filepath.Join(dir, "key")
	if err := errors.Join(os.WriteFile(certFile, certPEM, 0o600), os.WriteFile(keyFile, keyPEM, 0o600)); err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(certPEM)
	p.tls = &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: roots, ServerName: defaultName,
		ClientSessionCache: tls.NewLRUClientSessionCache(1), NextProtos: []string{"foo"}}
	if server {
		p.flags = []string{"-server", "-cert-file", certFile, "-key-file", keyFile}
	} else {
		p.flags = []string{"-trust-cert", certFile}
	}
	return p
}

// shim is a running shim.
type shim struct {
	cmd    *exec.Cmd
	stderr bytes.Buffer
}

const shimID = 0x0102030405060708

func (p *peer) start(flags ...string) *shim {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	p.t.Cleanup(cancel)
	_, port, _ := net.SplitHostPort(p.listener.Addr().String())
	s := runShim(ctx, p.t, append(append([]string{"-port", port, "-shim-id", fmt.Sprint(uint64(shimID))}, p.flags...), flags...)...)
	if err := s.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	return s
}

func runShim(ctx context.Context, t *testing.T, args ...string) *shim {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := &shim{cmd: exec.CommandContext(ctx, exe, args...)}
	s.cmd.Env = append(os.Environ(), roleVar+"="+roleShim, "GORACE=atexit_sleep_ms=0")
	s.cmd.Stderr = &s.stderr
	return s
}

// exit waits for the shim and returns its code and what it said.
func (s *shim) exit() (int, string) {
	_ = s.cmd.Wait()
	return s.cmd.ProcessState.ExitCode(), s.stderr.String()
}

// accept takes the shim's next connection as far as the end of the handshake.
func (p *peer) accept() (*tls.Conn, net.Conn) {
	p.t.Helper()
	c, err := p.listener.Accept()
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(wait))
	var id [8]byte
	if _, err := io.ReadFull(c, id[:]); err != nil || binary.LittleEndian.Uint64(id[:]) != shimID {
		p.t.Fatalf("shim id %x, %v", id, err)
	}
	tc := tls.Server(c, p.tls)
	if p.server {
		tc = tls.Client(c, p.tls)
	}
	if err := tc.Handshake(); err != nil {
		p.t.Fatal(err)
	}
	return tc, c
}

// echo expects everything back with every bit flipped.
func (p *peer) echo(c *tls.Conn, n int) {
	p.t.Helper()
	sent := make([]byte, n)
	_, _ = rand.Read(sent)
	done := make(chan error, 1)
	go func() {
		_, err := c.Write(sent)
		done <- err
	}()
	got := make([]byte, n)
	if _, err := io.ReadFull(c, got); err != nil {
		p.t.Fatal(err)
	}
	for i := range got {
		if got[i] != sent[i]^0xff {
			p.t.Fatalf("byte %d of %d came back wrong", i, n)
		}
	}
	if err := <-done; err != nil {
		p.t.Fatal(err)
	}
}

func (p *peer) wantExit(s *shim, code int, says string) {
	p.t.Helper()
	got, said := s.exit()
	if got != code || !strings.Contains(said, says) || code == 0 && said != "" {
		p.t.Errorf("exit code %d, said %q; expected %d and %q", got, said, code, says)
	}
}

// The basic exchange, in both roles, both versions and both layers.
func TestShimEchoes(t *testing.T) {
	for _, layer := range []string{"software", "kernel"} {
		if layer == "software" && guest.InGuest() {
			continue // the same as on the host, but emulated
		}
		for _, server := range []bool{false, true} {
			for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
				for _, flags := range []string{"", "-async", "-ktls-move", "-peek-then-read", "-read-size 7"} {
					name := fmt.Sprintf("%s/server=%t/%s/%s", layer, server, tls.VersionName(version), flags)
					t.Run(name, func(t *testing.T) {
						if layer == "kernel" {
							guest.NeedKernelTLS(t)
						}
						p := newPeer(t, "tcp4", "127.0.0.1", server)
						p.tls.MaxVersion = version
						s := p.start(append(strings.Fields(flags), "-ktls-mode", layer, "-check-close-notify", "-expect-version", fmt.Sprint(version))...)
						c, _ := p.accept()
						p.echo(c, 5000)
						p.echo(c, 1)
						if err := c.CloseWrite(); err != nil {
							t.Fatal(err)
						}
						if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
							t.Errorf("no close_notify came back: %v", err)
						}
						_ = c.Close()
						p.wantExit(s, exitOK, "")
					})
				}
			}
		}
	}
}

func TestShimIPv6(t *testing.T) {
	l, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Logf("no ::1 here (%v): the flag is only parsed", err)
		if c, err := parse([]string{"-ipv6"}); err != nil || len(c.all) != 1 {
			t.Fatal(c, err)
		}
		return
	}
	_ = l.Close()
	p := newPeer(t, "tcp6", "::1", false)
	s := p.start("-ipv6")
	c, _ := p.accept()
	p.echo(c, 32)
	_ = c.Close()
	p.wantExit(s, exitOK, "")
}

// Two connections of which the second resumes the first: in TLS 1.3 in both roles,
// in TLS 1.2 in none.
func TestShimResumes(t *testing.T) {
	for _, server := range []bool{false, true} {
		for version, want := range map[uint16]bool{tls.VersionTLS12: false, tls.VersionTLS13: true} {
			p := newPeer(t, "tcp4", "127.0.0.1", server)
			p.tls.MaxVersion = version
			s := p.start("-resume-count", "1", "-shim-writes-first")
			for i := range 2 {
				c, _ := p.accept()
				hello := make([]byte, len(firstWrite))
				if _, err := io.ReadFull(c, hello); err != nil || string(hello) != firstWrite {
					t.Fatalf("%q, %v", hello, err)
				}
				p.echo(c, 32)
				if got := c.ConnectionState().DidResume; got != (want && i == 1) {
					t.Errorf("server=%t %s: connection %d resumed: %t", server, tls.VersionName(version), i, got)
				}
				_ = c.Close()
			}
			p.wantExit(s, exitOK, "")
		}
	}
}

// How sessions end.
func TestShimEnds(t *testing.T) {
	for _, tc := range []struct {
		name  string
		flags string
		do    func(t *testing.T, c *tls.Conn, raw net.Conn)
		code  int
		says  string
	}{
		{"FIN only, nobody looks", "", func(_ *testing.T, _ *tls.Conn, raw net.Conn) { _ = raw.Close() }, exitOK, ""},
		{"FIN only", "-check-close-notify", func(_ *testing.T, _ *tls.Conn, raw net.Conn) { _ = raw.Close() },
			exitFailed, "connection ended without close_notify"},
		{"a record that nobody sealed", "", func(_ *testing.T, _ *tls.Conn, raw net.Conn) {
			_, _ = raw.Write(append([]byte{23, 3, 3, 0, 32}, make([]byte, 32)...))
		}, exitFailed, "session ended with alert bad_record_mac"},
		{"the shim shuts down", "-shim-shuts-down -check-close-notify", func(t *testing.T, c *tls.Conn, _ net.Conn) {
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
				t.Error(err)
			}
			_ = c.Close()
		}, exitOK, ""},
		{"data after that", "-shim-shuts-down -check-close-notify", func(_ *testing.T, c *tls.Conn, _ net.Conn) { _, _ = c.Write([]byte("x")) },
			exitFailed, errDataOnShutdown.Error()},
		{"an alert of the shim's", "-send-alert", func(t *testing.T, c *tls.Conn, _ net.Conn) {
			if _, err := c.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "decompression failure") {
				t.Errorf("the peer read: %v", err)
			}
			_ = c.Close()
		}, exitOK, ""},
		{"key updates", "-key-update", func(t *testing.T, c *tls.Conn, _ net.Conn) {
			(&peer{t: t}).echo(c, 3000)
			_ = c.Close()
		}, exitOK, ""},
		{"another version than expected", "-expect-version 771", func(_ *testing.T, c *tls.Conn, _ net.Conn) { _, _ = c.Read(make([]byte, 1)) },
			exitFailed, "negotiated version 0x0304, expected 0x0303"},
		{"another protocol than expected", "-advertise-alpn \x03foo -expect-alpn bar", func(_ *testing.T, c *tls.Conn, _ net.Conn) { _, _ = c.Read(make([]byte, 1)) },
			exitFailed, `negotiated protocol "foo"`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPeer(t, "tcp4", "127.0.0.1", false)
			s := p.start(strings.Fields(tc.flags)...)
			c, raw := p.accept()
			tc.do(t, c, raw)
			_ = raw.Close()
			p.wantExit(s, tc.code, tc.says)
		})
	}
}

// The runner compares these with its own.
func TestShimExports(t *testing.T) {
	for _, server := range []bool{false, true} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			p := newPeer(t, "tcp4", "127.0.0.1", server)
			p.tls.MaxVersion = version
			s := p.start("-export-keying-material", "40", "-export-label", "label", "-export-context", "context", "-use-export-context")
			c, _ := p.accept()
			got := make([]byte, 40)
			if _, err := io.ReadFull(c, got); err != nil {
				t.Fatal(err)
			}
			cs := c.ConnectionState()
			want, err := cs.ExportKeyingMaterial("label", []byte("context"), 40)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("server=%t %s: %x, want %x, %v", server, tls.VersionName(version), got, want, err)
			}
			_ = c.Close()
			p.wantExit(s, exitOK, "")
		}
		p := newPeer(t, "tcp4", "127.0.0.1", server)
		var secrets trafficSecrets
		p.tls.KeyLogWriter = &secrets
		s := p.start("-export-traffic-secrets")
		c, _ := p.accept()
		head := make([]byte, 2)
		if _, err := io.ReadFull(c, head); err != nil {
			t.Fatal(err)
		}
		n := int(binary.LittleEndian.Uint16(head))
		both := make([]byte, 2*n)
		if _, err := io.ReadFull(c, both); err != nil {
			t.Fatal(err)
		}
		read, write := secrets.server, secrets.client
		if server {
			read, write = write, read
		}
		if !bytes.Equal(both, append(bytes.Clone(read), write...)) {
			t.Errorf("server=%t: traffic secrets differ", server)
		}
		_ = c.Close()
		p.wantExit(s, exitOK, "")
	}
}
