package ktls

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// MaxQueued is the largest number of plaintext bytes QueueWrite keeps.
const MaxQueued = 1 << 20

// Conn is an established TLS session over one of the record layers: a net.Conn.
// One goroutine may read while another writes; each direction has its own lock.
//
// A Read or Write that a deadline ends loses nothing, at whatever byte of whatever
// record it was: the session goes on with the next call, or in another process
// after Detach and Import. Errors other than os.ErrDeadlineExceeded are final for
// their direction.
type Conn struct {
	sock          Socket
	layer         recordLayer
	facts         *facts // never modified
	p             params
	local, remote net.Addr // nil: as the facts have it

	rmu      sync.Mutex // reading; taken before wmu where both are needed
	rerr     error      // final; what rxEnd says in the words of Read
	rxEnd    ending
	unread   []byte // pushed back by Unread
	hand     []byte // part of a handshake message that goes on in the next record
	floods   floods
	tickets  *ticketStore // client role: who stores them, nil when nobody does
	rxUsed   uint64       // of the key's limit, see usage
	rxGen    uint64       // generations of the key since the handshake
	buffered atomic.Int64

	wmu     sync.Mutex // writing
	werr    error      // final
	txEnd   ending
	queued  []byte // plaintext, not sealed
	txUsed  uint64
	txGen   uint64
	pending atomic.Int64

	limit     uint64                // of use of one key, in 16-byte blocks; 0: none
	owed      atomic.Uint32         // control records that the writing side must send
	answering atomic.Bool           // answerSoon has a timer running
	asked     atomic.Uint32         // KeyUpdates we requested and have not seen
	fatal     atomic.Pointer[error] // ends both directions
	lost      atomic.Pointer[error] // the connection's, see noteLost
	place     atomic.Pointer[Place] // the journal's, nil when there is none
	closed    atomic.Bool           // by Close or Detach; set under dmu
	dmu       sync.Mutex            // deadlines, which nobody changes once closed
	secrets   *secrets              // kernel layer, in a process that has them

	// With a relay. One call at a time writes data, also while it has given up wmu to
	// wait for other keys: turn is taken before wmu.
	rel  *relayed
	turn sync.Mutex

	commits *Commits // nil: the application commits nothing; set before the first use
}

// ending says how a direction of a session ended.
type ending uint8

const (
	endOpen   ending = iota
	endNotify        // close_notify
	endFIN           // receiving: FIN without close_notify; sending: close_notify and FIN
)

var _ net.Conn = (*Conn)(nil)

func newConn(sock Socket, layer recordLayer, p params, f *facts) *Conn {
	c := &Conn{sock: sock, layer: layer, facts: f, p: p, limit: keyLimit(p)}
	return c
}

func (c *Conn) opError(op string, err error) error {
	if errors.Is(err, net.ErrClosed) {
		return net.ErrClosed
	}
	return &net.OpError{Op: op, Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}

// note is v.Store(n) for the one who owns v; mostly nothing has changed, and to look
// costs less.
func note(v *atomic.Int64, n int) {
	if v.Load() != int64(n) {
		v.Store(int64(n))
	}
}

// Socket returns what the session runs over, which the Conn still owns. Reading
// or writing it breaks the session.
func (c *Conn) Socket() Socket { return c.sock }

// Layer says where records are sealed and opened.
func (c *Conn) Layer() Layer { return c.layer.kind() }

// LayerReason says why ModeAuto chose software; "" in the kernel layer and when
// software was asked for.
func (c *Conn) LayerReason() string { return c.facts.Reason }

// ConnectionState returns the session's facts as crypto/tls reported them, for the
// life of the session and after every move. Its ExportKeyingMaterial must not be
// called: the exporter's secret stays behind in the handshake.
func (c *Conn) ConnectionState() tls.ConnectionState { return c.facts.connectionState() }

// LocalAddr returns the address of this end.
func (c *Conn) LocalAddr() net.Addr {
	if c.local == nil {
		return addrOf(c.facts.Local)
	}
	return c.local
}

// RemoteAddr returns the peer's address.
func (c *Conn) RemoteAddr() net.Addr {
	if c.remote == nil {
		return addrOf(c.facts.Remote)
	}
	return c.remote
}

// SetDeadline sets both deadlines.
func (c *Conn) SetDeadline(t time.Time) error {
	c.rel.deadlines(&t, &t)
	return c.deadline(c.sock.SetDeadline, t)
}

// SetReadDeadline bounds pending and later Reads.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.rel.deadlines(&t, nil)
	return c.deadline(c.sock.SetReadDeadline, t)
}

// SetWriteDeadline bounds pending and later Writes.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	c.rel.deadlines(nil, &t)
	return c.deadline(c.sock.SetWriteDeadline, t)
}

func (c *Conn) deadline(set func(time.Time) error, t time.Time) error {
	c.dmu.Lock()
	defer c.dmu.Unlock()
	if c.closed.Load() {
		return net.ErrClosed
	}
	return socketError(set(t))
}

// addresses takes the addresses from a net.Conn, from the facts, which have those of the
// handshake, or else from the socket.
func (c *Conn) addresses() error {
	if tc, ok := c.sock.(interface {
		LocalAddr() net.Addr
		RemoteAddr() net.Addr
	}); ok {
		c.local, c.remote = tc.LocalAddr(), tc.RemoteAddr()
		return nil
	}
	if c.facts.hasAddresses() {
		return nil // LocalAddr and RemoteAddr take them from there
	}
	rc, err := c.sock.SyscallConn()
	if err != nil {
		return fmt.Errorf("session socket: %w", err)
	}
	var local, remote *net.TCPAddr
	if err := rc.Control(func(fd uintptr) {
		local, remote, err = sys.SocketAddrs(int(fd))
	}); err != nil {
		return fmt.Errorf("session socket: %w", err)
	}
	if local != nil {
		c.local = local
	}
	if remote != nil {
		c.remote = remote
	} else {
		c.remote = addrOf(c.facts.Remote)
	}
	if err != nil && !errors.Is(err, sys.ENOTCONN) {
		return fmt.Errorf("session socket: %w", err)
	}
	return nil
}
