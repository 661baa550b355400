package ktls

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/testlog"
)

// Real clients of other make. Guests have none, so these run on the host.

// needProgram finds a program, or skips; in CI (CI=true) it must be there.
func needProgram(t *testing.T, name, pkg string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err == nil {
		return path
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("%s is missing; install the package %s", name, pkg)
	}
	t.Skipf("%s is missing; install the package %s", name, pkg)
	return ""
}

// client is a program that talks to a line echo server over its stdin and stdout.
type client struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
	log testlog.Buffer // its stderr
}

// waitLog waits until the program has said text n times on its stderr.
func (c *client) waitLog(text string, n int) {
	c.t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(testWait); time.Now().Before(end); <-tick.C {
		if strings.Count(c.log.String(), text) >= n {
			return
		}
	}
	c.t.Fatalf("no %d times %q on stderr:\n%s", n, text, c.log.String())
}

func startClient(t *testing.T, name string, args ...string) *client {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testWait)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, name, args...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c := &client{t: t, cmd: cmd, in: in, out: bufio.NewReader(out)}
	cmd.Stderr = &c.log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = in.Close(); cancel(); _ = cmd.Wait() })
	return c
}

// say writes a line and waits until it comes back, skipping what the program
// itself prints.
func (c *client) say(line string) {
	c.t.Helper()
	c.type_(line)
	for {
		got, err := c.out.ReadString('\n')
		if err != nil {
			c.t.Fatalf("%q did not come back: %v\n%s", line, err, c.log.String())
		}
		if strings.TrimRight(got, "\r\n") == line {
			return
		}
	}
}

func (c *client) type_(line string) {
	c.t.Helper()
	if _, err := io.WriteString(c.in, line+"\n"); err != nil {
		c.t.Fatal(err)
	}
}

// caFile writes the test CA where a program can read it.
func caFile(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ca.pem")
	b := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: testPKIOf(t).ecdsa.Certificate[1]})
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// echoServer accepts n sessions one after the other, echoes, and moves each after
// every message. It reports how each ended.
func echoServer(t *testing.T, cfg *Config, n int) (addr string, states <-chan tls.ConnectionState, ends <-chan error) {
	t.Helper()
	ln := listenTCP(t)
	st, end := make(chan tls.ConnectionState, n), make(chan error, n)
	go func() {
		defer close(end)
		for range n {
			s, err := ln.AcceptTCP()
			if err != nil {
				end <- err
				return
			}
			conn, err := Server(context.Background(), s, cfg)
			if err != nil {
				end <- err
				continue
			}
			st <- conn.ConnectionState()
			end <- echo(t, conn)
		}
	}()
	return ln.Addr().String(), st, end
}

func echo(t *testing.T, conn *Conn) error {
	defer func() { _ = conn.Close() }()
	buf := make([]byte, 1000)
	for {
		_ = conn.SetDeadline(time.Now().Add(testWait))
		n, err := conn.Read(buf)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := conn.Write(buf[:n]); err != nil {
			return err
		}
		conn = move(t, conn)
	}
}

