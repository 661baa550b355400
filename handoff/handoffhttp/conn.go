package handoffhttp

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/ktlsvisor/ktlsvisor/handoff"
)

// conn is a session as net/http sees it for HTTP/1.1. It finds the moments at which the
// session can move: net/http has nothing of a request then but bytes that can be put back.
//
// How net/http reads (conn.serve in its server.go): into a bufio.Reader, whose free space
// is what Read is asked for. After a response it sets the state to idle, sets a read
// deadline, and peeks for the first 4 bytes of the next request; then it sets a read
// deadline again. So
//
//	fresh --Read gave 4 bytes--> busy --StateIdle--> answered --SetReadDeadline--> peeking
//	                              ^                                                  |
//	                              +--------------------SetReadDeadline---------------+
//
// and in a Read while peeking, what it holds is the size of its buffer less what it asks
// for: none to three bytes, the last ones that it was given, and of no request that it has
// begun. Everything else is no safe point: a Read that asks for another amount (a read of
// one byte watches for the client's leaving) goes on like any other.
type conn struct {
	c        *handoff.Conn
	idleTime time.Duration
	done     chan struct{}

	mu      sync.Mutex
	stage   stage
	size    int    // of net/http's buffer
	tail    []byte // the last bytes given, at most maxPeek-1
	ahead   int    // while peeking: how many of them net/http must have; -1: not known yet
	release func() // of the hold; nil: none
	header  time.Duration
	closed  bool

	// To be read when done is closed.
	moving bool
	name   string // of the handler that takes over
}

type stage uint8

const (
	fresh    stage = iota // no byte of a request was read
	busy                  // with a request
	answered              // it was answered
	peeking               // net/http waits for the next one
)

// maxPeek is how many bytes net/http waits for between two requests.
const maxPeek = 4

var (
	_ net.Conn      = (*conn)(nil)
	_ io.ReaderFrom = (*conn)(nil)
)

func newConn(c *handoff.Conn, idle time.Duration) *conn {
	return &conn{c: c, idleTime: idle, done: make(chan struct{})}
}

// idleTimeout is net/http's rule.
func (s *server) idleTimeout() time.Duration {
	if s.h2.IdleTimeout != 0 {
		return s.h2.IdleTimeout
	}
	return s.h2.ReadTimeout
}

// idle is told that a request was answered.
func (c *conn) idle() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stage = answered
}

// holdLocked keeps the session here.
func (c *conn) holdLocked() {
	if c.release == nil {
		c.release = c.c.Hold()
	}
}

// readingLocked prepares a Read of n bytes: it reports that the session may move in it,
// and how many bytes net/http has that belong to no request yet.
func (c *conn) readingLocked(n int) (safe bool, ahead int) {
	switch c.stage {
	case fresh:
		if c.size == 0 {
			c.size = n
		}
		safe = true
	case peeking:
		ahead = c.size - n
		safe = ahead >= 0 && ahead <= len(c.tail) && (c.ahead < 0 || ahead == c.ahead)
		c.ahead = ahead
		if !safe {
			c.stage = busy
		}
	default:
	}
	switch {
	case !safe:
		c.holdLocked()
	case c.release != nil:
		c.release()
		c.release = nil
	}
	return safe, ahead
}

