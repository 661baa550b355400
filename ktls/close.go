package ktls

import (
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// Time limits for what Close still has to send. A socket that was full before
// Close began gets the short one.
const (
	closeTimeout      = 5 * time.Second
	closeTimeoutStuck = time.Second
)

// CloseWrite sends what is pending, then close_notify and FIN. Reading goes on.
// When a deadline ends it, it can be called again.
func (c *Conn) CloseWrite() error {
	c.lockWrite()
	defer c.unlockWrite()
	if c.closed.Load() {
		return net.ErrClosed
	}
	if c.txEnd == endFIN {
		return nil
	}
	if c.txEnd == endOpen {
		if err := c.flush(); err != nil {
			return err
		}
		taken, err := c.sendAlert(levelWarning, alertCloseNotify, true)
		c.ended(taken)
		if err != nil {
			return c.writeFailed(err)
		}
	} else if err := c.flushLayer(); err != nil {
		return err
	}
	if err := c.control(sys.ShutdownWrite); err != nil {
		return c.opError("shutdown", err)
	}
	c.txEnd = endFIN
	return nil
}

// Close ends the session: what is pending and close_notify are sent if the socket
// takes them within 5 s (1 s when it was full before), after up to 5 s for a change of
// keys by a relay to come to its end; pending Reads and Writes
// return net.ErrClosed, and the connection is shut down for every process that
// holds a duplicate of the socket. Sessions that ended by an alert or an error of
// the socket send nothing more.
func (c *Conn) Close() error {
	if !c.markClosed() {
		return net.ErrClosed
	}
	c.rel.awaitEndOfPause(closeTimeout)
	c.rel.end()
	if !c.wmu.TryLock() {
		// A writer in progress may be stuck: send it home. No one can give it another
		// deadline any more.
		_ = c.sock.SetWriteDeadline(time.Unix(1, 0))
		c.wmu.Lock()
	}
	timeout := closeTimeout
	if c.layer.unsent() > 0 {
		timeout = closeTimeoutStuck
	}
	_ = c.sock.SetWriteDeadline(time.Now().Add(timeout))
	c.sayGoodbye()
	c.wmu.Unlock()
	// shutdown, not just close: another process may hold a duplicate of the socket,
	// and then close alone sends no FIN. The peer being gone already is no error.
	err := c.control(sys.ShutdownBoth)
	if errors.Is(err, sys.ENOTCONN) {
		err = nil
	}
	if cerr := c.sock.Close(); err == nil {
		err = cerr
	}
	c.forget()
	if err != nil {
		return fmt.Errorf("close session: %w", err)
	}
	return nil
}

// Drop closes this process's copy of the socket and forgets the session, whatever state
// it is in. The peer is told nothing and the connection is not shut down: it goes on with
// whoever holds a duplicate of the socket, or ends with a FIN when nobody does. Pending
// Reads and Writes return net.ErrClosed.
func (c *Conn) Drop() error {
	if !c.markClosed() {
		return net.ErrClosed
	}
	c.rel.end()
	err := c.sock.Close()
	c.forget()
	if err != nil {
		return fmt.Errorf("drop session: %w", err)
	}
	return nil
}

// forget wipes and frees what a closed Conn has, when nobody is in it any more.
func (c *Conn) forget() {
	c.rmu.Lock()
	c.wmu.Lock()
	c.layer.wipe()
	c.place.Store(nil)
	c.secrets.wipe()
	c.dropTickets()
	c.unread, c.hand, c.queued, c.commits = nil, nil, nil, nil
	c.buffered.Store(0)
	c.pending.Store(0)
	c.wmu.Unlock()
	c.rmu.Unlock()
}

// markClosed reports whether this call was the one that closed c.
func (c *Conn) markClosed() bool {
	c.dmu.Lock()
	defer c.dmu.Unlock()
	return !c.closed.Swap(true)
}

// sayGoodbye sends what is pending and close_notify. The write lock is held and
// the deadline set.
func (c *Conn) sayGoodbye() {
	if c.txEnd == endFIN || c.rel != nil && c.rel.inPause() {
		return
	}
	if c.fatal.Load() != nil {
		_ = c.payOwed(true)
		_ = c.layer.flush(true)
		return
	}
	if c.layer.flush(true) != nil || c.txEnd != endOpen || c.werr != nil || c.payOwed(true) != nil {
		return
	}
	for len(c.queued) > 0 {
		chunk := c.queued[:c.commits.queuedChunk(min(len(c.queued), writeChunk))]
		if c.mayUse(usage(len(chunk))) != nil {
			return
		}
		n, err := c.sendQueued(chunk)
		if err != nil {
			return
		}
		c.queued = c.queued[n:]
	}
	taken, _ := c.sendAlert(levelWarning, alertCloseNotify, true)
	c.ended(taken)
}

// control calls f with the session's descriptor.
func (c *Conn) control(f func(fd int) error) error {
	rc, err := c.sock.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := rc.Control(func(fd uintptr) { ferr = f(int(fd)) }); err != nil {
		return err
	}
	return ferr
}
