package handoff

import (
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/fault"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

var errGroupName = fmt.Errorf("a group's name has 1 to %d bytes of UTF-8", wire.MaxGroup)

func newConn(w *worker, id uint64, s *ktls.Conn) *Conn {
	return &Conn{w: w, id: id, tls: s}
}

// freeze makes Read return ErrMoving and Write queue.
func (c *Conn) freeze() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tired = false // now in earnest
	if !c.moving.on {
		c.interruptLocked()
	}
}

func (c *Conn) interruptLocked() {
	c.moving.set()
	if !c.detached {
		_ = c.updateLocked()
	}
}

// thaw undoes freeze.
func (c *Conn) thaw() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.moving.on {
		c.goOnLocked()
	}
}

func (c *Conn) goOnLocked() {
	c.moving.clear()
	c.tired = false
	if !c.detached {
		_ = c.updateLocked()
		c.flushLocked()
	}
}

// begin readies the Conn for a run of the handler. Without a new barrier it keeps
// one that has not opened: some member's handler has not come so far yet.
func (c *Conn) begin(b *barrier) {
	if b != nil {
		c.leaveBarrier()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.told, c.holds = false, 0
	if b != nil {
		c.barrier = b
	}
	c.rdl, c.wdl = time.Time{}, time.Time{}
	c.moving.clear()
	c.tired = false
	_ = c.updateLocked()
	if c.dead == nil && c.tls.Pending() > 0 {
		c.flushLocked()
	}
}

// ranOnce is called between two runs of the handler in this process.
func (c *Conn) ranOnce() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.restored, c.interrupted = true, false
}

// stop makes Read return ErrStopping.
func (c *Conn) stop() {
	c.leaveBarrier()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopping = true
	if !c.detached {
		_ = c.updateLocked()
	}
}

// leaveBarrier lets the other members of the group have their input.
func (c *Conn) leaveBarrier() {
	c.mu.Lock()
	b := c.barrier
	c.mu.Unlock()
	if b != nil {
		b.leave(c)
	}
}

// discard drops a session of which nothing was used, without touching the connection.
func (c *Conn) discard() {
	c.mu.Lock()
	c.detached = true
	s := c.tls
	c.mu.Unlock()
	if err := s.Drop(); err != nil && !errors.Is(err, net.ErrClosed) {
		c.w.log.Error("dropping an adopted session", "session", c.id, "error", err)
	}
}

// ends returns how the application and the peer left the session.
func (c *Conn) ends() (closed bool, cause error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed, c.cause
}

// kept is a session that was taken off its Conn: its socket and what travels.
type kept struct {
	sock   ktls.Socket
	facts  *ktls.State // only for MarshalFacts: few come back
	record []byte
	app    []byte
	rested bool // it was at rest: its handler need not run before there is input
}

// drop closes this process's copy of the socket. The connection goes on elsewhere:
// nothing is sent and nothing is shut down.
func (k *kept) drop() {
	_ = k.sock.Close()
	clear(k.record)
}

// duplicate returns a duplicate of the socket, for a pool of which the supervisor keeps
// none; -1 when there is none to be had, and then sending it fails.
func (k *kept) duplicate() int {
	fd := -1
	if rc, err := k.sock.SyscallConn(); err == nil {
		_ = rc.Control(func(s uintptr) {
			if d, err := sys.Dup(int(s)); err == nil {
				fd = d
			}
		})
	}
	return fd
}

// abandon ends a connection that nobody can continue. The supervisor may hold a
// duplicate, so close alone would leave the peer waiting.
func abandon(s ktls.Socket) {
	if rc, err := s.SyscallConn(); err == nil {
		_ = rc.Control(func(fd uintptr) { _ = sys.ShutdownBoth(int(fd)) })
	}
	_ = s.Close()
}

// detach takes the session off the Conn, at a safe point: the handler has returned.
// What other goroutines still do with the Conn is interrupted. On an error the
// connection cannot be continued by anyone.
func (c *Conn) detach() (*kept, error) {
	if err := c.leave(true); err != nil {
		return nil, err
	}
	c.wmu.Lock()
	defer c.wmu.Unlock()
	fault.Step("before-export")
	sock, st, err := c.session().Detach()
	fault.Step("after-export")
	return c.detachLocked(sock, st, err)
}

// leave lets nobody begin anything with the session any more, and interrupts what was
// begun if that is wanted.
func (c *Conn) leave(interrupt bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead != nil {
		return c.dead
	}
	c.detached = true
	if !interrupt {
		return nil
	}
	return c.updateLocked()
}

// tryDetach is detach unless that had to wait for something; then done is false.
func (c *Conn) tryDetach() (k *kept, err error, done bool) {
	if err := c.leave(false); err != nil {
		return nil, err, true
	}
	if !c.wmu.TryLock() {
		return nil, nil, false
	}
	defer c.wmu.Unlock()
	fault.Step("before-export")
	sock, st, err := c.session().TryDetach()
	if err != nil { // somebody uses it; or the session has ended, and closing it may take time
		return nil, nil, false
	}
	fault.Step("after-export")
	k, err = c.detachLocked(sock, st, nil)
	return k, err, true
}

// detachLocked takes what Detach gave, and wmu is held.
func (c *Conn) detachLocked(sock ktls.Socket, st *ktls.State, err error) (*kept, error) {
	c.mu.Lock()
	s, app := c.tls, c.app
	c.mu.Unlock()
	if err != nil {
		_ = s.Close()
		return nil, err
	}
	defer st.Wipe()
	if c.w.vault != nil {
		c.w.vault.keep(c.id, st)
	}
	k := &kept{sock: sock, app: app, facts: st}
	if k.record, err = st.MarshalRecord(); err != nil {
		abandon(sock)
		return nil, err
	}
	return k, nil
}

// attach puts a session that detach took off back on.
func (c *Conn) attach(k *kept) error {
	var s *ktls.Conn
	facts, err := k.facts.MarshalFacts()
	if err == nil {
		s, err = ktls.Import(k.sock, facts, k.record)
	}
	clear(k.record)
	if err != nil {
		abandon(k.sock)
		return err
	}
	c.rejournal(s)
	c.w.relayed(c.s, s)
	s.Remind()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tls, c.detached = s, false
	return nil
}

// shut ends the session: what is queued and close_notify, both bounded by ktls, then
// shutdown and close. Read and Write return why from now on. The session must be
// attached. A second call waits for the first.
func (c *Conn) shut(why error) {
	c.mu.Lock()
	if c.dead != nil {
		c.mu.Unlock()
		<-c.shutDone
		return
	}
	done := make(chan struct{})
	defer close(done)
	c.shutDone = done
	// Interrupts the handler's Read and Write, which would be told net.ErrClosed
	// otherwise, not why.
	_ = c.tls.SetReadDeadline(past)
	_ = c.tls.SetWriteDeadline(past)
	c.dead = why
	c.died.set()
	s := c.tls
	c.mu.Unlock()
	c.leaveBarrier()
	if err := s.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		c.w.log.Debug("closing a session", "session", c.id, "error", err)
	}
}
