// Package ktlshttp makes net/http speak over sessions of package ktls, HTTP/2
// included.
//
// For HTTP/1.1 nothing is needed: http.Server.Serve over ktls.Listen sets Request.TLS
// and sends files by sendfile, and http.Transport takes a ktls.Dialer as its
// DialTLSContext. But net/http chooses HTTP/2 only where the connection is a
// *tls.Conn; elsewhere it knows HTTP/2 as "unencrypted" and leaves TLS to others. This
// package puts the two together.
package ktlshttp

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"slices"

	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// ALPN names (RFC 7301).
const (
	ProtoHTTP1 = "http/1.1"
	ProtoHTTP2 = "h2"
)

// Serve is srv.Serve for a listener of ktls.Listen or ktls.NewListener. Sessions that
// negotiated "h2" get HTTP/2, all others HTTP/1.1: whether HTTP/2 is on is said by the
// NextProtos of the listener's tls.Config, "h2" and "http/1.1". Request.TLS is set in
// both. Shutdown and Close of srv work as ever.
//
// It changes srv's Handler, ConnContext and Protocols, once, so srv must not be serving
// already; the second and further listeners of one srv get Serve too.
func Serve(srv *http.Server, l net.Listener) error {
	prepare(srv)
	return srv.Serve(listener{l})
}

func prepare(srv *http.Server) {
	if _, ok := srv.Handler.(withTLS); ok {
		return
	}
	next := srv.Handler
	if next == nil {
		next = http.DefaultServeMux
	}
	srv.Handler = withTLS{next}
	srv.Protocols = serverProtocols(srv.Protocols)
	theirs := srv.ConnContext
	srv.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		if h, ok := c.(h2Conn); ok {
			ctx, c = context.WithValue(ctx, stateKey{}, h.session), h.session
		}
		if theirs != nil {
			ctx = theirs(ctx, c)
		}
		return ctx
	}
}

// serverProtocols is what srv speaks plus HTTP/2 without a tls.Conn.
func serverProtocols(p *http.Protocols) *http.Protocols {
	var q http.Protocols
	if p != nil {
		q = *p
	} else {
		q.SetHTTP1(true)
	}
	q.SetUnencryptedHTTP2(true)
	return &q
}

type stateKey struct{}

// withTLS sets Request.TLS for requests of HTTP/2: net/http takes their connection for
// an unencrypted one.
type withTLS struct{ http.Handler }

func (h withTLS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.TLS == nil {
		if s, ok := r.Context().Value(stateKey{}).(session); ok {
			cs := s.ConnectionState()
			r.TLS = &cs
		}
	}
	h.Handler.ServeHTTP(w, r)
}

// session is what is needed of a *ktls.Conn, so that wrappers of one pass too.
type session interface {
	net.Conn
	ConnectionState() tls.ConnectionState
}

type listener struct{ net.Listener }

func (l listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	if s, ok := c.(session); ok && s.ConnectionState().NegotiatedProtocol == ProtoHTTP2 {
		return h2Conn{Conn: c, session: s}, nil
	}
	return c, nil
}

// h2Conn hides ConnectionState, by which net/http would know that this is TLS and
// speak HTTP/1.1.
type h2Conn struct {
	net.Conn
	session session
}

// NewTransport returns a client that makes its connections with d, for "https" URLs:
// HTTP/2 only if http2 is set, HTTP/1.1 only if not, because net/http cannot be told
// after the handshake which of them was negotiated. A server that does not speak what
// is asked for fails the request. d is not changed: its Config's NextProtos are
// replaced in a copy. The rest of the transport has http.DefaultTransport's limits, and
// its proxy settings do not apply.
//
// With HTTP/1.1 Response.TLS is nil; net/http sets it for a *tls.Conn only.
func NewTransport(d *ktls.Dialer, http2 bool) *http.Transport {
	proto := ProtoHTTP1
	if http2 {
		proto = ProtoHTTP2
	}
	own := &ktls.Dialer{NetDialer: d.NetDialer, Config: withProto(d.Config, proto)}
	t := &http.Transport{Protocols: new(http.Protocols)}
	if def, ok := http.DefaultTransport.(*http.Transport); ok {
		t.MaxIdleConns, t.IdleConnTimeout = def.MaxIdleConns, def.IdleConnTimeout
		t.ExpectContinueTimeout = def.ExpectContinueTimeout
	}
	t.Protocols.SetHTTP1(!http2)
	t.Protocols.SetUnencryptedHTTP2(http2)
	t.DialTLSContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := own.DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		if s, ok := c.(session); http2 && (!ok || s.ConnectionState().NegotiatedProtocol != ProtoHTTP2) {
			_ = c.Close()
			return nil, &net.OpError{Op: "dial", Net: network, Addr: c.RemoteAddr(), Err: errNoHTTP2}
		}
		return c, nil
	}
	return t
}

type constError string

func (e constError) Error() string { return string(e) }

const errNoHTTP2 constError = "the server does not speak HTTP/2"

// withProto copies c with other NextProtos.
func withProto(c *ktls.Config, proto string) *ktls.Config {
	if c == nil {
		c = new(ktls.Config)
	}
	conf := c.TLS
	if conf == nil {
		conf = new(tls.Config)
	}
	if !slices.Equal(conf.NextProtos, []string{proto}) {
		conf = conf.Clone()
		conf.NextProtos = []string{proto}
	}
	return &ktls.Config{
		TLS: conf, Mode: c.Mode, RequireRekey: c.RequireRekey, HandshakeTimeout: c.HandshakeTimeout,
		Established: c.Established, OnHandshakeError: c.OnHandshakeError,
	}
}
