package supervise

import (
	"context"
	"sync"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// keeperTimeout bounds one exchange with the keeper. The keeper does nothing that
// waits, so running into this means that the machine is stuck or the keeper dead.
const keeperTimeout = 30 * time.Second

// store is what the supervisor needs of the keeper while it serves.
type store interface {
	Put(ctx context.Context, entries ...keeper.Entry) error
	Get(ctx context.Context, kind keeper.Kind, ids ...uint64) ([]keeper.Entry, error)
	List(ctx context.Context, kind keeper.Kind) ([]keeper.Entry, error)
	Delete(ctx context.Context, keys ...keeper.Key) error
}

// retainer passes orders to the keeper, in order and in batches, outside the
// goroutine that owns the ledger.
type retainer struct {
	client store
	post   func(func())

	mu     sync.Mutex
	queue  []order
	wake   chan struct{}
	closed bool
	done   chan struct{}
}

// order stores an entry (put set), ends a session's connection (shut set) or
// deletes a key. The descriptors of an entry belong to the order and are closed
// when it is done. then is posted to the ledger's goroutine with the result; nil
// if nobody asks.
type order struct {
	put  *keeper.Entry
	shut uint64 // session id
	del  keeper.Key
	then func(error)
	// look, with shut set, asks whether the connection is still open, instead of
	// ending it; the answer is posted.
	look func(open bool)
}

func (o *order) kind() int {
	switch {
	case o.put != nil:
		return 0
	case o.shut != 0:
		return 1
	default:
		return 2
	}
}

func newRetainer(c store, post func(func())) *retainer {
	r := &retainer{client: c, post: post, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go r.run()
	return r
}

func (r *retainer) put(e keeper.Entry, then func(error)) { r.add(order{put: &e, then: then}) }

func (r *retainer) delete(keys ...keeper.Key) {
	for _, k := range keys {
		r.add(order{del: k})
	}
}

// shutdown sends FIN to the peer of a session, through the retained socket.
func (r *retainer) shutdown(id uint64) { r.add(order{shut: id}) }

// inspect posts whether a session's connection is still open.
func (r *retainer) inspect(id uint64, then func(open bool)) { r.add(order{shut: id, look: then}) }

func (r *retainer) add(o order) {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		if o.put != nil {
			sys.CloseAll(o.put.FDs)
		}
		return
	}
	r.queue = append(r.queue, o)
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// close carries out what is queued and ends the retainer.
func (r *retainer) close() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
	<-r.done
}

func (r *retainer) run() {
	defer close(r.done)
	for range r.wake {
		for {
			r.mu.Lock()
			batch := r.queue
			r.queue = nil
			closed := r.closed
			r.mu.Unlock()
			if len(batch) == 0 {
				if closed {
					return
				}
				break
			}
			r.carryOut(batch)
		}
	}
}

// carryOut splits a batch into runs of one kind, so that order holds.
func (r *retainer) carryOut(batch []order) {
	for len(batch) > 0 {
		n := 1
		for n < len(batch) && n < 512 && batch[n].kind() == batch[0].kind() {
			n++
		}
		run := batch[:n]
		batch = batch[n:]
		ctx, cancel := context.WithTimeout(context.Background(), keeperTimeout)
		var err error
		switch run[0].kind() {
		case 0:
			entries := make([]keeper.Entry, len(run))
			for i := range run {
				entries[i] = *run[i].put
			}
			err = r.client.Put(ctx, entries...)
			if err != nil && n > 1 {
				// One entry that cannot be kept must not take the others with it.
				cancel()
				for i := range run {
					r.carryOut(run[i : i+1])
				}
				continue
			}
			for i := range entries {
				sys.CloseAll(entries[i].FDs)
			}
		case 1:
			err = r.touchSockets(ctx, run)
		default:
			keys := make([]keeper.Key, len(run))
			for i := range run {
				keys[i] = run[i].del
			}
			err = r.client.Delete(ctx, keys...)
		}
		cancel()
		for i := range run {
			if then := run[i].then; then != nil {
				r.post(func() { then(err) })
			}
		}
	}
}

// touchSockets ends connections, or looks whether they are open.
func (r *retainer) touchSockets(ctx context.Context, run []order) error {
	var ids []uint64
	seen := map[uint64]bool{}
	for i := range run { // a session may be named more than once
		if id := run[i].shut; !seen[id] {
			seen[id] = true
			ids = append(ids, id)
		}
	}
	entries, err := r.client.Get(ctx, keeper.KindSocket, ids...)
	socks := make(map[uint64][]int, len(entries))
	for i := range entries {
		socks[entries[i].Key.ID] = entries[i].FDs
	}
	for i := range run { // in order
		open := err != nil // then nobody has seen it closed
		for _, fd := range socks[run[i].shut] {
			if run[i].look != nil {
				open = sys.TCPOpen(fd)
			} else {
				_ = sys.ShutdownBoth(fd) // the peer may be gone already
			}
		}
		if look := run[i].look; look != nil {
			r.post(func() { look(open) })
		}
	}
	for i := range entries {
		sys.CloseAll(entries[i].FDs)
	}
	return err
}
