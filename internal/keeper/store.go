package keeper

import (
	"fmt"
	"sync/atomic"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

const (
	// storeEntries and storeBytes bound what a supervisor gone wild can make the
	// keeper hold, far above any real use.
	storeEntries = 1 << 20
	storeBytes   = 256 << 20
	// headroom is kept free of entries, for the keeper's own channels, pidfds
	// and the start of a supervisor.
	headroom = 64
)

// held is one stored entry: 48 bytes and its share of the map for one that is only a
// descriptor, as those of sessions are. It owns its descriptors, which are closed when the
// last reference is gone: a reply that is being sent keeps one, so that an entry replaced
// meanwhile does not vanish under it.
type held struct {
	next *held // same kind and id, other name
	more *more // nil for an entry that is only one descriptor
	id   uint64
	refs atomic.Int32
	fd   int32 // the only descriptor, -1 when more has them
	kind Kind
}

// more is what most entries do not have.
type more struct {
	name string
	meta string
	fds  []int32
}

func newHeld(key Key, meta []byte, fds []int) *held {
	h := &held{id: key.ID, kind: key.Kind, fd: -1}
	if len(fds) == 1 {
		h.fd = int32(fds[0])
	}
	if h.fd < 0 || key.Name != "" || len(meta) > 0 {
		h.more = &more{name: key.Name, meta: string(meta)}
		if h.fd < 0 && len(fds) > 0 {
			h.more.fds = make([]int32, len(fds))
			for i, fd := range fds {
				h.more.fds[i] = int32(fd)
			}
		}
	}
	h.refs.Store(1)
	return h
}

func (h *held) key() Key { return Key{Kind: h.kind, ID: h.id, Name: h.name()} }

func (h *held) name() string {
	if h.more == nil {
		return ""
	}
	return h.more.name
}

func (h *held) meta() string {
	if h.more == nil {
		return ""
	}
	return h.more.meta
}

// size is what the entry says besides its key.
func (h *held) size() int { return len(h.name()) + len(h.meta()) }

// count is the number of its descriptors.
func (h *held) count() int {
	if h.fd >= 0 {
		return 1
	}
	return len(h.more.fds)
}

// descriptors appends them to fds; they stay the entry's.
func (h *held) descriptors(fds []int) []int {
	if h.fd >= 0 {
		return append(fds, int(h.fd))
	}
	for _, fd := range h.more.fds {
		fds = append(fds, int(fd))
	}
	return fds
}

func (h *held) release() {
	if h.refs.Add(-1) > 0 {
		return
	}
	if h.fd >= 0 {
		_ = sys.Close(int(h.fd))
		return
	}
	for _, fd := range h.more.fds {
		_ = sys.Close(int(fd))
	}
}

func releaseAll(hs []*held) {
	for _, h := range hs {
		h.release()
	}
}

// store is owned by the keeper's loop.
type store struct {
	kinds map[Kind]map[uint64]*held
	count int
	bytes int
	fds   int // descriptors held
	limit int // NOFILE
}

func newStore(nofile uint64) *store {
	return &store{
		kinds: make(map[Kind]map[uint64]*held),
		limit: int(min(nofile, 1<<30)),
	}
}

// put stores entries and takes ownership of their descriptors in any case. It
// stores all or none.
func (s *store) put(hs []*held) error {
	fds, size := 0, 0
	for _, h := range hs {
		fds += h.count()
		size += h.size()
		if old := s.lookup(h.key()); old != nil {
			fds -= old.count() // it goes when h comes
		}
	}
	var why error
	switch {
	case s.fds+fds > s.limit-headroom:
		why = fmt.Errorf("%s: too many open files: %d descriptors held of %d allowed", hs[0].key(), s.fds, s.limit)
	case s.count+len(hs) > storeEntries:
		why = fmt.Errorf("%s: %d entries held, the limit is %d", hs[0].key(), s.count, storeEntries)
	case s.bytes+size > storeBytes:
		why = fmt.Errorf("%s: %d bytes held, the limit is %d", hs[0].key(), s.bytes, storeBytes)
	}
	if why != nil {
		releaseAll(hs)
		return why
	}
	for _, h := range hs {
		s.remove(h.key())
		ids := s.kinds[h.kind]
		if ids == nil {
			ids = make(map[uint64]*held)
			s.kinds[h.kind] = ids
		}
		h.next = ids[h.id]
		ids[h.id] = h
		s.count++
		s.bytes += h.size()
		s.fds += h.count()
	}
	return nil
}

func (s *store) lookup(key Key) *held {
	h := s.kinds[key.Kind][key.ID]
	for h != nil && h.name() != key.Name {
		h = h.next
	}
	return h
}

// remove closes what is stored under key, if anything is.
func (s *store) remove(key Key) {
	ids := s.kinds[key.Kind]
	var prev *held
	for h := ids[key.ID]; h != nil; prev, h = h, h.next {
		if h.name() != key.Name {
			continue
		}
		switch {
		case prev != nil:
			prev.next = h.next
		case h.next != nil:
			ids[key.ID] = h.next
		default:
			delete(ids, key.ID)
		}
		s.count--
		s.bytes -= h.size()
		s.fds -= h.count()
		h.release()
		return
	}
}

// find returns entries of a kind with a reference each, which the caller
// releases: those with the ids, or all when ids is nil. Unknown ids are left out.
func (s *store) find(kind Kind, ids []uint64) []*held {
	var out []*held
	add := func(h *held) {
		for ; h != nil; h = h.next {
			h.refs.Add(1)
			out = append(out, h)
		}
	}
	if ids != nil {
		for _, id := range ids {
			add(s.kinds[kind][id])
		}
		return out
	}
	for _, h := range s.kinds[kind] {
		add(h)
	}
	return out
}

func (s *store) close() {
	for _, ids := range s.kinds {
		for _, h := range ids {
			for ; h != nil; h = h.next {
				h.release()
			}
		}
	}
	s.kinds = nil
}
