package ktlshttp

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testWait = 20 * time.Second

// certs are a server's configuration and a client's that trusts it.
func certs(t *testing.T) (server, client *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	server = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, NextProtos: []string{ProtoHTTP2, ProtoHTTP1}}
	return server, &tls.Config{RootCAs: pool, ServerName: "localhost"}
}

func bothModes(t *testing.T, f func(t *testing.T, mode ktls.Mode)) {
	t.Run("software", func(t *testing.T) { f(t, ktls.ModeSoftware) })
	t.Run("kernel", func(t *testing.T) {
		guest.NeedKernelTLS(t)
		f(t, ktls.ModeKernel)
	})
}

// stock is a client of crypto/tls alone.
func stock(conf *tls.Config, http2 bool) *http.Transport {
	tr := &http.Transport{TLSClientConfig: conf.Clone(), Protocols: new(http.Protocols)}
	tr.Protocols.SetHTTP1(!http2)
	tr.Protocols.SetHTTP2(http2)
	return tr
}

func serve(t *testing.T, srv *http.Server, start func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- start() }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), testWait)
		defer cancel()
		if err := srv.Shutdown(ctx); err != nil {
			t.Errorf("Shutdown: %v", err)
		}
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("Serve: %v", err)
		}
	})
}

// describe says what a handler sees of its connection, and echoes the body.
func describe(w http.ResponseWriter, r *http.Request) {
	state := "no TLS"
	if r.TLS != nil {
		state = r.TLS.ServerName + " " + r.TLS.NegotiatedProtocol
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	fmt.Fprintf(w, "%s %s %s", r.Proto, state, body)
}

func post(t *testing.T, tr *http.Transport, url string, body []byte) string {
	t.Helper()
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr, Timeout: testWait}).Post(url, "text/plain", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// A server over our sessions speaks HTTP/1.1 and HTTP/2 to stock clients and to ours,
// and handlers see the session in Request.TLS.
func TestServe(t *testing.T) {
	bothModes(t, func(t *testing.T, mode ktls.Mode) {
		server, client := certs(t)
		ln, err := ktls.Listen("tcp4", "127.0.0.1:0", &ktls.Config{TLS: server, Mode: mode})
		if err != nil {
			t.Fatal(err)
		}
		var seen atomic.Value
		srv := &http.Server{Handler: http.HandlerFunc(describe), ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			seen.Store(fmt.Sprintf("%T", c))
			return ctx
		}}
		serve(t, srv, func() error { return Serve(srv, ln) })
		url := "https://" + ln.Addr().String() + "/"
		body := bytes.Repeat([]byte("0123456789"), 10_000)
		ours := &ktls.Dialer{Config: &ktls.Config{TLS: client, Mode: mode}}
		for _, tc := range []struct {
			name string
			tr   *http.Transport
			want string
		}{
			{"stock HTTP/1.1", stock(client, false), "HTTP/1.1 localhost  "}, // it offers no ALPN,
			{"stock HTTP/2", stock(client, true), "HTTP/2.0 localhost h2 "},
			{"our HTTP/1.1", NewTransport(ours, false), "HTTP/1.1 localhost http/1.1 "},
			{"our HTTP/2", NewTransport(ours, true), "HTTP/2.0 localhost h2 "},
		} {
			if got := post(t, tc.tr, url, body); got != tc.want+string(body) {
				t.Errorf("%s: %.60q, expected %q and the body", tc.name, got, tc.want)
			}
			if seen.Load() != "*ktls.Conn" {
				t.Errorf("%s: ConnContext was given a %v", tc.name, seen.Load())
			}
		}
	})
}

// Our transport speaks to stock servers, and says when they lack what was asked for.
func TestTransport(t *testing.T) {
	bothModes(t, func(t *testing.T, mode ktls.Mode) {
		server, client := certs(t)
		start := func(http2 bool) string {
			ln, err := net.Listen("tcp4", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			srv := &http.Server{Handler: http.HandlerFunc(describe), TLSConfig: server.Clone(), Protocols: new(http.Protocols)}
			srv.Protocols.SetHTTP1(true)
			srv.Protocols.SetHTTP2(http2)
			if !http2 {
				srv.TLSConfig.NextProtos = nil // agrees to anything
			}
			serve(t, srv, func() error { return srv.ServeTLS(ln, "", "") })
			return "https://" + ln.Addr().String() + "/"
		}
		d := &ktls.Dialer{Config: &ktls.Config{TLS: client, Mode: mode}}
		both, old := start(true), start(false)
		if got := post(t, NewTransport(d, false), both, []byte("x")); got != "HTTP/1.1 localhost http/1.1 x" {
			t.Errorf("HTTP/1.1: %q", got)
		}
		if got := post(t, NewTransport(d, true), both, []byte("x")); got != "HTTP/2.0 localhost h2 x" {
			t.Errorf("HTTP/2: %q", got)
		}
		if client.NextProtos != nil {
			t.Error("the dialer's configuration was changed")
		}
		tr := NewTransport(d, true)
		defer tr.CloseIdleConnections()
		if resp, err := (&http.Client{Transport: tr, Timeout: testWait}).Get(old); err == nil {
			_ = resp.Body.Close()
			t.Error("HTTP/2 with a server that does not speak it")
		}
	})
}

// Two listeners, one server, and a file.
func TestServeTwice(t *testing.T) {
	server, client := certs(t)
	name := filepath.Join(t.TempDir(), "file")
	content := bytes.Repeat([]byte("content "), 20_000)
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, name) })}
	prepare(srv)
	first := srv.Handler
	prepare(srv)
	if _, twice := first.(withTLS).Handler.(withTLS); twice || srv.Handler.(withTLS).Handler == nil {
		t.Error("prepared twice")
	}
	for range 2 {
		ln, err := ktls.Listen("tcp4", "127.0.0.1:0", &ktls.Config{TLS: server})
		if err != nil {
			t.Fatal(err)
		}
		serve(t, srv, func() error { return Serve(srv, ln) })
		for _, http2 := range []bool{false, true} {
			tr := stock(client, http2)
			resp, err := (&http.Client{Transport: tr, Timeout: testWait}).Get("https://" + ln.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			tr.CloseIdleConnections()
			if err != nil || !bytes.Equal(got, content) {
				t.Errorf("HTTP/2 %v: %d bytes, %v", http2, len(got), err)
			}
		}
	}
}

// NewTransport replaces NextProtos, and nothing else of what its dialer's Config says.
func TestTransportKeepsConfig(t *testing.T) {
	got := withProto(&ktls.Config{
		Mode: ktls.ModeSoftware, RequireRekey: true, HandshakeTimeout: time.Minute,
		Established:      func(tls.ConnectionState) error { return nil },
		OnHandshakeError: func(error) {},
	}, ProtoHTTP2)
	v := reflect.ValueOf(got).Elem()
	for _, f := range reflect.VisibleFields(v.Type()) {
		if f.IsExported() && v.FieldByIndex(f.Index).IsZero() {
			t.Errorf("%s was lost", f.Name)
		}
	}
}
