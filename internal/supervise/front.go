package supervise

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// maxHandshakes bounds the handshakes under way at once; further connections wait
// in the listen queue.
const maxHandshakes = 512

// admission is an established session on its way into the ledger. Its holder owns
// fd.
type admission struct {
	fd       int
	facts    facts
	record   []byte
	secrets  []byte // kernel layer: what ktls.State.MarshalSecrets wrote
	software bool
}

// front accepts connections and handshakes. It touches nothing of the ledger: what
// it produces goes to admit.
type front struct {
	log   hclog.Logger
	admit func(*admission)
	fail  func(kind counter)
	craft func(*net.TCPConn) (*Crafted, error) // nil: handshakes

	ctx    context.Context
	cancel context.CancelFunc
	sem    chan struct{}
	shakes sync.WaitGroup
	loops  sync.WaitGroup

	mu        sync.Mutex
	listeners []*listener
	paused    bool
	saidNoFD  time.Time
}

type listener struct {
	ln   *net.TCPListener
	pool string
	cfg  *ktls.Config
}

func newFront(log hclog.Logger, admit func(*admission), fail func(counter)) *front {
	f := &front{log: log, admit: admit, fail: fail, sem: make(chan struct{}, maxHandshakes)}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	return f
}

// listen opens a TCP listener. Multipath TCP is off: kernel TLS does not attach to
// such sockets (EOPNOTSUPP), and Go's listeners use it by default.
func listen(addr string) (*net.TCPListener, error) {
	// Peers that are gone are noticed after two and a half minutes, as with Go's listeners.
	// Those probe idle connections every 15 s: of very many idle sessions, that is what
	// costs most.
	lc := net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 6}}
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(context.Background(), "tcp", addr)
	if err != nil {
		return nil, err
	}
	tl, ok := ln.(*net.TCPListener)
	if !ok {
		_ = ln.Close()
		return nil, fmt.Errorf("listen on %s: not a TCP listener", addr)
	}
	return tl, nil
}

// start accepts on all listeners.
func (f *front) start() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.paused = false
	for _, l := range f.listeners {
		_ = l.ln.SetDeadline(time.Time{})
		f.loops.Go(func() { f.acceptLoop(l) })
	}
}

// pause stops accepting; connections wait in the listen queue, which a successor
// shares. Handshakes under way go on.
func (f *front) pause() {
	f.mu.Lock()
	f.paused = true
	for _, l := range f.listeners {
		_ = l.ln.SetDeadline(time.Unix(1, 0))
	}
	f.mu.Unlock()
	f.loops.Wait()
}

// wait returns when no handshake is under way any more.
func (f *front) wait() { f.shakes.Wait() }

// close ends accepting and cuts handshakes short.
func (f *front) close() {
	f.pause()
	f.cancel()
	f.wait()
	for _, l := range f.listeners {
		_ = l.ln.Close()
	}
}

func (f *front) isPaused() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.paused
}

func (f *front) acceptLoop(l *listener) {
	for {
		f.sem <- struct{}{}
		c, err := l.ln.AcceptTCP()
		if err != nil {
			<-f.sem
			switch {
			case f.isPaused() || errors.Is(err, net.ErrClosed):
				return
			case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
				f.sayNoDescriptors(l)
				f.pauseFor(50 * time.Millisecond)
			case errors.Is(err, os.ErrDeadlineExceeded):
				return
			default:
				f.log.Warn("accept", "listener", l.ln.Addr(), "error", err)
				f.pauseFor(10 * time.Millisecond)
			}
			continue
		}
		dup, err := f.duplicate(l, c)
		if err != nil {
			<-f.sem
			f.log.Error("no session: its socket cannot be duplicated", "peer", c.RemoteAddr(), "error", err)
			_ = c.Close()
			f.fail(cntHandshakeFailed)
			continue
		}
		f.shakes.Go(func() {
			defer func() { <-f.sem }()
			f.handshake(l, c, dup)
		})
	}
}

