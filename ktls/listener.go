package ktls

import (
	"context"
	"errors"
	"net"
	"sync"
)

// maxPendingHandshakes is how many handshakes in progress and sessions not yet
// accepted a listener has at most; more connections wait in the accept queue of the kernel.
const maxPendingHandshakes = 1024

// NewListener returns a listener whose Accept gives *Conn. Handshakes run
// concurrently, so a slow client holds up nobody. Those that fail are reported to
// cfg.OnHandshakeError and otherwise dropped. Close also ends handshakes in
// progress and sessions that nobody accepted.
//
// For the kernel layer inner must not use MPTCP, see Server.
func NewListener(inner *net.TCPListener, cfg *Config) net.Listener {
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
	inner  *net.TCPListener
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
		c, err := l.inner.AcceptTCP()
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

func (l *listener) handshake(c *net.TCPConn) {
	defer l.wg.Done()
	// The slot is held until the session is accepted: whoever does not call Accept
	// must not collect sessions without end.
	defer func() { <-l.slots }()
	conn, err := Server(l.ctx, c, l.cfg)
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
