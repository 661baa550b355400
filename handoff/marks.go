package handoff

import (
	"fmt"
	"sync/atomic"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// The supervisor finds out over which session a worker died by marks in memory that it
// shares with the worker: for each session, whether the handler's own code runs, which
// is from Read's return with input to the next call of Read, and not while Write waits
// for the client; for members of a group also while a method of Groups runs. The layout is in package wire.

// marks hands the words out. It belongs to the worker's loop.
type marks struct {
	words []atomic.Uint64
	used  int   // words behind the first that were ever handed out
	free  []int // oldest first: a late Read on a closed Conn must not meet the next session
}

// takeMarks begins with the memory that MARKS brought.
func (w *worker) takeMarks(m *wire.Message) error {
	defer m.CloseSockets()
	if w.marks != nil || len(w.sessions) > 0 {
		return fmt.Errorf("%w: MARKS come once, and before the first ADOPT", wire.ErrProtocol)
	}
	size, err := sys.FileSize(m.File)
	if err != nil || size < 16 || size > maxMarks {
		return fmt.Errorf("%w: MARKS with a memory of %d bytes: %w", wire.ErrProtocol, size, err)
	}
	mem, err := sys.MapShared(m.File, int(size))
	if err != nil {
		return fmt.Errorf("%w: MARKS: %w", wire.ErrProtocol, err)
	}
	w.marks = &marks{words: sys.Words(mem)} // mapped as long as the process lives
	return nil
}

// maxMarks bounds the memory of marks, in bytes.
const maxMarks = 64 << 20

// give hands a word to a session. With more sessions than words the last ones have none.
func (k *marks) give(c *Conn) {
	if k == nil {
		return
	}
	i := 0
	switch {
	case k.used+1 < len(k.words):
		k.used++
		i = k.used
		k.words[0].Store(uint64(k.used))
	case len(k.free) > 0:
		i = k.free[0]
		k.free = k.free[1:]
	default:
		return
	}
	k.words[i].Store(c.id)
	c.markAt = i
	c.mark.Store(&k.words[i])
}

// take has a session's word back.
func (k *marks) take(c *Conn) {
	m := c.mark.Swap(nil)
	if m == nil {
		return
	}
	m.Store(0)
	k.free = append(k.free, c.markAt)
}

// begins and returns stand around a run of the handler.
func (c *Conn) begins() { c.running.Store(true); c.handling() }

func (c *Conn) returns() { c.running.Store(false); c.waiting() }

// calling marks sessions while a callback of their group runs, which is the application's
// code as well: a worker that dies in it dies over all of them. The loop calls it before,
// and what it returns afterwards.
func calling(conns []*Conn) (called func()) {
	each := func(bits uint64) {
		for _, c := range conns {
			if m := c.mark.Load(); m != nil && !c.running.Load() {
				m.Store(c.id | bits)
			}
		}
	}
	each(wire.MarkHandling)
	return func() { each(0) }
}

// conns are those of a group's members.
func (b *batch) conns() []*Conn {
	l := make([]*Conn, 0, len(b.members))
	for _, s := range b.members {
		l = append(l, s.conn)
	}
	return l
}

// handling says that the handler's code runs from here on.
func (c *Conn) handling() {
	if m := c.mark.Load(); m != nil && c.running.Load() {
		m.Store(c.id | wire.MarkHandling)
	}
}

// waiting says that it does not.
func (c *Conn) waiting() {
	if m := c.mark.Load(); m != nil {
		m.Store(c.id)
	}
}

// writing says that handling is interrupted until written is called with what it
// returned. What another goroutine writes while the handler waits for input changes
// nothing.
func (c *Conn) writing() *atomic.Uint64 {
	m := c.mark.Load()
	if m == nil || !m.CompareAndSwap(c.id|wire.MarkHandling, c.id|wire.MarkHandling|wire.MarkWriting) {
		return nil
	}
	return m
}

func (c *Conn) written(m *atomic.Uint64) {
	if m != nil {
		m.CompareAndSwap(c.id|wire.MarkHandling|wire.MarkWriting, c.id|wire.MarkHandling)
	}
}
