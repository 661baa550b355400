package ktls

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// opensslServer is `openssl s_server`, which sends back every line reversed.
func opensslServer(t *testing.T, args ...string) (addr string) {
	t.Helper()
	openssl := needProgram(t, "openssl", "openssl")
	p := testPKIOf(t)
	key, err := x509.MarshalPKCS8PrivateKey(p.ecdsa.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	var b []byte
	for _, der := range p.ecdsa.Certificate {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	b = append(b, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})...)
	file := filepath.Join(t.TempDir(), "server.pem")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	c := startClient(t, openssl, append([]string{"s_server", "-accept", "127.0.0.1:0", "-cert", file, "-rev"}, args...)...)
	for {
		line, err := c.out.ReadString('\n')
		if err != nil {
			t.Fatalf("s_server: %v\n%s", err, c.log.String())
		}
		if at, ok := strings.CutPrefix(line, "ACCEPT "); ok {
			return strings.TrimSpace(at)
		}
	}
}

// The client role against OpenSSL: every suite, moved after every line, and TLS 1.3
// resumed from the tickets of the sessions before.
func TestHostOpenSSLServer(t *testing.T) {
	for _, tc := range testSuites {
		t.Run(suiteTestName(tc.version, tc.suite), func(t *testing.T) {
			args := []string{"-tls1_3", "-ciphersuites", tls.CipherSuiteName(tc.suite)}
			if tc.version == tls.VersionTLS12 {
				args = []string{"-tls1_2"}
			}
			addr := opensslServer(t, args...)
			conf := testClientTLS(t)
			conf.NextProtos, conf.ClientSessionCache = nil, tls.NewLRUClientSessionCache(4)
			if tc.version == tls.VersionTLS12 {
				conf.CipherSuites = []uint16{tc.suite}
			}
			for i := range 3 {
				c, err := Dial("tcp4", addr, &Config{TLS: conf, Mode: ModeSoftware})
				if err != nil {
					t.Fatal(err)
				}
				want := i > 0 && tc.version == tls.VersionTLS13
				if cs := c.ConnectionState(); cs.CipherSuite != tc.suite || cs.DidResume != want {
					t.Errorf("connection %d: suite %s, resumed %v, expected %v", i, tls.CipherSuiteName(cs.CipherSuite), cs.DidResume, want)
				}
				for range 3 {
					_ = c.SetDeadline(time.Now().Add(testWait))
					if _, err := io.WriteString(c, "abc\n"); err != nil {
						t.Fatal(err)
					}
					line, err := bufio.NewReader(io.LimitReader(c, 4)).ReadString('\n')
					if err != nil || line != "cba\n" {
						t.Fatalf("connection %d: %q, %v", i, line, err)
					}
					c = move(t, c)
				}
				if err := c.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}
