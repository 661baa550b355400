package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// attachLimit bounds HELLO: the keeper answers from memory.
const attachLimit = 5 * time.Second

// Client is a supervisor's side of its channel to the keeper. Any number of
// goroutines may use it at once. A call whose context ends returns at once; what
// it asked for may happen nevertheless.
type Client struct {
	conn *sys.PacketConn
	shut atomic.Bool   // Close was called: errors that follow mean nothing
	send chan struct{} // holds one token: who has it may send

	terminate chan struct{}
	closed    chan struct{}
	readDone  chan struct{}

	mu      sync.Mutex
	pending map[uint64]*call
	lastID  uint64
	cause   error // why closed is closed
	ended   bool
	termed  bool
}

// call waits for the replies to one request.
type call struct {
	replies []reply
	err     error
	done    chan struct{}
}

type reply struct {
	msg *message
	fds []int
}

// Attach takes ownership of fd, also when it fails, and makes this process known
// to the keeper, which from then on waits a while for it to lead when nobody does.
func Attach(fd int) (*Client, error) {
	conn, err := sys.NewPacketConn(fd)
	if err != nil {
		return nil, fmt.Errorf("attach to the keeper: %w", err)
	}
	c := &Client{
		conn:      conn,
		send:      make(chan struct{}, 1),
		terminate: make(chan struct{}),
		closed:    make(chan struct{}),
		readDone:  make(chan struct{}),
		pending:   make(map[uint64]*call),
	}
	c.send <- struct{}{}
	go c.read()
	pidfd, err := sys.PidfdOpen(os.Getpid())
	if err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("attach to the keeper: pidfd of this process (needs Linux 5.3): %w", err)
	}
	defer sys.CloseAll([]int{pidfd})
	ctx, cancel := context.WithTimeout(context.Background(), attachLimit)
	defer cancel()
	if _, err := c.ask(ctx, &message{Op: opHello, Version: version}, []int{pidfd}); err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("attach to the keeper: %w", err)
	}
	return c, nil
}

// Lead makes this process the supervisor and returns its incarnation, which grows
// with every process that leads. When Lead returns, the keeper no longer reads the
// workers' output. ErrLed while another leads; a process that leads already gets
// the same incarnation again.
func (c *Client) Lead(ctx context.Context) (incarnation uint32, err error) {
	m, err := c.ask(ctx, &message{Op: opLead}, nil)
	if err != nil {
		return 0, fmt.Errorf("lead: %w", err)
	}
	return m.Incarnation, nil
}

// Yield ends this process's leadership, so that its successor can lead. Stop
// reading the workers' channels and output first. Until another leads, Reclaim
// takes it back; a yielded process may still call Successor.
func (c *Client) Yield(ctx context.Context) error {
	_, err := c.ask(ctx, &message{Op: opYield}, nil)
	return wrap("yield the lead", err)
}

// Reclaim takes the lead back after Yield, with the same incarnation, when the
// successor failed. ErrLed when another leads, ErrNotLeader when another led
// since.
func (c *Client) Reclaim(ctx context.Context) error {
	_, err := c.ask(ctx, &message{Op: opReclaim}, nil)
	return wrap("take the lead back", err)
}

// Successor returns a new channel for a process that is to follow this one, which
// calls Attach with it. The caller passes it on and closes it.
func (c *Client) Successor(ctx context.Context) (fd int, err error) {
	cl, err := c.start(ctx, &message{Op: opSuccessor}, nil)
	if err != nil {
		return -1, wrap("channel for a successor", err)
	}
	replies, err := c.wait(ctx, cl)
	if err != nil {
		return -1, wrap("channel for a successor", err)
	}
	if len(replies[0].fds) != 1 {
		closeReplies(replies)
		return -1, errors.New("channel for a successor: the keeper sent none")
	}
	return replies[0].fds[0], nil
}

// Done ends the whole unit: the keeper closes everything it holds, and its Run
// returns exitCode once this process has exited, which should be soon (it is
// killed after 2 s). The message, of at most 512 bytes, goes to the keeper's log.
func (c *Client) Done(ctx context.Context, exitCode int, text string) error {
	_, err := c.ask(ctx, &message{Op: opDone, Code: exitCode, Text: short(valid(text))}, nil)
	return wrap("end the unit", err)
}

// Terminate is closed when the keeper was asked to stop: the supervisor stops
// gracefully and calls Done.
func (c *Client) Terminate() <-chan struct{} { return c.terminate }

// Closed is closed when the channel is: the keeper is gone, refused a message of
// this process, or Close was called. A supervisor that finds it closed should end.
func (c *Client) Closed() <-chan struct{} { return c.closed }

// Close closes the channel. Calls under way return ErrClosed. It does not end the
// leadership, which the keeper takes away when this process dies.
func (c *Client) Close() error {
	c.shut.Store(true)
	err := c.conn.Close()
	<-c.readDone
	return err
}

