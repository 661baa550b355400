package ktls

import (
	"errors"
	"net"
	"os"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

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
