package handoff

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// Conn is one session as its handler sees it. It is a net.Conn; several goroutines
// may use it. One Conn stands for the session as long as it is in this process, also
// when its handler is started again.
type Conn struct {
	w  *worker
	s  *session // only for the worker's loop
	id uint64

	wmu sync.Mutex // one Write at a time; taken before mu

	mu                   sync.Mutex
	tls                  *ktls.Conn // the last one; of no use while detached
	detached             bool
	dead                 error         // why nothing works any more, nil while it does
	died                 beacon        // on with dead
	shutDone             chan struct{} // made with dead; closed when the socket is closed
	moving               beacon
	tired                bool // moving for a rest only, see rest.go
	told                 bool // this run of the handler was given ErrMoving
	stopping             bool // Read gives ErrStopping
	closed               bool // the application called Close
	holds                int
	flushing, flushAgain bool
	rdl, wdl             time.Time // the application's deadlines
	barrier              *barrier  // members of the group that have to be there before input is
	cause                error     // what ended the session, as Read or Write saw it

	mark    atomic.Pointer[atomic.Uint64] // says whether it is being handled, nil: nobody asks; see marks.go
	markAt  int                           // which word that is; for the worker's loop
	running atomic.Bool                   // the handler is
	commits *ktls.Commits                 // what the application commits; nil: it does not
	durable bool                          // a crash of this process leaves it to the next owner
	place   *ktls.Place                   // of the session's journal; nil: it has none

	placeless atomic.Bool // there was no room for the session's journal
	triedAt   uint32      // worker.roomy when a place was tried for last

	since atomic.Uint32 // the worker's tick when Read began to wait, 0 when it does not

	app         []byte
	restored    bool
	interrupted bool
}

var _ net.Conn = (*Conn)(nil)

// ID is the session's number, unique under one supervisor for ever.
func (c *Conn) ID() uint64 { return c.id }

func (c *Conn) session() *ktls.Conn {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.tls
}

// ConnectionState returns the facts of the handshake. They stay the same over moves.
func (c *Conn) ConnectionState() tls.ConnectionState { return c.session().ConnectionState() }

// Layer is "kernel" or "software".
func (c *Conn) Layer() string { return c.session().Layer().String() }

// LocalAddr returns the address the client connected to.
func (c *Conn) LocalAddr() net.Addr { return c.session().LocalAddr() }

// RemoteAddr returns the client's address.
func (c *Conn) RemoteAddr() net.Addr { return c.session().RemoteAddr() }

// State returns the application state that the session came with: what the previous
// owner, or the previous run of the handler, gave to SetState. nil for a new session.
func (c *Conn) State() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.app
}

// SetState says what travels when the handler returns ErrMoving, at most MaxState
// bytes; a session with more cannot move and its handler is started again. Without a
// call the state it came with travels on. Conn keeps b, which must not be changed
// afterwards.
func (c *Conn) SetState(b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.app = b
}

// Restored reports that a handler served this session before.
func (c *Conn) Restored() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.restored
}

// Interrupted reports that the session's owner died: its state is gone, and so is
// what it had read and not answered.
func (c *Conn) Interrupted() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.interrupted
}

// Unread pushes bytes back; the next Read, here or in the next owner, returns them
// first. A session with more than 2 MiB of unread input cannot move.
func (c *Conn) Unread(p []byte) { c.session().Unread(p) }

// Hold says that the handler is not at a safe point: until release is called, Read
// and Write go on working although a move is wanted. release may be called more than
// once. Holding does not last beyond the return of the handler.
func (c *Conn) Hold() (release func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.holds++
	c.updateLocked()
	c.flushLocked()
	var once sync.Once
	return func() {
		once.Do(func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.holds > 0 {
				c.holds--
			}
			c.updateLocked()
		})
	}
}

// Moving returns a channel that is closed while a move is wanted. Ask again after a
// move was called off: the channel is another one then.
func (c *Conn) Moving() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.moving.wait()
}

// Group is the name of the group the session belongs to, "" for none.
func (c *Conn) Group() string {
	var name string
	_ = c.w.call(context.Background(), func(done func(error)) {
		name = c.s.group
		done(nil)
	})
	return name
}

// JoinGroup makes the session a member of a group, and of no other; sessions of a
// group live in one process and move together. nil: the group lives in this process.
// ErrMoving: return it, the session moves to the group's home, the handler starts
// again there and calls JoinGroup again. Any other error: refused, or ctx ended, and
// the session is in the group it was in before.
//
// A member whose handler has returned ErrMoving stays a member: Write to its Conn is
// still taken, and travels, until FreezeGroup was called. When a group was moved, no
// member's first Read returns before the handlers of all members have called Read:
// what a handler does before is done before any input is handled.
func (c *Conn) JoinGroup(ctx context.Context, name string) error {
	if name == "" || len(name) > wire.MaxGroup || !utf8.ValidString(name) {
		return errGroupName
	}
	return c.join(ctx, name)
}

// LeaveGroup ends the session's membership. It returns what JoinGroup returns.
func (c *Conn) LeaveGroup(ctx context.Context) error { return c.join(ctx, "") }

// SetDeadline sets both deadlines.
func (c *Conn) SetDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rdl, c.wdl = t, t
	return c.updateLocked()
}

// SetReadDeadline bounds pending and later Reads. It does not travel.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rdl = t
	return c.updateLocked()
}

// SetWriteDeadline bounds pending and later Writes. It does not travel.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wdl = t
	err := c.updateLocked()
	c.flushLocked()
	return err
}

// Close ends the session. After ErrMoving was returned it does nothing by itself:
// what the handler returns decides, so that a deferred Close does not end a session
// that is about to move.
func (c *Conn) Close() error {
	c.mu.Lock()
	if c.told || c.detached || c.dead != nil {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	c.mu.Unlock()
	c.shut(net.ErrClosed)
	if c.w.restAfter > 0 {
		c.w.in.post(func() { c.w.wake(c.s) }) // there is no input for it any more
	}
	return nil
}

// usableLocked returns the session when bytes may go through it.
func (c *Conn) usableLocked() (*ktls.Conn, error) {
	switch {
	case c.dead != nil:
		return nil, c.dead
	case c.detached:
		return nil, ErrMoving
	}
	return c.tls, nil
}

// staying is the session for an operation that is not begun once a move is wanted.
func (c *Conn) staying() (*ktls.Conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s, err := c.usableLocked()
	if err == nil && c.wantsOutLocked() {
		err = ErrMoving
	}
	c.told = c.told || errors.Is(err, ErrMoving)
	return s, err
}
