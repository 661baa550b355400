package e2e

import (
	"crypto/tls"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
)

// slowConn holds back everything after the first flight of a handshake.
type slowConn struct {
	net.Conn
	first bool
	said  chan struct{} // closed when the server has answered the first flight
	once  sync.Once
	rest  chan struct{} // closed when the rest may go
}

func (c *slowConn) Write(p []byte) (int, error) {
	if c.first {
		<-c.rest
		return c.Conn.Write(p)
	}
	c.first = true
	return c.Conn.Write(p)
}

func (c *slowConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.once.Do(func() { close(c.said) })
	return n, err
}

// A handshake that is in progress while the supervisor is replaced ends in the old
// one, and its session is served by the new one. Until then a further replacement is
// refused, with the reason.
func TestHandshakeInProgressIsHandedOver(t *testing.T) {
	for name, version := range map[string]uint16{"TLS 1.3": tls.VersionTLS13, "TLS 1.2": tls.VersionTLS12} {
		t.Run(name, func(t *testing.T) {
			u := start(t, visor.Options{})
			raw, err := net.DialTimeout("tcp", u.Addr, patience)
			if err != nil {
				t.Fatal(err)
			}
			slow := &slowConn{Conn: raw, said: make(chan struct{}), rest: make(chan struct{})}
			cfg := insecure()
			cfg.MaxVersion = version
			c := tls.Client(slow, cfg)
			defer func() { _ = c.Close() }()
			done := make(chan error, 1)
			go func() { done <- c.Handshake() }()
			<-slow.said
			before := u.status().Supervisor.PID
			u.run(0, "upgrade", "--supervisor")
			if r := u.run(1, "upgrade", "--supervisor"); !strings.Contains(r.Stdout+r.Stderr, "still finishing handshakes") {
				t.Errorf("a further replacement: %s", r)
			}
			close(slow.rest)
			if err := <-done; err != nil {
				t.Fatalf("the handshake that the old supervisor (pid %d) finishes: %v", before, err)
			}
			_ = c.SetDeadline(time.Now().Add(patience))
			for range 3 {
				if _, err := io.WriteString(c, "hello"); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, 5)
				if _, err := io.ReadFull(c, got); err != nil || string(got) != "hello" {
					t.Fatalf("echo %q, %v", got, err)
				}
				u.run(0, "upgrade")
			}
			st := u.await("one session", func(st *admin.Status) bool { return st.Sessions.Total == 1 })
			if st.Supervisor.PID == before {
				t.Error("the supervisor was not replaced")
			}
		})
	}
}
