package supervise

import (
	"context"
	"sync"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// memStore is a keeper in this process.
type memStore struct {
	mu      sync.Mutex
	full    bool                         // nothing more can be put
	hold    func(e keeper.Entry)         // called before it is put; nil: nothing
	deny    func(kind keeper.Kind) error // called before something is got; nil: nothing
	entries map[keeper.Key]keeper.Entry
}

func newMemStore() *memStore { return &memStore{entries: map[keeper.Key]keeper.Entry{}} }

func dupAll(fds []int) ([]int, error) {
	var out []int
	for _, fd := range fds {
		n, err := sys.Dup(fd)
		if err != nil {
			sys.CloseAll(out)
			return nil, err
		}
		out = append(out, n)
	}
	return out, nil
}

func (m *memStore) Put(_ context.Context, entries ...keeper.Entry) error {
	m.mu.Lock()
	hold := m.hold
	m.mu.Unlock()
	for i := range entries {
		if hold != nil {
			hold(entries[i])
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.full {
		return keeper.ErrFull
	}
	for _, e := range entries {
		fds, err := dupAll(e.FDs)
		if err != nil {
			return err
		}
		sys.CloseAll(m.entries[e.Key].FDs)
		e.FDs = fds
		m.entries[e.Key] = e
	}
	return nil
}

func (m *memStore) Get(_ context.Context, kind keeper.Kind, ids ...uint64) ([]keeper.Entry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.deny != nil {
		if err := m.deny(kind); err != nil {
			return nil, err
		}
	}
	want := map[uint64]bool{}
	for _, id := range ids {
		want[id] = true
	}
	var out []keeper.Entry
	for k, e := range m.entries {
		if k.Kind != kind || len(ids) > 0 && !want[k.ID] {
			continue
		}
		fds, err := dupAll(e.FDs)
		if err != nil {
			return nil, err
		}
		e.FDs = fds
		out = append(out, e)
	}
	return out, nil
}

func (m *memStore) List(_ context.Context, kind keeper.Kind) ([]keeper.Entry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []keeper.Entry
	for k, e := range m.entries {
		if k.Kind == kind {
			out = append(out, keeper.Entry{Key: e.Key, Meta: e.Meta})
		}
	}
	return out, nil
}

func (m *memStore) Delete(_ context.Context, keys ...keeper.Key) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, k := range keys {
		sys.CloseAll(m.entries[k].FDs)
		delete(m.entries, k)
	}
	return nil
}

func (m *memStore) closeAll() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for k, e := range m.entries {
		sys.CloseAll(e.FDs)
		delete(m.entries, k)
	}
}
