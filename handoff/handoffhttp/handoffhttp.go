// Package handoffhttp serves HTTP over sessions that move between processes: an
// http.Server, with handlers as they are, becomes a handoff.Handler, for a worker of
// ktlsvisor and for a handoff.Upgrader alike.
//
//	srv := &http.Server{Handler: mux, IdleTimeout: time.Minute}
//	err := handoff.Serve(ctx, handoffhttp.New(srv))
//
// HTTP/1.1: a connection moves between two requests, also with the first bytes of the
// next one already read. A request in flight is finished first, and the next process
// answers the next request on the same connection; Request.TLS is the same there. A
// handler that takes longer than the upgrade waits keeps its connection in the old process
// until it is done.
//
// HTTP/2: what both ends know of the connection (header compression, streams, windows) is
// inside of net/http and cannot be taken out. When such a connection is to move the client
// is told GOAWAY instead: it opens a connection to the new process for its next request,
// and the old one is closed when its requests have been answered. Leave "h2" out of the
// NextProtos of connections that must not be closed.
//
// WebSocket and other protocols that begin with an HTTP request: a connection that was
// hijacked stays until it is closed, unless a handoff.Handler takes it over: see Takeover.
package handoffhttp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/ktlsvisor/ktlsvisor/handoff"
	"github.com/ktlsvisor/ktlsvisor/ktls/ktlshttp"
)

// Option changes what New makes.
type Option func(*server)

// WithTakeover names a handler that Takeover can give connections to. The name goes
// along with the connection, so it must mean the same in the next process. It has 1 to 255
// bytes.
func WithTakeover(name string, h handoff.Handler) Option {
	return func(s *server) { s.takeovers[name] = h }
}

// New makes a handler of an http.Server. HTTP/2 is spoken where it was negotiated, by
// NextProtos of the listener's configuration. srv is used from the first session on: its
// Handler, ConnState, ConnContext and Protocols are replaced by ones that call what was
// there, so it must not serve anything else. ConnState and ConnContext are given
// connections of this package; one that moves away counts as closed. Timeouts of srv
// apply; that of an idle connection begins anew when it has moved. srv.Shutdown ends the
// sessions.
func New(srv *http.Server, opts ...Option) handoff.Handler {
	s := &server{srv: srv, ln: newListener(), takeovers: map[string]handoff.Handler{}}
	for _, f := range opts {
		f(s)
	}
	return s
}

type server struct {
	srv       *http.Server
	ln        *listener
	takeovers map[string]handoff.Handler

	once   sync.Once
	h2     http.Server // what HTTP/2 connections get a copy of; never serves itself
	parent context.Context
	down   context.CancelFunc
}

// begin has srv serve what comes, until it is shut down.
func (s *server) begin() {
	srv := s.srv
	s.h2 = http.Server{
		Handler: srv.Handler, DisableGeneralOptionsHandler: srv.DisableGeneralOptionsHandler,
		ReadTimeout: srv.ReadTimeout, ReadHeaderTimeout: srv.ReadHeaderTimeout, WriteTimeout: srv.WriteTimeout,
		IdleTimeout: srv.IdleTimeout, MaxHeaderBytes: srv.MaxHeaderBytes, ConnState: srv.ConnState, ErrorLog: srv.ErrorLog,
		BaseContext: srv.BaseContext, ConnContext: srv.ConnContext, HTTP2: srv.HTTP2, Protocols: srv.Protocols,
	}
	s.parent, s.down = context.WithCancel(context.Background())
	theirs := srv.ConnState
	srv.ConnState = func(c net.Conn, st http.ConnState) {
		if c, ok := c.(*conn); ok && st == http.StateIdle {
			c.idle()
		}
		if theirs != nil {
			theirs(c, st)
		}
	}
	go func() {
		_ = ktlshttp.Serve(srv, s.ln) // http.ErrServerClosed: the application shut it down
		_ = s.ln.Close()
		s.down()
	}()
}

// Serve serves one session.
func (s *server) Serve(ctx context.Context, c *handoff.Conn) error {
	s.once.Do(s.begin)
	if name, app, ok := unwrapState(c.State()); ok {
		c.SetState(app)
		return s.takeover(ctx, c, name)
	}
	if c.ConnectionState().NegotiatedProtocol == ktlshttp.ProtoHTTP2 {
		return s.serveHTTP2(c)
	}
	hc := newConn(c, s.idleTimeout())
	if !s.ln.give(hc) {
		return http.ErrServerClosed
	}
	<-hc.done
	switch {
	case hc.name != "":
		return s.takeover(ctx, c, hc.name)
	case hc.moving:
		return handoff.ErrMoving
	}
	return nil
}

