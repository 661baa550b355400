package ktls

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// Commits is one session's part of an arena for what its application commits. Like a
// Place it stays as it is after Detach and Close of its Conn, until Free.
type Commits struct {
	place     *Place
	m         []byte
	stateOnly bool

	mu             sync.Mutex
	rec            commitRecord // as published
	in, state, out *buffer
	read           uint64 // counted like wordReceived: what the application was given
	want           int    // room for the next receive
	freed          bool
	off            atomic.Bool // goes on without being kept

	// Under the Conn's write lock: the front of its queued output.
	lead int // bytes that come before the committed ones
	left int // committed bytes
}

// NewCommits takes a place for the commits of the session c, with the state that it
// came with (nil: none), and makes c use it: what c has pushed back and queued is kept
// there from now on. With stateOnly, input and output are not. It is called before c is
// used; key is as for the journal, and the session's journal begins after it. The caller
// frees it. ErrArenaFull when there is no room.
func (a *Arena) NewCommits(c *Conn, key JournalKey, state []byte, stateOnly bool) (*Commits, error) {
	if len(state) > MaxCommitState {
		return nil, fmt.Errorf("session %d: state of %d bytes, the limit for a commit is %d", key.ID, len(state), MaxCommitState)
	}
	p, err := a.Place(key)
	if err != nil {
		return nil, err
	}
	k := &Commits{place: p, m: p.m, stateOnly: stateOnly, want: smallBuf}
	sys.StoreShared(k.m, stateFree)
	binary.LittleEndian.PutUint64(k.m[slotID:], key.ID) // never 0 again: readers stop there
	clear(k.m[slotEpoch:])
	sys.OpenNote(k.m[commitNoteRX:])
	sys.OpenNote(k.m[commitNoteTX:])
	k.rec = commitRecord{id: key.ID, epoch: key.Epoch, born: a.births.Add(1), consumed: countFrom, inBase: countFrom}
	k.read = countFrom
	k.set(wordReceived, countFrom)
	c.rmu.Lock()
	defer c.rmu.Unlock()
	c.wmu.Lock()
	defer c.wmu.Unlock()
	k.fill(c, state)
	k.publish(k.rec)
	if k.off.Load() {
		k.Free()
		return nil, fmt.Errorf("session %d: %w", key.ID, ErrArenaFull)
	}
	sys.StoreShared(k.m, stateCommit)
	c.commits = k
	if !stateOnly {
		c.unread = nil // from here on in k.in
		if k.out != nil {
			c.queued = k.out.b[:k.left:k.left]
		}
	}
	if l, ok := c.layer.(*kernelLayer); ok && !stateOnly {
		l.noted = k.m
	}
	c.noteBuffered()
	return k, nil
}

// fill puts what there is into chunks.
func (k *Commits) fill(c *Conn, state []byte) {
	if state != nil {
		k.state = k.chunk(state)
		k.rec.state, k.rec.stateLen = chunkRef(k.state), uint32(len(state))
		k.rec.flags |= commitHasState
	}
	if k.stateOnly {
		k.rec.flags |= commitStateOnly
		return
	}
	if n := len(c.unread); n > 0 {
		k.in = k.chunk(c.unread)
		k.rec.in = chunkRef(k.in)
		k.set(wordReceived, countFrom+uint64(n))
	}
	if n := len(c.queued); n > 0 {
		k.out = k.chunk(c.queued)
		k.rec.out, k.rec.outLen, k.left = chunkRef(k.out), uint32(n), n
	}
}

// chunk returns a chunk that begins with data; nil for no data.
func (k *Commits) chunk(data ...[]byte) *buffer {
	n := 0
	for _, d := range data {
		n += len(d)
	}
	if n == 0 {
		return nil
	}
	b := k.alloc(n)
	n = 0
	for _, d := range data {
		n += copy(b.b[n:], d)
	}
	return b
}

