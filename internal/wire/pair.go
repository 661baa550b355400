package wire

import (
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/fault"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// Pair returns the two ends of a control channel inside of one process. Messages go
// through memory as they are: nothing is encoded, and a socket goes along as the
// descriptor that it is. What waits is not bounded; both ends are the program's own.
func Pair() (a, b *Channel, err error) {
	if fault.Enabled { // a channel that can be cut, filled, and made to repeat itself
		return packetPair()
	}
	one, two := newMailbox(), newMailbox()
	return &Channel{in: one, far: two}, &Channel{in: two, far: one}, nil
}

func packetPair() (a, b *Channel, err error) {
	x, y, err := sys.PacketPair()
	if err != nil {
		return nil, nil, err
	}
	if a, err = NewChannel(x); err != nil {
		sys.CloseAll([]int{y})
		return nil, nil, err
	}
	if b, err = NewChannel(y); err != nil {
		_ = a.Close()
		return nil, nil, err
	}
	return a, b, nil
}

// Give sends m as Send does, but everything in m is the channel's from then on, whether
// it succeeds or not: sockets are closed, and records wiped, once they are sent. The
// caller reads nothing of m any more but its type, and the numbers of its sessions.
func (c *Channel) Give(m *Message) error {
	if c.far != nil {
		return c.far.put(m)
	}
	err := c.Send(m)
	m.Dispose()
	return err
}

// Dispose closes the sockets and wipes the records of a message that nobody takes.
func (m *Message) Dispose() {
	m.CloseSockets()
	for i := range m.Items {
		clear(m.Items[i].Cargo.Record)
	}
}

// SetWriteDeadline ends a Send or Give that waits for the peer to read, at t.
func (c *Channel) SetWriteDeadline(t time.Time) error {
	if c.far != nil {
		return nil // it never waits
	}
	return c.pc.SetWriteDeadline(t)
}

// mailbox holds the messages on their way to one end of a Pair.
type mailbox struct {
	mu     sync.Mutex
	cond   sync.Cond
	list   []*Message
	ended  bool // nothing more comes
	closed bool // nobody reads any more
}

func newMailbox() *mailbox {
	b := &mailbox{}
	b.cond.L = &b.mu
	return b
}

func (b *mailbox) put(m *Message) error {
	b.mu.Lock()
	var err error
	switch {
	case b.ended:
		err = os.ErrClosed
	case b.closed:
		err = syscall.EPIPE
	default:
		b.list = append(b.list, m)
		b.cond.Signal()
	}
	b.mu.Unlock()
	if err != nil {
		m.Dispose()
		return fmt.Errorf("%s: control channel: %w", m.Type, err)
	}
	return nil
}

func (b *mailbox) take() (*Message, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.list) == 0 && !b.ended && !b.closed {
		b.cond.Wait()
	}
	switch {
	case b.closed:
		return nil, os.ErrClosed
	case len(b.list) == 0:
		return nil, io.EOF
	}
	m := b.list[0]
	b.list[0] = nil
	b.list = b.list[1:]
	return m, nil
}

// end says that nothing more comes; what is there can still be taken.
func (b *mailbox) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ended = true
	b.cond.Broadcast()
}

// close ends the taking, and disposes of what waits.
func (b *mailbox) close() {
	b.mu.Lock()
	b.closed = true
	list := b.list
	b.list = nil
	b.cond.Broadcast()
	b.mu.Unlock()
	for _, m := range list {
		m.Dispose()
	}
}