// ask sends one request and waits for its one reply, which brings no descriptors.
func (c *Client) ask(ctx context.Context, m *message, fds []int) (*message, error) {
	cl, err := c.start(ctx, m, fds)
	if err != nil {
		return nil, err
	}
	replies, err := c.wait(ctx, cl)
	if err != nil {
		return nil, err
	}
	closeReplies(replies)
	return replies[0].msg, nil
}

// start sends a request, waiting in the poller while the keeper's queue is full.
func (c *Client) start(ctx context.Context, m *message, fds []int) (*call, error) {
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-c.closed:
		return nil, c.why()
	case <-c.send:
	}
	defer func() { c.send <- struct{}{} }()
	cl := &call{done: make(chan struct{})}
	c.mu.Lock()
	if c.ended {
		c.mu.Unlock()
		return nil, c.why()
	}
	c.lastID++
	m.ID = c.lastID
	c.pending[m.ID] = cl
	c.mu.Unlock()
	b, err := encode(m)
	if err == nil {
		err = c.sendPacket(ctx, b, fds)
	}
	if err != nil {
		c.mu.Lock()
		delete(c.pending, m.ID)
		c.mu.Unlock()
		return nil, err
	}
	return cl, nil
}

func (c *Client) sendPacket(ctx context.Context, b []byte, fds []int) error {
	var done chan struct{}
	stop := func() bool { return true }
	if ctx.Done() != nil {
		done = make(chan struct{})
		stop = context.AfterFunc(ctx, func() {
			_ = c.conn.SetWriteDeadline(time.Unix(1, 0))
			close(done)
		})
	}
	err := c.conn.Send(b, fds)
	if !stop() {
		<-done
		_ = c.conn.SetWriteDeadline(time.Time{})
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return ctx.Err()
	case errors.Is(err, sys.EPIPE):
		return fmt.Errorf("%w: %w", ErrClosed, err)
	case err != nil && c.shut.Load():
		return ErrClosed
	}
	return err
}

// wait returns the replies to a call, at least one. On error their descriptors
// are closed, also those of replies yet to come.
func (c *Client) wait(ctx context.Context, cl *call) ([]reply, error) {
	select {
	case <-cl.done:
	case <-ctx.Done():
		c.mu.Lock()
		for id, p := range c.pending {
			if p == cl {
				delete(c.pending, id)
			}
		}
		c.mu.Unlock()
		// Nobody else touches cl now: it was in pending, or done is closed.
		closeReplies(cl.replies)
		return nil, ctx.Err()
	}
	if cl.err != nil {
		closeReplies(cl.replies)
		return nil, cl.err
	}
	return cl.replies, nil
}

// read is the one goroutine that receives. It ends when the channel does.
func (c *Client) read() {
	defer close(c.readDone)
	err := c.receive()
	_ = c.conn.Close()
	if errors.Is(err, io.EOF) || c.shut.Load() {
		err = ErrClosed
	} else {
		err = fmt.Errorf("%w: %w", ErrClosed, err)
	}
	c.mu.Lock()
	c.cause, c.ended = err, true
	for _, cl := range c.pending {
		cl.err = err
		close(cl.done)
	}
	c.pending = nil
	c.mu.Unlock()
	close(c.closed)
}

func (c *Client) receive() error {
	buf := make([]byte, sys.MaxPacket)
	for {
		n, fds, err := c.conn.Recv(buf)
		var m *message
		switch {
		case errors.Is(err, sys.ErrControlTruncated):
			// This process is out of descriptors: one call fails, with all it got.
			dropped := fmt.Errorf("too many open files in this process: %w", err)
			if m, err = decodeHead(buf); err != nil {
				return err
			}
			c.deliver(m, nil, dropped)
			continue
		case err != nil:
			return err
		}
		if m, err = decode(buf[:n], len(fds)); err != nil {
			sys.CloseAll(fds)
			return err
		}
		switch m.Op {
		case opReply:
			c.deliver(m, fds, m.Failure.err(m.Text))
		case opTerminate:
			sys.CloseAll(fds)
			if !c.termed {
				c.termed = true
				close(c.terminate)
			}
		default:
			sys.CloseAll(fds)
			return fmt.Errorf("unknown message %d from the keeper", m.Op)
		}
	}
}

// deliver hands a reply to its call. Nobody waits for it any more when the
// call's context ended or an earlier part of it failed.
func (c *Client) deliver(m *message, fds []int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	cl := c.pending[m.ID]
	if cl == nil {
		sys.CloseAll(fds)
		return
	}
	cl.replies = append(cl.replies, reply{m, fds})
	if err == nil && m.More {
		return
	}
	cl.err = err
	delete(c.pending, m.ID)
	close(cl.done)
}

func (c *Client) why() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cause
}

func closeReplies(replies []reply) {
	for _, r := range replies {
		sys.CloseAll(r.fds)
	}
}

func wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}
