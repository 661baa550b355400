package handoff

import (
	"errors"
	"slices"
	"sync"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// inbox carries events to the worker's loop. Posting never blocks; there are a few
// events a session at most.
type inbox struct {
	mu     sync.Mutex
	list   []func()
	signal chan struct{}
}

func newInbox() *inbox { return &inbox{signal: make(chan struct{}, 1)} }

func (b *inbox) post(f func()) {
	b.mu.Lock()
	b.list = append(b.list, f)
	b.mu.Unlock()
	select {
	case b.signal <- struct{}{}:
	default:
	}
}

func (b *inbox) take() []func() {
	b.mu.Lock()
	defer b.mu.Unlock()
	l := b.list
	b.list = nil
	return l
}

// maxQueued bounds the messages that wait for a supervisor which does not read. It
// is far above what it may ask for at a time: see PROTOCOL.md, Flow control.
const maxQueued = 1 << 16

// outbox sends messages in order from a goroutine of its own, so that neither the
// loop nor a handler ever waits for the supervisor. Messages of the same kind that
// wait are put together.
type outbox struct {
	ch     *wire.Channel
	failed func(m *wire.Message, err error) // m was not sent; gone says the channel is of no use
	sent   chan struct{}                    // closed when run ends

	mu      sync.Mutex
	cond    sync.Cond
	list    []*wire.Message
	load    wire.Load // of the last message of list
	closing bool
	sending *wire.Message   // taken off list and not known to be sent
	unsent  []*wire.Message // PARKEDs whose failure the loop has not heard of
}

func newOutbox(ch *wire.Channel, failed func(*wire.Message, error)) *outbox {
	q := &outbox{ch: ch, failed: failed, sent: make(chan struct{})}
	q.cond.L = &q.mu
	return q
}

var errFlood = errors.New("the supervisor asks and does not read the answers")

func (q *outbox) put(m *wire.Message) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.list) >= maxQueued {
		return errFlood
	}
	if n := len(q.list); n > 0 && q.list[n-1].Type == m.Type && q.mergeLocked(q.list[n-1], m) {
		return nil
	}
	q.list = append(q.list, m)
	q.load = loadOf(m)
	q.cond.Broadcast()
	return nil
}

func loadOf(m *wire.Message) (sum wire.Load) {
	for i := range m.Items {
		sum = sum.Add(wire.LoadOf(&m.Items[i]))
	}
	return sum
}

// mergeLocked puts m into last, which waits, when that keeps the meaning and limits.
func (q *outbox) mergeLocked(last, m *wire.Message) bool {
	switch m.Type {
	case wire.TypeParked:
		sum := q.load.Add(loadOf(m))
		if m.Group != "" || last.Group != "" || !sum.Fits() {
			return false
		}
		last.Items = append(last.Items, m.Items...)
		q.load = sum
	case wire.TypeAdopted:
		if len(last.Refs)+len(m.Refs) > wire.MaxItems {
			return false
		}
		last.Refs = append(last.Refs, m.Refs...)
	case wire.TypeRefused:
		if len(last.Refused)+len(m.Refused) > wire.MaxItems {
			return false
		}
		last.Refused = append(last.Refused, m.Refused...)
	case wire.TypeClosed:
		if len(last.Closed)+len(m.Closed) > wire.MaxItems {
			return false
		}
		last.Closed = append(last.Closed, m.Closed...)
	default:
		return false
	}
	return true
}

// heard takes m off the messages that abandon reports.
func (q *outbox) heard(m *wire.Message) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.unsent = slices.DeleteFunc(q.unsent, func(x *wire.Message) bool { return x == m })
}

// abandon gives up what waits, and returns the PARKEDs that never left: a message is
// one packet, sent whole or not at all. The channel must be closed, so that a send in
// progress ends at once.
func (q *outbox) abandon() []*wire.Message {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.sending != nil {
		q.cond.Wait()
	}
	parked := q.unsent
	for _, m := range q.list {
		if m.Type == wire.TypeParked {
			parked = append(parked, m)
		}
		m.Dispose()
	}
	q.list, q.unsent = nil, nil
	return parked
}

// close lets run end when everything is sent.
func (q *outbox) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closing = true
	q.cond.Broadcast()
}

func (q *outbox) run() {
	defer close(q.sent)
	for {
		q.mu.Lock()
		for len(q.list) == 0 && !q.closing {
			q.cond.Wait()
		}
		if len(q.list) == 0 {
			q.mu.Unlock()
			return
		}
		m := q.list[0]
		q.list[0] = nil
		q.list = q.list[1:]
		q.sending = m
		q.mu.Unlock()
		err := q.ch.Give(m) // its sockets are duplicates, and the records to keep are elsewhere
		q.mu.Lock()
		q.sending = nil
		if err != nil && m.Type == wire.TypeParked {
			q.unsent = append(q.unsent, m)
		}
		q.cond.Broadcast()
		q.mu.Unlock()
		if err != nil {
			q.failed(m, err)
		}
	}
}
