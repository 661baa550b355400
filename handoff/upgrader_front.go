package handoff

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// maxHandshakes bounds the handshakes under way at once; further connections wait in
// the listen queue.
const maxHandshakes = 512

// arrival is an established session on its way to the worker. Its holder owns fd.
type arrival struct {
	fd                            int
	facts, record, secrets, state []byte
	once                          sync.Once
}

// leave hands the descriptor over to the caller; -1 when the connection was ended before.
func (a *arrival) leave() (fd int) {
	fd = -1
	a.once.Do(func() { fd = a.fd })
	return fd
}

// drop ends the connection, unless it has gone on elsewhere.
func (a *arrival) drop() {
	a.once.Do(func() {
		_ = sys.ShutdownBoth(a.fd)
		sys.CloseAll([]int{a.fd})
		clear(a.record)
		clear(a.secrets)
	})
}

// newArrival takes a session apart. On an error conn is as before.
func newArrival(conn *ktls.Conn, state []byte) (*arrival, error) {
	if len(state) > MaxState {
		return nil, fmt.Errorf("session %s: state of %d bytes, the limit is %d", conn.RemoteAddr(), len(state), MaxState)
	}
	// Before anything else: a session that is off its Conn must not fail for this.
	a := &arrival{fd: -1, state: slices.Clone(state)}
	rc, err := conn.Socket().SyscallConn()
	if err != nil {
		return nil, err
	}
	if cerr := rc.Control(func(fd uintptr) { a.fd, err = sys.Dup(int(fd)) }); cerr != nil {
		return nil, cerr
	}
	if err != nil {
		return nil, fmt.Errorf("session %s: %w", conn.RemoteAddr(), err)
	}
	sock, st, err := conn.Detach()
	if err != nil {
		sys.CloseAll([]int{a.fd})
		return nil, err
	}
	defer func() { _ = sock.Close() }() // one of two duplicates: the peer sees nothing
	defer st.Wipe()
	if a.facts, err = st.MarshalFacts(); err == nil {
		a.record, err = st.MarshalRecord()
	}
	if err == nil && st.Layer() == ktls.LayerKernel {
		if a.secrets, err = st.MarshalSecrets(); errors.Is(err, ktls.ErrNoSecrets) {
			err = nil // its keys cannot change then
		}
	}
	if err != nil {
		a.drop()
		return nil, err
	}
	return a, nil
}

// front accepts and handshakes.
type front struct {
	h      *host
	ctx    context.Context
	cancel context.CancelFunc
	sem    chan struct{}
	shakes sync.WaitGroup
	under  atomic.Int64 // handshakes under way
	loops  sync.WaitGroup

	mu      sync.Mutex
	lns     []*frontListener
	began   bool // Serve was called
	open    bool // accepting
	ended   bool // for good
	saidNoF time.Time
}

type frontListener struct {
	ln  *net.TCPListener
	cfg *ktls.Config
}

func newFront(h *host) *front {
	f := &front{h: h, sem: make(chan struct{}, maxHandshakes)}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	return f
}

func (f *front) begin() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	ok := !f.began
	f.began = true
	return ok
}

// listen opens or inherits a listener. Multipath TCP is off: kernel TLS does not attach
// to such sockets.
func (f *front) listen(network, addr string, cfg *ktls.Config) (net.Addr, error) {
	ln, err := f.h.flip.ListenWithCallback(network, addr, func(network, addr string) (net.Listener, error) {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		return lc.Listen(context.Background(), network, addr)
	})
	if err != nil {
		return nil, err
	}
	tl, ok := ln.(*net.TCPListener)
	if !ok {
		_ = ln.Close()
		return nil, fmt.Errorf("listen on %s: network %q is not TCP", addr, network)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	l := &frontListener{tl, cfg}
	f.lns = append(f.lns, l)
	if f.open {
		f.loops.Go(func() { f.acceptLoop(l) })
	}
	return tl.Addr(), nil
}

// start accepts on all listeners.
func (f *front) start() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.open || f.ended || f.ctx.Err() != nil {
		return
	}
	f.open = true
	for _, l := range f.lns {
		_ = l.ln.SetDeadline(time.Time{})
		f.loops.Go(func() { f.acceptLoop(l) })
	}
}

// pause stops accepting and returns when that is so; connections wait in the listen
// queue, which another process may share. Handshakes under way go on.
func (f *front) pause() {
	f.mu.Lock()
	f.open = false
	for _, l := range f.lns {
		_ = l.ln.SetDeadline(past)
	}
	f.mu.Unlock()
	f.loops.Wait()
}

// end stops accepting for good: an upgrade that has just failed is about to start again.
func (f *front) end() {
	f.mu.Lock()
	f.ended, f.open = true, false
	f.mu.Unlock()
	go f.pause()
}

// close ends accepting and cuts handshakes short.
func (f *front) close() {
	f.cancel()
	f.pause()
	f.shakes.Wait()
	f.closeListeners()
}

// closeListeners gives this process's share of them back.
func (f *front) closeListeners() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, l := range f.lns {
		_ = l.ln.Close()
	}
	f.lns = nil
}

func (f *front) isOpen() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.open
}

func (f *front) acceptLoop(l *frontListener) {
	for f.isOpen() {
		select {
		case f.sem <- struct{}{}:
		case <-f.ctx.Done():
			return
		}
		c, err := l.ln.AcceptTCP()
		if err == nil {
			f.under.Add(1)
			f.shakes.Go(func() {
				defer func() {
					f.under.Add(-1)
					<-f.sem
				}()
				f.handshake(l, c)
			})
			continue
		}
		<-f.sem
		switch {
		case !f.isOpen() || errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded):
			return
		case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
			f.sayNoDescriptors(l)
			f.pauseFor(50 * time.Millisecond)
		default:
			f.h.log.Warn("accept", "listener", l.ln.Addr(), "error", err)
			f.pauseFor(10 * time.Millisecond)
		}
	}
}

func (f *front) sayNoDescriptors(l *frontListener) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := time.Now(); f.saidNoF.IsZero() || now.Sub(f.saidNoF) > 10*time.Second {
		f.saidNoF = now
		f.h.log.Error("out of descriptors: new connections wait; raise the NOFILE limit", "listener", l.ln.Addr())
	}
}

func (f *front) pauseFor(d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-f.ctx.Done():
	}
}

func (f *front) handshake(l *frontListener, c *net.TCPConn) {
	peer := c.RemoteAddr()
	conn, err := ktls.Server(f.ctx, c, l.cfg)
	if err == nil {
		var a *arrival
		if a, err = newArrival(conn, nil); err != nil {
			_ = conn.Close()
			f.h.log.Error("no session: its state cannot be taken out", "peer", peer, "error", err)
			return
		}
		// Posted before this handshake counts as over, so that whoever waits for that
		// finds the session on the books.
		f.h.in.post(func() { f.h.admit(a, func(error) {}) })
		return
	}
	if l.cfg.OnHandshakeError != nil {
		l.cfg.OnHandshakeError(err)
		return
	}
	f.h.log.Info("no session: TLS handshake failed", "peer", peer, "listener", l.ln.Addr(), "error", err)
}