// Read reads for net/http.
func (c *conn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	c.mu.Lock()
	safe, ahead := c.readingLocked(len(p))
	first := c.stage == fresh
	c.mu.Unlock()
	var n int
	var err error
	if first {
		n, err = c.peekFirst(p)
	} else {
		n, err = c.c.Read(p)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if n > 0 {
		c.holdLocked()
		c.tail = append(c.tail, p[max(0, n-maxPeek+1):n]...)
		c.tail = c.tail[max(0, len(c.tail)-maxPeek+1):]
		c.ahead += n
		if c.stage == fresh {
			c.stage = busy
			if c.c.Restored() {
				t := time.Time{}
				if c.header != 0 {
					t = time.Now().Add(c.header)
				}
				_ = c.c.SetReadDeadline(t)
			}
		}
		return n, err
	}
	if safe && errors.Is(err, handoff.ErrMoving) {
		c.c.Unread(slices.Clone(c.tail[len(c.tail)-ahead:]))
		c.moving = true
		return 0, io.EOF // the end of the connection to net/http, which says nothing to that
	}
	return n, quietly(err)
}

// quietly makes an error of a session one that net/http does not answer with status 400.
func quietly(err error) error {
	var network net.Error
	if err == nil || errors.Is(err, io.EOF) || errors.As(err, &network) {
		return err
	}
	return &net.OpError{Op: "read", Net: "tls", Err: err}
}

// peekFirst waits for the beginning of the first request as net/http does for those
// behind it: less than that is not begun to be read, so that the session can move.
func (c *conn) peekFirst(p []byte) (n int, err error) {
	for n < min(maxPeek, len(p)) && err == nil {
		var got int
		got, err = c.c.Read(p[n:])
		n += got
	}
	if errors.Is(err, handoff.ErrMoving) {
		c.c.Unread(slices.Clone(p[:n]))
		n = 0
	}
	if n > 0 {
		err = nil // it comes again
	}
	return n, err
}

// SetReadDeadline is also how net/http's steps show, see conn.
func (c *conn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch c.stage {
	case answered:
		c.stage, c.ahead = peeking, -1
	case peeking:
		c.stage = busy
	case fresh:
		if c.c.Restored() {
			// For net/http a new connection: it gives the client so long for its first
			// request. To the client it is an idle one.
			c.header = 0
			if !t.IsZero() {
				c.header = time.Until(t)
			}
			t = time.Time{}
			if c.idleTime > 0 {
				t = time.Now().Add(c.idleTime)
			}
		}
	default:
	}
	return c.c.SetReadDeadline(t)
}

// SetWriteDeadline bounds writes.
func (c *conn) SetWriteDeadline(t time.Time) error { return c.c.SetWriteDeadline(t) }

// SetDeadline sets both.
func (c *conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// leaving reports that the session moves: not a byte of ours may follow.
func (c *conn) leaving() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.moving
}

// Write writes; it is called with a request in progress.
func (c *conn) Write(p []byte) (int, error) {
	if c.leaving() {
		return 0, handoff.ErrMoving
	}
	return c.c.Write(p)
}

// ReadFrom lets files go out by sendfile.
func (c *conn) ReadFrom(r io.Reader) (int64, error) {
	if c.leaving() {
		return 0, handoff.ErrMoving
	}
	return c.c.ReadFrom(r)
}

// CloseWrite says close_notify and goes on reading.
func (c *conn) CloseWrite() error {
	if c.leaving() {
		return handoff.ErrMoving
	}
	return c.c.CloseWrite()
}

// LocalAddr is the session's.
func (c *conn) LocalAddr() net.Addr { return c.c.LocalAddr() }

// RemoteAddr is the client's.
func (c *conn) RemoteAddr() net.Addr { return c.c.RemoteAddr() }

// ConnectionState is where Request.TLS comes from.
func (c *conn) ConnectionState() tls.ConnectionState { return c.c.ConnectionState() }

// Close lets the session's handler return, which ends the session unless it moves.
func (c *conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closeLocked()
	return nil
}

func (c *conn) closeLocked() {
	if !c.closed {
		c.closed = true
		close(c.done)
	}
}

// takenOver leaves the session to another handler.
func (c *conn) takenOver(name string, ahead []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	c.c.Unread(slices.Clone(ahead))
	_ = c.c.SetDeadline(time.Time{})
	if c.release != nil {
		c.release()
		c.release = nil
	}
	c.name = name
	c.closeLocked()
}

// Session is the session that a connection of New's server is of, as ConnContext and
// ConnState see it and Hijack returns it; nil for any other connection.
func Session(c net.Conn) *handoff.Conn {
	switch c := c.(type) {
	case *conn:
		return c.c
	case *whole:
		return c.Conn
	}
	return nil
}
