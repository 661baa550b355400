package handoff

import (
	"errors"
	"io"
	"os"
	"time"

	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// A move interrupts Read and Write with a deadline in the past. The application's
// own deadlines are kept in Conn and set again when the interrupt ends: everything
// that changes either goes through updateLocked, so what the record layer has is
// always one or the other.

var past = time.Unix(1, 0)

// heldLocked reports that a wanted move must not stop input and output now.
func (c *Conn) heldLocked() bool { return c.holds > 0 && !c.detached }

// wantsOutLocked reports that Read and Write are to come back because of a move.
func (c *Conn) wantsOutLocked() bool { return c.detached || c.moving.on && !c.heldLocked() }

func (c *Conn) updateLocked() error {
	if c.dead != nil {
		return c.dead
	}
	r, w := c.rdl, c.wdl
	if c.wantsOutLocked() {
		r, w = past, past
	}
	if c.stopping {
		r = past
	}
	if err := c.tls.SetReadDeadline(r); err != nil {
		return err
	}
	return c.tls.SetWriteDeadline(w)
}

// Read reads plaintext. It returns ErrMoving when a move is wanted, unless the
// handler holds (Hold), and ErrStopping when the worker stops; what was received and
// not read stays for the next Read, here or in the next owner. io.EOF is the peer's
// close_notify, ktls.ErrTruncated a FIN without it.
func (c *Conn) Read(p []byte) (int, error) { return c.read(p, false) }

// waitRead waits for what Read waits for and takes nothing.
func (c *Conn) waitRead() error {
	_, err := c.read(nil, true)
	return err
}

func (c *Conn) read(p []byte, waitOnly bool) (n int, err error) {
	c.waiting()
	defer c.handling()
	for {
		s, err := c.readable()
		if err != nil {
			return 0, err
		}
		if c.placeless.Load() {
			c.placeLater(s)
		}
		c.since.Store(c.w.ticks.Load() | 1<<31)
		if waitOnly {
			err = s.WaitRead()
		} else {
			n, err = s.Read(p)
		}
		if c.since.Swap(0) == 0 && !errors.Is(err, os.ErrDeadlineExceeded) {
			c.fresh()
		}
		if n > 0 {
			return n, nil // an error comes again with the next Read
		}
		if err == nil {
			if len(p) == 0 {
				return 0, nil
			}
			continue
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return 0, c.failed(err)
		}
		// Ours or the application's? Ours is reported by readable.
		c.mu.Lock()
		ours := c.wantsOutLocked() || c.stopping || c.dead != nil
		expired := !c.rdl.IsZero() && !time.Now().Before(c.rdl)
		c.mu.Unlock()
		if !ours && expired {
			return 0, err
		}
	}
}

// readable waits at the group's barrier and says what a Read has to do.
func (c *Conn) readable() (*ktls.Conn, error) {
	for {
		c.mu.Lock()
		s, err := c.usableLocked()
		switch {
		case err != nil:
		case c.wantsOutLocked():
			err = ErrMoving // also when the worker stops: someone wants the session
		case c.stopping:
			err = ErrStopping
		}
		c.told = errors.Is(err, ErrMoving)
		b, held, rdl := c.barrier, c.heldLocked(), c.rdl
		if err != nil || b == nil {
			c.mu.Unlock()
			return s, err
		}
		moving, dead := c.moving.wait(), c.died.wait()
		c.mu.Unlock()
		if held {
			moving = nil
		}
		if err := b.wait(c, moving, dead, rdl); err != nil {
			return nil, err
		}
	}
}

// failed remembers the first error that ended the session, for the report of its end.
func (c *Conn) failed(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead != nil {
		return c.dead
	}
	if c.detached {
		c.told = true
		return ErrMoving
	}
	if c.cause == nil {
		c.cause = err
	}
	return err
}

// Write writes plaintext. While a move is wanted it takes up to ktls.MaxQueued bytes
// without sending, and they travel with the session; beyond that it returns the
// number of bytes taken and ErrMoving.
func (c *Conn) Write(p []byte) (int, error) {
	defer c.written(c.writing())
	c.wmu.Lock()
	defer c.wmu.Unlock()
	done := 0
	for {
		c.mu.Lock()
		s, err := c.usableLocked()
		queue := err == nil && c.wantsOutLocked()
		if errors.Is(err, ErrMoving) {
			c.told = true
		}
		c.mu.Unlock()
		if err != nil {
			return done, err
		}
		if queue {
			n, err := c.queue(s, p[done:])
			c.flush() // when the move was called off meanwhile
			return done + n, err
		}
		n, err := s.Write(p[done:])
		done += n
		if err == nil {
			return done, nil
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return done, c.failed(err)
		}
		c.mu.Lock()
		ours := c.wantsOutLocked() || c.dead != nil
		expired := !c.wdl.IsZero() && !time.Now().Before(c.wdl)
		c.mu.Unlock()
		if !ours && expired {
			return done, err
		}
		if done == len(p) && !ours {
			// All of it is taken and a part is not sent; whoever comes next sends it.
			c.flush()
			return done, nil
		}
	}
}

// CloseWrite sends what is queued, close_notify and FIN; reading goes on. While a
// move is wanted it does nothing and returns ErrMoving.
func (c *Conn) CloseWrite() error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	for {
		s, err := c.staying()
		if err != nil {
			return err
		}
		if err = s.CloseWrite(); err == nil {
			return nil
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return c.failed(err)
		}
		c.mu.Lock()
		ours := c.wantsOutLocked() || c.dead != nil
		expired := !c.wdl.IsZero() && !time.Now().Before(c.wdl)
		c.mu.Unlock()
		if !ours && expired {
			return err
		}
	}
}

// queue takes as much of p as fits into the output that travels.
func (c *Conn) queue(s *ktls.Conn, p []byte) (int, error) {
	const chunk = 16 << 10
	done := 0
	for done < len(p) {
		next := p[done:min(done+chunk, len(p))]
		if err := s.QueueWrite(next); err != nil {
			c.mu.Lock()
			defer c.mu.Unlock()
			if errors.Is(err, ktls.ErrQueueFull) {
				c.told = true
				return done, ErrMoving
			}
			if c.dead != nil {
				return done, c.dead
			}
			return done, err
		}
		done += len(next)
	}
	return done, nil
}

func (c *Conn) flush() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.flushLocked()
}

// flushLocked sends output that a move or a deadline left unsent, in a goroutine of
// its own, because the peer may not be reading. Write may run beside it: the record
// layer keeps the order.
func (c *Conn) flushLocked() {
	if c.dead != nil || c.wantsOutLocked() {
		return // whoever ends the interrupt calls again
	}
	if c.flushing {
		c.flushAgain = true
		return
	}
	c.flushing = true
	s := c.tls
	go func() {
		for {
			var err error
			if s.Pending() > 0 {
				err = s.Flush()
			}
			c.mu.Lock()
			again := c.flushAgain && (err == nil || errors.Is(err, os.ErrDeadlineExceeded))
			c.flushAgain = false
			if !again || c.dead != nil || c.wantsOutLocked() {
				c.flushing = false
				if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, io.EOF) && c.dead == nil && !c.detached && c.cause == nil {
					c.cause = err
				}
				c.mu.Unlock()
				return
			}
			s = c.tls
			c.mu.Unlock()
		}
	}()
}
