package keeper

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/fault"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// replyLimit is how long a supervisor may leave a reply unread before its channel
// is closed: a reply under way holds references to descriptors.
const replyLimit = 10 * time.Second

// inFlightLimit is how long a reply waits for descriptors in flight to arrive
// when the kernel refuses more of them (ETOOMANYREFS).
const inFlightLimit = 2 * time.Second

// channel is one connection to a supervisor. One goroutine (serve) receives a
// request, passes it to the keeper's loop, sends the answer, and only then reads
// on: a supervisor that does not read its answers stops only itself.
type channel struct {
	conn *sys.PacketConn
	shut atomic.Bool // this side closed it: errors that follow mean nothing

	sendMu sync.Mutex // serve sends replies, push sends TERMINATE

	// Owned by the keeper's loop.
	proc  *proc // who is at the other end; nil before HELLO
	hello bool  // HELLO was taken
}

// request is what serve passes to the loop. The loop owns fds from then on and
// answers exactly once.
type request struct {
	ch     *channel
	msg    *message
	fds    []int
	full   error // descriptors of the message were dropped; msg is only its head
	answer chan answer
}

// answer is one reply, or with entries a series of them.
type answer struct {
	msg     message
	entries []*held // with a reference each, released after sending
	withFDs bool
	fds     []int // sent with msg, closed after sending
	fatal   error // close the channel instead, for this reason
}

// gone tells the loop that a channel ended; err is nil when the other end closed it.
type gone struct {
	ch  *channel
	err error
}

// serve runs until the channel ends or stop is closed. It closes the connection.
func (c *channel) serve(requests chan<- request, ended chan<- gone, stop <-chan struct{}) {
	err := c.receive(requests, stop)
	_ = c.conn.Close()
	if errors.Is(err, io.EOF) || c.shut.Load() {
		err = nil
	}
	select {
	case ended <- gone{c, err}:
	case <-stop:
	}
}

func (c *channel) close() {
	c.shut.Store(true)
	_ = c.conn.Close()
}

func (c *channel) receive(requests chan<- request, stop <-chan struct{}) error {
	buf := make([]byte, sys.MaxPacket)
	answers := make(chan answer, 1)
	for {
		r := request{ch: c, answer: answers}
		fault.Step("before-recv")
		n, fds, err := c.conn.Recv(buf)
		switch {
		case errors.Is(err, sys.ErrControlTruncated):
			r.full = err
			if r.msg, err = decodeHead(buf); err != nil {
				return err
			}
		case err != nil:
			return err
		default:
			if r.msg, err = decode(buf[:n], len(fds)); err != nil {
				sys.CloseAll(fds)
				return err
			}
			r.fds = fds
		}
		select {
		case requests <- r:
		case <-stop:
			sys.CloseAll(fds)
			return nil
		}
		// The loop answers whatever it took, also while it ends.
		a := <-answers
		if a.fatal != nil {
			return a.fatal
		}
		a.msg.ID, a.msg.Op = r.msg.ID, opReply
		fault.Step("before-reply")
		if err := c.reply(a); err != nil {
			return err
		}
	}
}

func (c *channel) reply(a answer) error {
	defer sys.CloseAll(a.fds)
	defer releaseAll(a.entries)
	rest := a.entries
	for {
		n := pageOf(len(rest), func(i int) (size, fds int) {
			if a.withFDs {
				fds = rest[i].count()
			}
			return rest[i].size(), fds
		})
		m := a.msg
		fds := a.fds
		m.Entries = make([]wireEntry, 0, n)
		for _, h := range rest[:n] {
			we := wireEntry{Kind: h.kind, ID: h.id, Name: h.name(), Meta: []byte(h.meta())}
			if a.withFDs {
				we.FDs = uint8(h.count())
				fds = h.descriptors(fds)
			}
			m.Entries = append(m.Entries, we)
		}
		rest = rest[n:]
		m.More = len(rest) > 0
		err := c.send(&m, fds)
		if errors.Is(err, sys.ETOOMANYREFS) {
			return c.send(&message{ID: m.ID, Op: opReply, Failure: failFull, Text: "too many descriptors in flight between processes"}, nil)
		}
		if err != nil || !m.More {
			return err
		}
	}
}

func (c *channel) send(m *message, fds []int) error {
	b, err := encode(m)
	if err != nil {
		return err
	}
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	start := time.Now()
	if err := c.conn.SetWriteDeadline(start.Add(replyLimit)); err != nil {
		return err
	}
	for {
		err := c.conn.Send(b, fds)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, sys.ETOOMANYREFS) && time.Since(start) < inFlightLimit:
			// Nothing tells when the other side has taken some out.
			time.Sleep(10 * time.Millisecond)
		case errors.Is(err, os.ErrDeadlineExceeded):
			return fmt.Errorf("a reply was not read for %v", replyLimit)
		case errors.Is(err, sys.EPIPE):
			return io.EOF // the other end closed; that is no error of the protocol
		default:
			return err
		}
	}
}
