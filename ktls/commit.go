package ktls

import (
	"crypto/tls"
	"errors"
	"net"
	"os"
	"slices"

	"github.com/ktlsvisor/ktlsvisor/internal/fault"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// Commit says in one step that the first consumed bytes of what Read has given since the
// last Commit are done with, that state is the application's state from now on (nil: it
// stays as it is), and that output, at most MaxQueued bytes, is to reach the peer. After
// a crash all of that is so, or nothing of it: the next owner reads what was read and
// not committed again, and sends what is left of output, once, before anything else.
//
// done reports that it is committed. Then a deadline or an error kept output from being
// sent only; with a deadline the rest goes out with the next Write, Flush or Commit,
// here or after a move. With send false nothing is sent, and ErrQueueFull says that
// there is no place for output. Commit waits for a Write in progress, not for a Read.
// Without NewCommits it is ErrNoCommit.
func (c *Conn) Commit(consumed int, state, output []byte, send bool) (done bool, err error) {
	c.lockWrite()
	defer c.unlockWrite()
	k := c.commits
	switch {
	case c.closed.Load():
		return false, net.ErrClosed
	case k == nil:
		return false, ErrNoCommit
	case len(output) > MaxQueued, k.stateOnly && (consumed != 0 || len(output) > 0):
		return false, ErrQueueFull
	case len(state) > MaxCommitState:
		return false, errors.New("commit: the state is too large")
	}
	if len(output) > 0 {
		if send {
			if err := c.flush(); err != nil {
				return false, err
			}
		} else if c.werr != nil {
			return false, c.werr
		} else if f := c.fatal.Load(); f != nil {
			return false, *f
		}
		// What a Write that was interrupted queued behind committed output would have
		// to go between that and this.
		if c.closed.Load() { // flush may have given up the lock
			return false, net.ErrClosed
		}
		if len(c.queued)+len(output) > MaxQueued || k.left > 0 && len(c.queued) > k.lead+k.left {
			return false, ErrQueueFull
		}
	}
	if k.left == 0 {
		k.lead = len(c.queued)
	}
	if _, kernel := c.layer.(*kernelLayer); kernel && len(c.queued) > k.left {
		// What a Write queued and the socket has not taken is nowhere but in this process.
		// The journal of the software layer has it.
		k.plainSince(2)
	}
	queued, err := k.commit(consumed, state, c.queued[k.lead:], output, c.sentCount(k))
	if err != nil {
		return false, err
	}
	if len(output) > 0 {
		if k.lead == 0 {
			c.queued = queued
		} else {
			c.queued = append(slices.Clip(c.queued[:k.lead]), queued...)
		}
		k.left = len(queued)
	}
	if !send || len(output) == 0 {
		return true, nil
	}
	return true, c.flush()
}

// sentCount is how many bytes will have been counted when the committed output's turn
// comes.
func (c *Conn) sentCount(k *Commits) uint64 {
	if l, ok := c.layer.(*softLayer); ok {
		return l.tx.plain + uint64(k.lead)
	}
	return k.get(wordSent)
}

// queuedChunk is how much of the front of c.queued, at most n bytes, goes out in one
// call: committed output is not mixed with other.
func (k *Commits) queuedChunk(n int) int {
	switch {
	case k == nil || k.stateOnly:
	case k.lead > 0:
		n = min(n, k.lead)
	case k.left > 0:
		n = min(n, k.left)
	}
	return n
}

// sendQueued sends p, the front of c.queued, as long as queuedChunk said.
func (c *Conn) sendQueued(p []byte) (n int, err error) {
	k := c.commits
	switch {
	case k == nil || k.lead == 0 && k.left == 0:
		return c.writeQueued(p)
	case k.lead > 0:
		n, err = c.writeQueued(p)
		k.lead -= n
		return n, err
	}
	l, kernel := c.layer.(*kernelLayer)
	if kernel {
		l.out.noted = l.noted != nil
	}
	n, err = c.layer.write(p)
	if kernel {
		l.out.noted = false
	}
	if k.left -= n; k.left == 0 {
		k.allSent()
	}
	return n, err
}

// plainOutput notes that output goes out that is not committed: after a crash nobody
// knows how much of it was.
func (c *Conn) plainOutput() {
	if k := c.commits; k != nil {
		k.plainSince(1)
	}
}

// plainSince notes that there is such output until so many more Commits were made.
func (k *Commits) plainSince(n uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if at := k.rec.commits + n; k.get(wordPlain) < at {
		k.set(wordPlain, at)
	}
}

// readCommitted is read for a session whose input is kept.
func (c *Conn) readCommitted(p []byte) (int, error) {
	k := c.commits
	for {
		if n := k.give(p); n > 0 {
			return n, nil
		}
		if len(p) == 0 {
			return 0, c.readEnd()
		}
		if k.idle() && len(c.unread) == 0 && c.readEnd() == nil {
			// No memory is held while there is nothing to read.
			if c.settle(); c.rel == nil || c.awaitKey() == nil {
				if err := c.layer.waitRead(); c.closed.Load() || errors.Is(err, os.ErrDeadlineExceeded) {
					return 0, c.readFailed(err)
				}
			}
		}
		into, err := k.room()
		if err != nil {
			return 0, err
		}
		n, err := c.readPlain(into)
		if c.rxEnd != endOpen {
			k.set(wordEnded, uint64(c.rxEnd))
		}
		if err != nil {
			return 0, err
		}
		k.received(n, len(into))
	}
}

// Rewind makes Read give everything again that was not committed: the handler of the
// session begins anew. Nothing must read meanwhile. Without commits it does nothing.
func (c *Conn) Rewind() {
	c.rmu.Lock()
	defer c.rmu.Unlock()
	if k := c.commits; k != nil && !c.closed.Load() {
		k.rewind()
		c.noteBuffered()
	}
}

// Uncommitted is the number of bytes that Read has given and Commit was not told of.
func (c *Conn) Uncommitted() int {
	k := c.commits
	if k == nil || k.stateOnly {
		return 0
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return int(k.read - k.rec.consumed)
}

// recv and notedWrite are how the kernel layer receives and sends what is accounted for:
// the kernel itself notes how many bytes it took.
func (l *kernelLayer) recv(fd uintptr) {
	if l.p.version == tls.VersionTLS12 {
		touch(l.in.p)
	}
	if l.noted == nil {
		l.in.n, l.in.typ, l.in.eor, l.in.err = sys.TLSRecv(int(fd), l.in.p)
		return
	}
	note := l.noted[commitNoteRX:]
	sys.OpenNote(note)
	sys.StoreShared(l.noted[wordCalled:], sys.LoadShared(l.noted[wordReceived:]))
	fault.Step("before-socket-recv")
	l.in.n, l.in.typ, l.in.eor, l.in.err = sys.TLSRecvNoted(int(fd), note, l.in.p)
	fault.Step("after-socket-recv")
}

// touch makes sure that p is in memory. The kernel opens records of TLS 1.2 right in the
// caller's pages. When it has to bring one of them in first and the process is being
// killed, it fails, and calls the record bad: the session would be lost with the process
// (net/tls/tls_sw.c, tls_rx_one_record; seen on 6.12).
func touch(p []byte) {
	for i := 0; i < len(p); i += pageLen {
		p[i] = 0
	}
	if len(p) > 0 {
		p[len(p)-1] = 0
	}
}

const pageLen = 4 << 10

func (l *kernelLayer) notedWrite(fd uintptr) {
	o := &l.out
	note := l.noted[commitNoteTX:]
	sent := sys.LoadShared(l.noted[wordSent:])
	sys.OpenNote(note)
	sys.StoreShared(l.noted[wordSending:], sent)
	fault.Step("before-socket-send")
	o.n, o.err = sys.TLSSendNoted(int(fd), note, o.p)
	fault.Step("after-socket-send")
	if o.n > 0 {
		sys.StoreShared(l.noted[wordSent:], sent+uint64(o.n))
	}
}