// serveHTTP2 serves a session in place, with a server of its own that can be told to end
// this one connection.
func (s *server) serveHTTP2(c *handoff.Conn) error {
	defer c.Hold()()
	srv := &http.Server{
		Handler: s.h2.Handler, DisableGeneralOptionsHandler: s.h2.DisableGeneralOptionsHandler,
		ReadTimeout: s.h2.ReadTimeout, ReadHeaderTimeout: s.h2.ReadHeaderTimeout, WriteTimeout: s.h2.WriteTimeout,
		IdleTimeout: s.h2.IdleTimeout, MaxHeaderBytes: s.h2.MaxHeaderBytes, ConnState: s.h2.ConnState, ErrorLog: s.h2.ErrorLog,
		BaseContext: s.h2.BaseContext, ConnContext: s.h2.ConnContext, HTTP2: s.h2.HTTP2, Protocols: s.h2.Protocols,
	}
	hc := &whole{Conn: c, done: make(chan struct{})}
	known := make(chan struct{})
	var once sync.Once
	srv.ConnState = func(nc net.Conn, st http.ConnState) {
		if st == http.StateActive || st == http.StateIdle {
			once.Do(func() { close(known) })
		}
		if s.h2.ConnState != nil {
			s.h2.ConnState(hc, st)
		}
	}
	ln := newListener()
	served := make(chan struct{})
	var failed error
	go func() {
		defer close(served)
		failed = ktlshttp.Serve(srv, ln)
		_ = ln.Close()
	}()
	if !ln.give(hc) {
		<-served
		return fmt.Errorf("session %d: HTTP/2 cannot be served: %w", c.ID(), failed)
	}
	ended, cancel := context.WithCancel(context.Background())
	select {
	case <-hc.done:
	case <-c.Moving():
	case <-s.parent.Done():
	}
	hc.awaitFirst(known)
	down := make(chan struct{})
	go func() {
		defer close(down)
		_ = srv.Shutdown(ended) // GOAWAY; waits for the requests
	}()
	<-hc.done
	cancel()
	<-down
	_ = ln.Close()
	<-served
	return nil
}

// firstTime is how long net/http gives a connection of which it has read nothing when it
// is shut down.
const firstTime = 5 * time.Second

// awaitFirst waits until the client has begun to speak, or closes the connection if it
// does not. Shutdown tells GOAWAY to the connections that HTTP/2 knows by then, and to
// none that comes later; one that net/http had not even seen it would not wait for.
func (c *whole) awaitFirst(known <-chan struct{}) {
	t := time.NewTimer(firstTime)
	defer t.Stop()
	select {
	case <-known:
	case <-c.done:
	case <-t.C:
		_ = c.Close()
	}
}

// whole is the connection of a session that stays here.
type whole struct {
	*handoff.Conn
	once sync.Once
	done chan struct{}
}

// Close lets the session's handler return, which ends the session.
func (c *whole) Close() error {
	c.once.Do(func() { close(c.done) })
	return nil
}

// listener gives net/http connections that were accepted long ago.
type listener struct {
	conns chan net.Conn
	once  sync.Once
	ended chan struct{}
}

func newListener() *listener {
	return &listener{conns: make(chan net.Conn), ended: make(chan struct{})}
}

// give reports whether somebody has taken c; else it is still the caller's.
func (l *listener) give(c net.Conn) bool {
	select {
	case l.conns <- c:
		return true
	case <-l.ended:
		return false
	}
}

// Accept returns the next session.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.ended:
		return nil, net.ErrClosed
	}
}

// Close ends Accept.
func (l *listener) Close() error {
	l.once.Do(func() { close(l.ended) })
	return nil
}

// Addr is that of no socket: each session has its own.
func (l *listener) Addr() net.Addr { return &net.TCPAddr{} }

// ErrNotOurs is a request that is not served by a handler of New, or not by HTTP/1.1.
var ErrNotOurs = errors.New("the request's connection is not a session that can be taken over")

// Takeover ends HTTP on the connection of an HTTP/1.1 request and leaves the session to
// the handler that WithTakeover gave this name, from the next byte on. It is called by the
// request's handler, after WriteHeader(http.StatusSwitchingProtocols) for instance, and
// the request's handler should return then. The session moves as that handler wants; the
// handler is started again in the next process, without another request.
func Takeover(w http.ResponseWriter, name string) error {
	if name == "" || len(name) > maxName {
		return fmt.Errorf("handoffhttp: the name of a takeover has 1 to %d bytes, not %d", maxName, len(name))
	}
	nc, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNotOurs, err)
	}
	c, ok := nc.(*conn)
	if !ok {
		_ = nc.Close()
		return ErrNotOurs
	}
	if err := rw.Flush(); err != nil {
		_ = c.Close()
		return err
	}
	ahead, _ := rw.Reader.Peek(rw.Reader.Buffered()) // never fails: all of it is there
	c.takenOver(name, ahead)
	return nil
}

func (s *server) takeover(ctx context.Context, c *handoff.Conn, name string) error {
	h := s.takeovers[name]
	if h == nil {
		return fmt.Errorf("session %d: this program has no handler named %q to take it over (WithTakeover)", c.ID(), name)
	}
	err := h.Serve(ctx, c)
	if errors.Is(err, handoff.ErrMoving) {
		c.SetState(wrapState(name, c.State()))
	}
	return err
}

// stateMark begins the state of a session that was taken over; one that speaks HTTP has
// none.
const stateMark = "handoffhttp\x00\x01"

// maxName is what fits the byte before a name.
const maxName = 255

func wrapState(name string, app []byte) []byte {
	b := append([]byte(stateMark), byte(len(name)))
	return append(append(b, name...), app...)
}

func unwrapState(b []byte) (name string, app []byte, ok bool) {
	n := len(stateMark)
	if len(b) <= n || string(b[:n]) != stateMark || len(b) < n+1+int(b[n]) {
		return "", nil, false
	}
	end := n + 1 + int(b[n])
	if app = b[end:]; len(app) == 0 {
		app = nil
	}
	return string(b[n+1 : end]), app, true
}
