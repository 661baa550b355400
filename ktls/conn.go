package ktls

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
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

// Read reads plaintext. io.EOF means that the peer sent close_notify; a FIN
// without it is ErrTruncated. A record that breaks the protocol is answered with
// its alert and is an *AlertError.
func (c *Conn) Read(p []byte) (int, error) {
	c.rmu.Lock()
	defer c.rmu.Unlock()
	if c.closed.Load() {
		return 0, net.ErrClosed
	}
	n, err := c.read(p)
	c.noteBuffered()
	return n, err
}

func (c *Conn) read(p []byte) (int, error) {
	if k := c.commits; k != nil && !k.stateOnly {
		return c.readCommitted(p)
	}
	return c.readPlain(p)
}

func (c *Conn) readPlain(p []byte) (int, error) {
	if len(c.unread) > 0 {
		n := copy(p, c.unread)
		c.unread = c.unread[n:]
		c.tookUnread(p[:n])
		if len(c.unread) == 0 {
			c.unread = nil
		}
		return n, nil
	}
	if err := c.readEnd(); err != nil || len(p) == 0 {
		return 0, err
	}
	for {
		c.settle()
		if c.rel != nil {
			if err := c.awaitKey(); err != nil {
				return 0, c.readFailed(err)
			}
		}
		n, ctl, err := c.layer.read(p)
		switch {
		case err != nil && c.rel != nil && errors.Is(err, sys.EKEYEXPIRED):
			// An owner before us read a KeyUpdate and died. What it said is not known; to
			// answer without having been asked is allowed.
			if err := c.followKeyUpdate(true); err != nil {
				return 0, err
			}
		case err != nil:
			return 0, c.readFailed(err)
		case ctl.typ != 0 || n == 0:
			c.rxUsed += usage(len(ctl.data))
			if err := c.handleControl(ctl); err != nil {
				return 0, err
			}
		default:
			if err := c.handleData(n); err != nil {
				return 0, err
			}
			return n, nil
		}
	}
}

// readEnd is why nothing more can be read, or nil.
func (c *Conn) readEnd() error {
	if c.rerr != nil {
		return c.rerr
	}
	if f := c.fatal.Load(); f != nil {
		return *f
	}
	return nil
}

// readFailed turns an error of the layer into one of Read.
func (c *Conn) readFailed(err error) error {
	var rec *recordError
	switch {
	case errors.Is(err, ErrKeyDoubt):
		return c.readEnd()
	case c.closed.Load():
		return net.ErrClosed
	case errors.Is(err, os.ErrDeadlineExceeded):
		return os.ErrDeadlineExceeded
	case errors.Is(err, io.EOF):
		if lost := c.lost.Load(); lost != nil {
			err = *lost
			break
		}
		c.rerr, c.rxEnd = ErrTruncated, endFIN
		return c.rerr
	case errors.As(err, &rec):
		return c.fail(rec.alert, rec.what)
	case errors.Is(err, ErrKeyLimit):
		return c.endCleanly(ErrKeyLimit)
	case errors.Is(err, sys.EKEYEXPIRED):
		// The kernel takes any handshake record that begins like a KeyUpdate for one,
		// before we have seen all of it.
		return c.endCleanly(ErrKeyUpdateUnsupported)
	}
	err = c.opError("read", err)
	c.fatal.CompareAndSwap(nil, &err)
	return err
}

