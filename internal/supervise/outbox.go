package supervise

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// maxQueued bounds the messages waiting for one worker. Moves are limited in
// number, so only a worker that stopped reading its channel reaches it.
const maxQueued = 1 << 16

var errWorkerStuck = errors.New("the worker does not read its control channel")

// outbox sends messages to one worker in order, from its own goroutine: the
// goroutine that owns the ledger only ever appends (I7). For ADOPT it fetches the
// sockets from the keeper just before sending, so the supervisor holds no
// descriptor of a session.
type outbox struct {
	ch     *wire.Channel
	keeper store
	// missing is called for a session whose socket the keeper does not have.
	missing func(wire.Ref)
	// failed is called once when nothing can be sent any more.
	failed func(error)

	mu     sync.Mutex
	queue  []*wire.Message
	closed bool
	wake   chan struct{}
	done   chan struct{}
	ctx    context.Context
	cancel context.CancelFunc
}

func newOutbox(ch *wire.Channel, k store, missing func(wire.Ref), failed func(error)) *outbox {
	o := &outbox{ch: ch, keeper: k, missing: missing, failed: failed,
		wake: make(chan struct{}, 1), done: make(chan struct{})}
	o.ctx, o.cancel = context.WithCancel(context.Background())
	go o.run()
	return o
}

// add queues a message, whose descriptor it takes over; false means that the worker does not read and its queue
// is full.
func (o *outbox) add(m *wire.Message) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		m.CloseSockets()
		return true
	}
	if len(o.queue) >= maxQueued {
		m.CloseSockets()
		return false
	}
	o.queue = append(o.queue, m)
	select {
	case o.wake <- struct{}{}:
	default:
	}
	return true
}

// drain sends what is queued and ends the outbox; cancelling ctx gives up on it.
func (o *outbox) drain(ctx context.Context) error {
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	select {
	case o.wake <- struct{}{}:
	default:
	}
	select {
	case <-o.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", errWorkerStuck, ctx.Err())
	}
}

// abandon drops what is queued. The channel must be closed by the caller.
func (o *outbox) abandon() {
	o.mu.Lock()
	for _, m := range o.queue {
		m.CloseSockets()
	}
	o.closed, o.queue = true, nil
	o.mu.Unlock()
	o.cancel()
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

func (o *outbox) run() {
	defer close(o.done)
	for range o.wake {
		for {
			o.mu.Lock()
			if len(o.queue) == 0 {
				closed := o.closed
				o.mu.Unlock()
				if closed {
					return
				}
				break
			}
			m := o.queue[0]
			o.queue[0] = nil
			o.queue = o.queue[1:]
			o.mu.Unlock()
			if err := o.send(m); err != nil {
				o.abandon()
				o.failed(fmt.Errorf("send %s: %w", m.Type, err))
				return
			}
		}
	}
}

func (o *outbox) send(m *wire.Message) error {
	if m.Type != wire.TypeAdopt {
		defer m.CloseSockets() // the file of MARKS or WELCOME
		if m.Welcome != nil && m.Welcome.Arena > 0 {
			ctx, cancel := context.WithTimeout(o.ctx, keeperTimeout)
			defer cancel()
			arenaOf(ctx, o.keeper, m)
		}
		return o.ch.Send(m)
	}
	ids := make([]uint64, len(m.Items))
	for i := range m.Items {
		ids[i] = m.Items[i].ID
	}
	ctx, cancel := context.WithTimeout(o.ctx, keeperTimeout)
	entries, err := o.keeper.Get(ctx, keeper.KindSocket, ids...)
	cancel()
	if err != nil {
		// The keeper is out of reach or out of descriptors; the worker is not to blame.
		for i := range m.Items {
			o.missing(m.Items[i].Ref)
		}
		return nil
	}
	socks := make(map[uint64]int, len(entries))
	for i := range entries {
		if len(entries[i].FDs) == 1 {
			socks[entries[i].Key.ID] = entries[i].FDs[0]
		} else {
			sys.CloseAll(entries[i].FDs)
		}
	}
	defer func() {
		for _, fd := range socks {
			sys.CloseAll([]int{fd})
		}
	}()
	out := *m
	out.Items = make([]wire.Item, 0, len(m.Items))
	for _, it := range m.Items {
		fd, ok := socks[it.ID]
		if !ok {
			o.missing(it.Ref)
			continue
		}
		it.Socket = fd
		out.Items = append(out.Items, it)
	}
	if len(out.Items) == 0 && len(out.Blobs) == 0 && !out.Last {
		return nil
	}
	err = o.ch.Send(&out)
	if wire.Shortage(err) {
		for i := range out.Items {
			o.missing(out.Items[i].Ref)
		}
		return nil
	}
	return err
}
