package ktls

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// ErrArenaFull says that an arena has no place for another session, or no room for
// what a session has in progress.
var ErrArenaFull = errors.New("the arena of the journal is full")

// chunkSizes are the lengths of chunks in bytes: those of the layer's buffers, and
// larger ones for plaintext that waits.
var chunkSizes = [...]int{smallBuf, midBuf, bigBuf, sendBuf, 256 << 10, 512 << 10, 1 << 20, 2 << 20, maxRecord}

// Arena is the owner's side of an arena: it hands out places and chunks. Which are
// free it keeps to itself, since nobody needs to know that after its death.
type Arena struct {
	mem []byte

	mu        sync.Mutex
	slots     int
	nextSlot  int // never used from here on
	freeSlots []int
	nextPage  int // never used from here on
	classes   [len(chunkSizes)]chunkClass

	births atomic.Uint64 // of Commits
	lost   atomic.Uint64 // sessions that went on without a journal
}

// chunkClass holds free chunks of one size, the last used on top.
type chunkClass struct {
	warm []*buffer
	low  int       // the fewest in warm since the last Trim
	cold []*buffer // without memory
}

// OpenArena uses memory that FormatArena prepared and no other process uses. The
// Arena does not own mem, which must stay mapped as long as it or any Place is used.
func OpenArena(mem []byte) (*Arena, error) {
	slots, err := checkArena(mem)
	if err != nil {
		return nil, err
	}
	return &Arena{mem: mem, slots: slots, nextPage: chunksAt(slots) / arenaPage}, nil
}

// Place takes a slot for a session; Conn.Journal begins to use it. ErrArenaFull when
// there is none. The caller frees it.
func (a *Arena) Place(key JournalKey) (*Place, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	i := a.nextSlot
	switch n := len(a.freeSlots); {
	case n > 0:
		i, a.freeSlots = a.freeSlots[n-1], a.freeSlots[:n-1]
	case i < a.slots:
		a.nextSlot++
		sys.StoreShared(a.mem[arenaUsed:], uint64(a.nextSlot))
	default:
		a.lost.Add(1)
		return nil, ErrArenaFull
	}
	return &Place{a: a, slot: i, m: a.mem[arenaHeader+i*slotSize:][:slotSize:slotSize], key: key}, nil
}

// HasPlace says whether Place would find one, at this moment.
func (a *Arena) HasPlace() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.freeSlots) > 0 || a.nextSlot < a.slots
}

// Lost counts the sessions that went on without a journal because the arena was full.
func (a *Arena) Lost() uint64 { return a.lost.Load() }

// alloc returns a chunk of at least n bytes, or nil.
func (a *Arena) alloc(n int) *buffer {
	i := 0
	for ; i < len(chunkSizes) && chunkSizes[i] < n; i++ {
	}
	if i == len(chunkSizes) {
		return nil
	}
	c := &a.classes[i]
	a.mu.Lock()
	defer a.mu.Unlock()
	if k := len(c.warm); k > 0 {
		b := c.warm[k-1]
		c.warm = c.warm[:k-1]
		c.low = min(c.low, k-1)
		return b
	}
	c.low = 0
	if k := len(c.cold); k > 0 {
		b := c.cold[k-1]
		c.cold = c.cold[:k-1]
		return b
	}
	pages := (chunkSizes[i] + arenaPage - 1) / arenaPage
	if a.nextPage+pages > len(a.mem)/arenaPage {
		return nil
	}
	b := &buffer{b: a.mem[a.nextPage*arenaPage:][:chunkSizes[i]:chunkSizes[i]], page: uint32(a.nextPage), class: uint8(i)}
	a.nextPage += pages
	return b
}

func (a *Arena) free(b *buffer) {
	c := &a.classes[b.class]
	a.mu.Lock()
	c.warm = append(c.warm, b)
	a.mu.Unlock()
}