// alloc returns a chunk of at least n bytes. When the arena is full the session goes on
// without being kept.
func (k *Commits) alloc(n int) *buffer {
	if !k.off.Load() {
		if b := k.place.a.alloc(n); b != nil {
			return b
		}
		k.quit()
	}
	return &buffer{b: make([]byte, n)}
}

// quit lets the session go on without being kept.
func (k *Commits) quit() {
	if !k.off.Swap(true) {
		k.place.a.lost.Add(1)
		sys.StoreShared(k.m, stateOff)
	}
}

// Live says whether what is committed outlives this process. It ends when the arena is
// full; the session goes on, and its moves are exact as before.
func (k *Commits) Live() bool { return k != nil && !k.off.Load() }

func (k *Commits) set(word int, v uint64) { sys.StoreShared(k.m[word:], v) }
func (k *Commits) get(word int) uint64    { return sys.LoadShared(k.m[word:]) }

// publish makes rec the session's, by one entry.
func (k *Commits) publish(rec commitRecord) {
	rec.seq = k.rec.seq + 1
	rec.store(k.m[commitEntry+commitEntryLen*int(rec.seq&1):])
	k.rec = rec
}

func (k *Commits) free(b *buffer) {
	if b != nil && b.page != 0 {
		k.place.a.free(b)
	}
}

// Free gives the place back. The Conn must be detached or closed.
func (k *Commits) Free() {
	if k == nil {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.freed {
		return
	}
	k.freed = true
	sys.StoreShared(k.m, stateFree)
	clear(k.m[commitEntry:commitWords])
	k.free(k.in)
	k.free(k.state)
	k.free(k.out)
	k.in, k.state, k.out = nil, nil, nil
	k.place.Free()
}

// room returns where the next input goes, with at least one byte. It is called by the
// reader only, who has read everything before.
func (k *Commits) room() ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	end := k.get(wordReceived)
	live := int(end - k.rec.consumed)
	if live >= MaxUncommitted {
		return nil, ErrUncommitted
	}
	at := int(end - k.rec.inBase)
	if k.in != nil && live == 0 && at > 0 && (len(k.in.b) >= k.want) {
		rec := k.rec // nothing in the chunk is wanted any more
		rec.inBase = end
		k.publish(rec)
		at = 0
	}
	if k.in == nil || len(k.in.b)-at < min(k.want, smallBuf) {
		b := k.alloc(live + k.want)
		if k.in != nil {
			copy(b.b, k.in.b[at-live:at])
		}
		old := k.in
		rec := k.rec
		rec.in, rec.inBase = chunkRef(b), end-uint64(live)
		k.publish(rec)
		k.in, at = b, live
		k.free(old)
	}
	return k.in.b[at:min(len(k.in.b), at+k.want)], nil
}

// idle gives the chunk for input back when nothing is in it. It reports that there is
// none.
func (k *Commits) idle() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	end := k.get(wordReceived)
	if end != k.rec.consumed {
		return false
	}
	if k.in != nil {
		rec, old := k.rec, k.in
		rec.in, rec.inBase = 0, end
		k.publish(rec)
		k.in = nil
		k.free(old)
	}
	return true
}

// received counts n bytes that are where room said.
func (k *Commits) received(n, room int) {
	k.set(wordReceived, k.get(wordReceived)+uint64(n))
	switch {
	case n == room && k.want < bigBuf:
		k.want = min(4*k.want, bigBuf)
	case n < k.want/8:
		k.want = max(k.want/4, smallBuf)
	}
}

// give copies input that was received and not given.
func (k *Commits) give(p []byte) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	end := k.get(wordReceived)
	if k.read >= end {
		return 0
	}
	n := copy(p, k.in.b[k.read-k.rec.inBase:end-k.rec.inBase])
	k.read += uint64(n)
	return n
}

