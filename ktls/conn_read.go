package ktls

import (
	"errors"
	"io"
	"net"
	"os"
	"slices"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

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

func (c *Conn) noteBuffered() {
	note(&c.buffered, len(c.unread)+c.commits.waiting()+c.layer.buffered())
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