// Trim gives the memory of chunks back that nobody needed since the last Trim. It is
// called from time to time, by one goroutine.
func (a *Arena) Trim() error {
	var errs []error
	for i := range a.classes {
		c := &a.classes[i]
		a.mu.Lock()
		idle := append([]*buffer(nil), c.warm[:c.low]...)
		c.warm = c.warm[:copy(c.warm, c.warm[c.low:])]
		c.low = len(c.warm)
		a.mu.Unlock()
		if len(idle) == 0 {
			continue
		}
		for _, b := range idle {
			pages := (len(b.b) + arenaPage - 1) / arenaPage
			if err := sys.FreeShared(a.mem[int(b.page)*arenaPage:][:pages*arenaPage]); err != nil {
				errs = append(errs, err)
			}
		}
		a.mu.Lock()
		c.cold = append(c.cold, idle...)
		a.mu.Unlock()
	}
	return errors.Join(errs...)
}

// Place is one session's part of an arena. What the methods of its Conn publish there
// stays as it is after Detach and Close, until Free: an owner that dies before it could
// say that it has given the session away still has it on record.
type Place struct {
	a    *Arena
	slot int
	m    []byte
	key  JournalKey
	off  atomic.Bool // goes on without a journal

	// What the peer has asked for, see rxOwed.
	updates, renegs atomic.Uint32

	gens [3]uint64 // of the registers; each belongs to who publishes it

	mu   sync.Mutex
	held []*buffer // of a Conn that is detached or closed
}

// Key returns the key that the place was taken with.
func (p *Place) Key() JournalKey { return p.key }

// Live says whether the session's journal is kept. It ends when the arena is full.
func (p *Place) Live() bool { return p != nil && !p.off.Load() }

// Free ends the session's journal and gives the place back. The session must be
// detached or closed, or never have been journaled there.
func (p *Place) Free() {
	sys.StoreShared(p.m, stateFree)
	clear(p.m[slotKeys:slotRegs])
	p.mu.Lock()
	held := p.held
	p.held = nil
	p.mu.Unlock()
	for _, b := range held {
		p.a.free(b)
	}
	p.a.mu.Lock()
	p.a.freeSlots = append(p.a.freeSlots, p.slot)
	p.a.mu.Unlock()
}

// quit lets the session go on without a journal.
func (p *Place) quit() {
	if p.off.Swap(true) {
		return
	}
	p.a.lost.Add(1)
	sys.StoreShared(p.m, stateOff)
}

// publish makes w the valid content of a register.
func (p *Place) publish(r register, w *words) {
	p.gens[r]++
	w.store(p.m, p.key.ID, r, p.gens[r])
}

// hold keeps a chunk that the published registers refer to until Free.
func (p *Place) hold(b *buffer) {
	if b == nil {
		return
	}
	if b.page == 0 {
		putBuffer(b)
		return
	}
	p.mu.Lock()
	p.held = append(p.held, b)
	p.mu.Unlock()
}

// get returns a buffer of at least n bytes, a chunk while there is a journal. When
// the arena is full the journal ends.
func (p *Place) get(n int) *buffer {
	if p != nil && !p.off.Load() {
		if b := p.a.alloc(n); b != nil {
			return b
		}
		p.quit()
	}
	return getBuffer(n)
}

func (p *Place) put(b *buffer) {
	if b != nil && b.page != 0 {
		p.a.free(b)
	} else if b != nil {
		putBuffer(b)
	}
}

// blob is plaintext that waits, in a chunk: b[from:to].
type blob struct {
	buf      *buffer
	from, to int
}

func (b *blob) len() int { return b.to - b.from }

// add appends to b. old, when not nil, may be freed when the new place is published.
func (b *blob) add(p *Place, data []byte) (old *buffer) {
	switch {
	case b.buf == nil:
		b.buf, b.from, b.to = p.get(len(data)), 0, 0
	case b.to+len(data) <= len(b.buf.b):
	case b.len() == 0 && len(data) <= len(b.buf.b):
		b.from, b.to = 0, 0
	default:
		old = b.buf
		n := b.len()
		b.buf = p.get(max(n+len(data), min(2*n, maxRecord)))
		b.to = copy(b.buf.b, old.b[b.from:b.to])
		b.from = 0
	}
	b.to += copy(b.buf.b[b.to:], data)
	return old
}

// take removes n bytes from the front. done, when not nil, is a chunk that may be freed
// when that is published.
func (b *blob) take(n int) (done *buffer) {
	if b.from += n; b.from < b.to {
		return nil
	}
	done = b.buf
	*b = blob{}
	return done
}

func (a *Arena) String() string {
	return fmt.Sprintf("arena of %d bytes for %d sessions", len(a.mem), a.slots)
}