// waiting is how much input was received and not given.
func (k *Commits) waiting() int {
	if k == nil || k.stateOnly {
		return 0
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return int(k.get(wordReceived) - k.read)
}

// pushBack makes p be given next. What of it is the end of what was given since the last
// commit is taken back; anything else counts as given when it is given again. It becomes
// part of what the next owner reads, as it does in a move: behind what was given and not
// committed, and before what waits.
func (k *Commits) pushBack(p []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var given, waits []byte
	if k.in != nil {
		at := k.read - k.rec.inBase
		given, waits = k.in.b[k.rec.consumed-k.rec.inBase:at], k.in.b[at:k.get(wordReceived)-k.rec.inBase]
	}
	switch {
	case bytes.HasSuffix(given, p):
		k.read -= uint64(len(p))
		return
	case bytes.HasSuffix(p, given):
		k.read = k.rec.consumed
		waits = append(bytes.Clone(given), waits...)
		p, given = p[:len(p)-len(given)], nil
	}
	if len(given)+len(p)+len(waits) > MaxUncommitted {
		k.quit() // a next owner may not have so much
	}
	// The counters of what was received stay as they are: this input lies before.
	n := uint64(len(p))
	old, in := k.in, k.chunk(given, p, waits)
	rec := k.rec
	rec.consumed -= n
	rec.in, rec.inBase = chunkRef(in), rec.consumed
	k.publish(rec)
	k.in = in
	k.read -= n
	k.free(old)
}

// rewind makes everything that is not committed be given again.
func (k *Commits) rewind() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.read = k.rec.consumed
}

// born tells a session's Commits from earlier ones under the same key.
func (k *Commits) born() uint64 {
	if k == nil {
		return 0
	}
	return k.rec.born
}

// ahead is how much of the front of the Conn's queued output is committed.
func (k *Commits) ahead() int {
	if k == nil {
		return 0
	}
	return k.lead + k.left
}

// count is how many bytes of input were received so far.
func (k *Commits) count() uint64 {
	if k == nil {
		return 0
	}
	return k.get(wordReceived)
}

// uncommitted is a copy of all input that is not committed.
func (k *Commits) uncommitted() []byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.in == nil {
		return nil
	}
	return append([]byte(nil), k.in.b[k.rec.consumed-k.rec.inBase:k.get(wordReceived)-k.rec.inBase]...)
}

// commit publishes a commit: consumed more bytes are done with; state, unless it is
// nil, is the new state; output comes behind rest, which is what is left of the output
// committed before. before is how many bytes are to go out before these, counting from
// sent on. It returns rest and output in their place.
func (k *Commits) commit(consumed int, state, rest, output []byte, sent uint64) (queued []byte, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if consumed < 0 || uint64(consumed) > k.read-k.rec.consumed && !k.stateOnly {
		return nil, fmt.Errorf("commit of %d bytes of input: %d were read since the last one", consumed, k.read-k.rec.consumed)
	}
	rec := k.rec
	rec.commits++
	if !k.stateOnly {
		rec.consumed += uint64(consumed)
	}
	oldState, oldOut := k.state, k.out
	newState, newOut := k.state, k.out
	if state != nil {
		newState = k.chunk(state)
		rec.state, rec.stateLen = chunkRef(newState), uint32(len(state))
		rec.flags |= commitHasState
	}
	if len(output) > 0 {
		newOut = k.chunk(rest, output)
		n := len(rest) + len(output)
		rec.out, rec.outLen, rec.outBase = chunkRef(newOut), uint32(n), sent
		queued = newOut.b[:n:n]
	}
	k.publish(rec)
	k.state, k.out = newState, newOut
	if newState != oldState {
		k.free(oldState)
	}
	if newOut != oldOut {
		k.free(oldOut)
	}
	return queued, nil
}

// allSent frees the output's chunk: the counters say that nothing in it is wanted.
func (k *Commits) allSent() {
	k.mu.Lock()
	defer k.mu.Unlock()
	old := k.out
	k.out = nil
	k.free(old)
}
