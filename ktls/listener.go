package ktls

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
)

// maxPendingHandshakes is how many handshakes in progress and sessions not yet
// accepted a listener has at most; more connections wait in the accept queue of the kernel.
const maxPendingHandshakes = 1024

// Listen listens on a TCP address, without multipath TCP, and returns NewListener of
// that, as tls.Listen does. network is "tcp", "tcp4" or "tcp6".
func Listen(network, addr string, cfg *Config) (net.Listener, error) {
	if cfg == nil {
		return nil, fmt.Errorf("listen on %s: %w", addr, errNoTLS)
	}
	if _, err := cfg.serverBase(); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(context.Background(), network, addr)
	if err != nil {
		return nil, err
	}
	if _, ok := l.(*net.TCPListener); !ok {
		_ = l.Close()
		return nil, fmt.Errorf("listen on %s: network %q is not TCP", addr, network)
	}
	return NewListener(l, cfg), nil
}

// NewListener returns a listener whose Accept gives *Conn, with finished handshakes:
// those of several connections run at once, so a slow client holds up nobody. Those
// that fail are reported to cfg.OnHandshakeError and otherwise dropped. Close also
// ends handshakes in progress and sessions that nobody accepted.
//
// inner's Accept must give *net.TCPConn; other connections are closed and reported.
// For the kernel layer it must not use MPTCP, see Server.
func NewListener(inner net.Listener, cfg *Config) net.Listener {
	ctx, cancel := context.WithCancel(context.Background())
	l := &listener{
		inner: inner, cfg: cfg, ctx: ctx, cancel: cancel,
		ready: make(chan accepted), slots: make(chan struct{}, maxPendingHandshakes),
	}
	l.wg.Add(1)
	go l.run()
	return l
}

type listener struct {
	inner  net.Listener
	cfg    *Config
	ctx    context.Context
	cancel context.CancelFunc
	ready  chan accepted
	slots  chan struct{}
	wg     sync.WaitGroup
}

type accepted struct {
	conn *Conn
	err  error
}

// Accept returns the next session, or an error of the listening socket. Errors
// such as EMFILE are temporary: Accept may be called again.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case a := <-l.ready:
		if a.err != nil {
			return nil, a.err
		}
		return a.conn, nil
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Close closes the listening socket and waits for handshakes to end.
func (l *listener) Close() error {
	l.cancel()
	err := l.inner.Close()
	l.wg.Wait()
	return err
}

// Addr returns the listening address.
func (l *listener) Addr() net.Addr { return l.inner.Addr() }

func (l *listener) run() {
	defer l.wg.Done()
	for {
		select {
		case l.slots <- struct{}{}:
		case <-l.ctx.Done():
			return
		}
		c, err := l.inner.Accept()
		if err == nil {
			l.wg.Add(1)
			go l.handshake(c)
			continue
		}
		<-l.slots
		// Handing the error over also paces the loop: whoever calls Accept backs off.
		select {
		case l.ready <- accepted{err: err}:
		case <-l.ctx.Done():
			return
		}
		if errors.Is(err, net.ErrClosed) {
			l.cancel()
			return
		}
	}
}

func (l *listener) handshake(c net.Conn) {
	defer l.wg.Done()
	// The slot is held until the session is accepted: whoever does not call Accept
	// must not collect sessions without end.
	defer func() { <-l.slots }()
	conn, err := serve(l.ctx, c, l.cfg)
	if err != nil {
		if l.cfg.OnHandshakeError != nil && l.ctx.Err() == nil {
			l.cfg.OnHandshakeError(err)
		}
		return
	}
	select {
	case l.ready <- accepted{conn: conn}:
	case <-l.ctx.Done():
		_ = conn.Close()
	}
}

func serve(ctx context.Context, c net.Conn, cfg *Config) (*Conn, error) {
	tc, err := tcpConn(c)
	if err != nil {
		return nil, err
	}
	return Server(ctx, tc, cfg)
}

// tcpConn closes c if it is not what sessions run over.
func tcpConn(c net.Conn) (*net.TCPConn, error) {
	if tc, ok := c.(*net.TCPConn); ok {
		return tc, nil
	}
	_ = c.Close()
	return nil, fmt.Errorf("%s: a session needs a *net.TCPConn and this is a %T; closed", c.RemoteAddr(), c)
}