// OpenSSL with every suite, both versions, KeyUpdates both ways.
func TestHostOpenSSL(t *testing.T) {
	openssl := needProgram(t, "openssl", "openssl")
	ca := caFile(t)
	for _, tc := range []struct {
		suite string
		args  []string
		id    uint16
	}{
		{"TLS_AES_128_GCM_SHA256", []string{"-tls1_3", "-ciphersuites"}, tls.TLS_AES_128_GCM_SHA256},
		{"TLS_AES_256_GCM_SHA384", []string{"-tls1_3", "-ciphersuites"}, tls.TLS_AES_256_GCM_SHA384},
		{"TLS_CHACHA20_POLY1305_SHA256", []string{"-tls1_3", "-ciphersuites"}, tls.TLS_CHACHA20_POLY1305_SHA256},
		{"ECDHE-ECDSA-AES128-GCM-SHA256", []string{"-tls1_2", "-cipher"}, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256},
		{"ECDHE-RSA-AES256-GCM-SHA384", []string{"-tls1_2", "-cipher"}, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384},
		{"ECDHE-ECDSA-CHACHA20-POLY1305", []string{"-tls1_2", "-cipher"}, tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256},
	} {
		t.Run(tc.suite, func(t *testing.T) {
			addr, states, ends := echoServer(t, &Config{TLS: testServerBoth(t), Mode: ModeSoftware}, 1)
			c := startClient(t, openssl, append([]string{"s_client", "-connect", addr, "-servername", "localhost",
				"-CAfile", ca, "-verify_return_error"}, append(tc.args, tc.suite)...)...)
			c.say("one line")
			if cs := <-states; cs.CipherSuite != tc.id {
				t.Errorf("suite %s", tls.CipherSuiteName(cs.CipherSuite))
			}
			if tc.args[0] == "-tls1_3" {
				for i, command := range []string{"K", "k", "K"} { // asking for ours too, or not
					c.type_(command)
					c.waitLog("KEYUPDATE", i+1) // it drops what it reads together with a command
					c.say("after KeyUpdate " + string(rune('1'+i)))
				}
				c.type_("Q")
				if err := <-ends; err != nil {
					t.Errorf("session ended with %v", err)
				}
				return
			}
			// Renegotiation is refused with a warning, and it is OpenSSL that gives up.
			c.type_("R")
			var alert *AlertError
			if err := <-ends; !errors.As(err, &alert) || alert.Sent || alert.Alert != 40 {
				t.Errorf("session ended with %v", err)
			}
		})
	}
}

// A session of TLS 1.3 that OpenSSL saved is resumed.
func TestHostOpenSSLResumes(t *testing.T) {
	openssl := needProgram(t, "openssl", "openssl")
	ca, sess := caFile(t), filepath.Join(t.TempDir(), "session.pem")
	addr, states, ends := echoServer(t, &Config{TLS: testServerTLS(t), Mode: ModeSoftware}, 2)
	for i, args := range [][]string{{"-sess_out", sess}, {"-sess_in", sess}} {
		c := startClient(t, openssl, append([]string{"s_client", "-connect", addr, "-servername", "localhost",
			"-CAfile", ca, "-tls1_3"}, args...)...)
		c.say("hello")
		if cs := <-states; cs.DidResume != (i == 1) {
			t.Errorf("connection %d: resumed %v", i, cs.DidResume)
		}
		c.type_("Q")
		if err := <-ends; err != nil {
			t.Error(err)
		}
		_ = c.cmd.Wait()
	}
}

// GnuTLS, with its own way to change keys.
func TestHostGnuTLS(t *testing.T) {
	gnutls := needProgram(t, "gnutls-cli", "gnutls-bin")
	ca := caFile(t)
	for _, version := range []string{"1.2", "1.3"} {
		t.Run(version, func(t *testing.T) {
			addr, states, ends := echoServer(t, &Config{TLS: testServerTLS(t), Mode: ModeSoftware}, 1)
			host, port, _ := strings.Cut(addr, ":")
			c := startClient(t, gnutls, "--inline-commands", "--x509cafile", ca, "--verify-hostname=localhost",
				"--sni-hostname=localhost", "--priority", "NORMAL:-VERS-ALL:+VERS-TLS"+version, "-p", port, host)
			c.say("one line")
			if cs := <-states; tls.VersionName(cs.Version) != "TLS "+version {
				t.Errorf("version %s", tls.VersionName(cs.Version))
			}
			if version == "1.3" {
				c.type_("^rekey^")
				c.say("after rekey")
				c.type_("^rekey1^")
				c.say("after the second")
			}
			_ = c.in.Close()
			if err := <-ends; err != nil {
				t.Errorf("session ended with %v", err)
			}
		})
	}
}