// duplicate makes the descriptor that the keeper is to hold, before the handshake:
// there a connection can wait for one, afterwards a session would be at stake.
func (f *front) duplicate(l *listener, c *net.TCPConn) (int, error) {
	for {
		fd, err := dupSocket(c)
		if !errors.Is(err, syscall.EMFILE) || f.isPaused() || f.ctx.Err() != nil {
			return fd, err
		}
		f.sayNoDescriptors(l)
		f.pauseFor(50 * time.Millisecond)
	}
}

// sayNoDescriptors says so once in a while, not for every attempt.
func (f *front) sayNoDescriptors(l *listener) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := time.Now(); f.saidNoFD.IsZero() || now.Sub(f.saidNoFD) > 10*time.Second {
		f.saidNoFD = now
		f.log.Error("out of descriptors: new connections wait; raise the NOFILE limit", "listener", l.ln.Addr())
	}
}

func dupSocket(c syscall.Conn) (fd int, err error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	if cerr := rc.Control(func(s uintptr) { fd, err = sys.Dup(int(s)) }); cerr != nil {
		return -1, cerr
	}
	return fd, err
}

func (f *front) pauseFor(d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-f.ctx.Done():
	}
}

// handshake makes a session of a connection, or one log line and a count. dup is a
// duplicate of its descriptor, which it owns.
func (f *front) handshake(l *listener, c *net.TCPConn, dup int) {
	peer := c.RemoteAddr().String()
	if f.craft != nil {
		if err := f.crafted(l, c, dup); err != nil {
			sys.CloseAll([]int{dup})
			_ = c.Close()
			f.log.Error("no session", "peer", peer, "error", err)
			f.fail(cntHandshakeFailed)
		}
		return
	}
	conn, err := ktls.Server(f.ctx, c, l.cfg)
	if err != nil {
		sys.CloseAll([]int{dup}) // only now does the peer see the end
		var he *ktls.HandshakeError
		kind, level := cntHandshakeFailed, hclog.Info
		if errors.As(err, &he) && he.Timeout() {
			kind = cntHandshakeTimeout
		}
		f.log.Log(level, "no session: TLS handshake failed", "peer", peer, "listener", l.ln.Addr(), "error", err)
		f.fail(kind)
		return
	}
	a, err := detach(conn, dup)
	if err != nil {
		sys.CloseAll([]int{dup})
		f.log.Error("no session: the record state cannot be taken out", "peer", peer, "error", err)
		_ = conn.Close()
		f.fail(cntHandshakeFailed)
		return
	}
	a.facts.Pool, a.facts.Peer = l.pool, peer
	f.admit(a)
}

// detach takes a session apart for the ledger; its socket is dup from then on.
func detach(conn *ktls.Conn, dup int) (*admission, error) {
	cs, reason := conn.ConnectionState(), conn.LayerReason()
	sock, st, err := conn.Detach()
	if err != nil {
		return nil, err
	}
	defer func() { _ = sock.Close() }() // one of two duplicates: the peer sees nothing
	defer st.Wipe()
	a := &admission{fd: dup, software: st.Layer() == ktls.LayerSoftware}
	a.facts = facts{SNI: cs.ServerName, ALPN: cs.NegotiatedProtocol, Version: cs.Version, Suite: cs.CipherSuite, Reason: clip(reason, maxReason)}
	if a.facts.Facts, err = st.MarshalFacts(); err != nil {
		return nil, err
	}
	if a.record, err = st.MarshalRecord(); err != nil {
		return nil, err
	}
	if !a.software { // for the relay of KeyUpdates; the software layer's are in its record state
		if a.secrets, err = st.MarshalSecrets(); err != nil {
			return nil, err
		}
	}
	return a, nil
}

// maxReason is how many bytes of the reason for a record layer are kept to be shown.
const maxReason = 100

func clip(s string, n int) string {
	if len(s) > n {
		return s[:n]
	}
	return s
}
