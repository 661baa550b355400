package load

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A server is a TLS echo service whose faults a test can choose.
type server struct {
	addr  string
	roots *x509.CertPool

	// spoil changes what is echoed; at is the offset of p in the
	// connection's stream. An error ends the connection.
	spoil func(c *serverConn, at int, p []byte) ([]byte, error)
	// bye ends a connection after the client's close_notify.
	bye func(c *serverConn)

	swallow   atomic.Int64  // how many bytes each connection drops in all
	swallowed atomic.Int64  // what all connections together have dropped
	frozen    chan struct{} // if not nil, connections wait for it to be closed
}

type serverConn struct {
	*tls.Conn
	tcp *net.TCPConn
}

func startServer(t *testing.T, change func(*server)) *server {
	t.Helper()
	cert, roots := certificate(t)
	s := &server{roots: roots}
	if change != nil {
		change(s)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.addr = ln.Addr().String()
	conf := &tls.Config{Certificates: []tls.Certificate{cert}}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			tcp, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer tcp.Close()
				s.serve(&serverConn{tls.Server(tcp, conf), tcp.(*net.TCPConn)})
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		wg.Wait()
	})
	return s
}

func (s *server) serve(c *serverConn) {
	buf := make([]byte, 4096)
	at := 0
	var swallowed int64
	for {
		n, err := c.Read(buf)
		if n > 0 {
			out := buf[:n]
			if total := s.swallow.Load(); swallowed < total {
				k := min(int64(n), total-swallowed)
				swallowed += k
				s.swallowed.Add(k)
				out = out[k:]
			}
			if s.frozen != nil {
				<-s.frozen
			}
			if s.spoil != nil {
				spoilt, err := s.spoil(c, at, append([]byte(nil), out...))
				if err != nil {
					return
				}
				out = spoilt
			}
			at += n
			if _, err := c.Write(out); err != nil {
				return
			}
		}
		if err != nil {
			if errors.Is(err, io.EOF) && s.bye != nil {
				s.bye(c)
			} else {
				c.Close() // answers close_notify
			}
			return
		}
	}
}

func certificate(t *testing.T) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotAfter:     time.Now().Add(time.Hour),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA:         true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, roots
}

func start(t *testing.T, s *server, change func(*Options)) *Fleet {
	t.Helper()
	o := Options{
		Addr: s.addr, TLS: &tls.Config{RootCAs: s.roots}, Sessions: 5,
		Interval: 2 * time.Millisecond, Seed: 7,
	}
	if change != nil {
		change(&o)
	}
	f, err := Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, f) })
	return f
}

func stop(t *testing.T, f *Fleet) Report {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return f.Stop(ctx)
}

// until waits for the fleet to have seen something.
func until(t *testing.T, f *Fleet, what string, ok func(Report) bool) Report {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	deadline := time.After(10 * time.Second)
	for {
		if r := f.Snapshot(); ok(r) {
			return r
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("after 10 s still not %s: %+v", what, f.Snapshot())
		}
	}
}