func (c *Conn) opError(op string, err error) error {
	if errors.Is(err, net.ErrClosed) {
		return net.ErrClosed
	}
	return &net.OpError{Op: op, Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}

func (c *Conn) noteBuffered() {
	note(&c.buffered, len(c.unread)+c.commits.waiting()+c.layer.buffered())
}

// note is v.Store(n) for the one who owns v; mostly nothing has changed, and to look
// costs less.
func note(v *atomic.Int64, n int) {
	if v.Load() != int64(n) {
		v.Store(int64(n))
	}
}

// Write sends p. With a deadline's error it returns how many bytes it took; those
// are sealed or in the socket and reach the peer with the next Write or Flush, or
// after a move, and must not be written again.
func (c *Conn) Write(p []byte) (int, error) {
	c.lockWrite()
	defer c.unlockWrite()
	if err := c.flush(); err != nil {
		return 0, err
	}
	return c.send(p)
}

// writeChunk bounds how far a Write goes without looking at the limit of the key
// and at what the reading side owes the peer.
const writeChunk = 256 << 10

// send seals and sends p, after everything that was pending.
func (c *Conn) send(p []byte) (int, error) {
	taken := 0
	for taken < len(p) {
		chunk := p[taken:min(len(p), taken+writeChunk)]
		if err := c.mayWrite(len(chunk)); err != nil {
			return taken, err
		}
		c.plainOutput()
		n, err := c.layer.write(chunk)
		c.txUsed += usage(n)
		taken += n
		if err != nil {
			return taken, c.writeFailed(err)
		}
	}
	return taken, nil
}

// mayWrite returns when n bytes may be written. It may give up wmu meanwhile.
func (c *Conn) mayWrite(n int) error {
	if err := c.writable(); err != nil {
		return err
	}
	return c.mayUse(usage(n))
}

// writable pays what is owed and says why nothing may be written, or nil.
func (c *Conn) writable() error {
	if c.closed.Load() {
		return net.ErrClosed
	}
	if c.rel != nil {
		if err := c.awaitTurn(); err != nil {
			return c.writeFailed(err)
		}
	}
	if c.owed.Load() != 0 {
		if err := c.payOwed(true); err != nil {
			return c.writeFailed(err)
		}
	}
	if f := c.fatal.Load(); f != nil {
		return *f
	}
	return c.werr
}

func (c *Conn) writeFailed(err error) error {
	switch {
	case c.closed.Load():
		return net.ErrClosed
	case errors.Is(err, os.ErrDeadlineExceeded):
		return os.ErrDeadlineExceeded
	case errors.Is(err, ErrKeyLimit):
		return c.endWrite(ErrKeyLimit)
	case errors.Is(err, ErrKeyDoubt):
		return err
	}
	// The receiving side may still hold what the peer sent before it went away.
	c.noteLost(err)
	c.werr = c.opError("write", err)
	return c.werr
}

// Flush sends what is pending: sealed bytes first, then what QueueWrite took.
func (c *Conn) Flush() error {
	c.lockWrite()
	defer c.unlockWrite()
	return c.flush()
}

func (c *Conn) flush() error {
	if err := c.writable(); err != nil {
		if errors.Is(err, errWriteClosed) && c.layer.unsent() > 0 && !c.closed.Load() {
			return c.flushLayer() // the rest of close_notify
		}
		return err
	}
	if err := c.flushLayer(); err != nil {
		return err
	}
	// Piece by piece, and looked at anew: mayWrite may give up wmu before each, and whoever
	// comes in then (Close, Detach, Pause) must find, and may take, only what was not taken.
	for len(c.queued) > 0 {
		if err := c.mayWrite(min(len(c.queued), writeChunk)); err != nil {
			return err
		}
		chunk := c.queued[:c.commits.queuedChunk(min(len(c.queued), writeChunk))]
		if len(chunk) == 0 {
			break
		}
		n, err := c.sendQueued(chunk)
		c.txUsed += usage(n)
		c.queued = c.queued[n:]
		if err != nil {
			return c.writeFailed(err)
		}
	}
	c.queued = nil
	return nil
}

func (c *Conn) flushLayer() error {
	if err := c.layer.flush(true); err != nil {
		return c.writeFailed(err)
	}
	return nil
}

// lockWrite begins a writing section.
func (c *Conn) lockWrite() {
	if c.rel != nil {
		c.turn.Lock()
	}
	c.wmu.Lock()
}

// unlockWrite ends a writing section.
func (c *Conn) unlockWrite() {
	c.unlockInner()
	if c.rel != nil {
		c.turn.Unlock()
	}
}

// unlockInner gives up wmu. The reading side may have found it taken when it had
// something to send; that is sent here as far as the socket takes it.
func (c *Conn) unlockInner() {
	for {
		c.notePending()
		c.wmu.Unlock()
		if c.owed.Load() == 0 || c.closed.Load() || !c.wmu.TryLock() {
			return
		}
		if c.closed.Load() || c.payOwed(false) != nil {
			c.notePending()
			c.wmu.Unlock()
			return
		}
	}
}

func (c *Conn) notePending() { note(&c.pending, len(c.queued)+c.layer.unsent()) }

// settle tries, without waiting, to send what the reading side owes or left.
func (c *Conn) settle() {
	owed := c.owed.Load()
	if c.answering.Load() {
		owed &^= owedUpdate // not due yet
	}
	if owed == 0 && c.pending.Load() == 0 || !c.wmu.TryLock() {
		return
	}
	if c.closed.Load() { // since; the debts went with the session
		c.wmu.Unlock()
		return
	}
	if c.payOwed(false) == nil && c.layer.unsent() > 0 {
		c.noteLost(c.layer.flush(false)) // a final error shows in the next Write
	}
	c.unlockInner()
}

// noteLost keeps an error of the connection that a write met. The socket reports it
// once, and then only an end of the stream, which a Read would take for a FIN.
func (c *Conn) noteLost(err error) {
	if errors.Is(err, sys.ECONNRESET) || errors.Is(err, sys.ETIMEDOUT) {
		c.lost.CompareAndSwap(nil, &err)
	}
}

// Unread pushes plaintext back, to be read before anything else. It copies p. It
// waits for a Read in progress.
func (c *Conn) Unread(p []byte) {
	c.rmu.Lock()
	defer c.rmu.Unlock()
	if c.closed.Load() || len(p) == 0 {
		return
	}
	if k := c.commits; k != nil && !k.stateOnly {
		k.pushBack(p)
		c.noteBuffered()
		return
	}
	c.unread = append(slices.Clone(p), c.unread...)
	c.setUnread()
	c.noteBuffered()
}

// Buffered is the number of plaintext bytes that the next Read gives without
// looking at the socket.
func (c *Conn) Buffered() int { return int(c.buffered.Load()) }

// QueueWrite appends a copy of p to the unsent output, without sending: the next
// Flush or Write does, here or after a move. It waits for a Write in progress.
// Above MaxQueued bytes in all it takes nothing and returns ErrQueueFull.
func (c *Conn) QueueWrite(p []byte) error {
	c.wmu.Lock()
	defer c.unlockInner()
	switch {
	case c.closed.Load():
		return net.ErrClosed
	case c.werr != nil:
		return c.werr
	case len(c.queued)+len(p) > MaxQueued:
		return ErrQueueFull
	}
	if f := c.fatal.Load(); f != nil {
		return *f
	}
	c.plainOutput()
	c.queued = append(c.queued, p...)
	c.addQueued(p)
	return nil
}

// Pending is the number of unsent output bytes this Conn keeps: sealed ones and
// queued plaintext. What is in the socket does not count.
func (c *Conn) Pending() int { return int(c.pending.Load()) }

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
