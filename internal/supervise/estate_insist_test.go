package supervise

import (
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/testlog"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// denied makes the keeper fail the next n questions for entries of a kind.
func (u *unit) denied(kind keeper.Kind, n int32) (asked *atomic.Int32) {
	asked = &atomic.Int32{}
	u.store.mu.Lock()
	defer u.store.mu.Unlock()
	u.store.deny = func(k keeper.Kind) error {
		if k == kind && asked.Add(1) <= n {
			return errors.New("out of descriptors, for a moment")
		}
		return nil
	}
	return asked
}

// withArena gives a worker an arena, as if it kept journals in it.
func (u *unit) withArena(f *fake) {
	u.t.Helper()
	fd, err := newArena(1 << 20)
	if err != nil {
		u.t.Fatal(err)
	}
	defer closeFDs([]int{fd})
	if err := u.store.Put(u.t.Context(), keeper.Entry{Key: arenaKey(f.w.ID), FDs: []int{fd}}); err != nil {
		u.t.Fatal(err)
	}
	u.s.call(func() { f.w.arena = true })
}

// A keeper that cannot give a dead worker's arena, or sockets, at the moment is asked again:
// no session is given up for that.
func TestEstateIsAskedForAgain(t *testing.T) {
	for name, kind := range map[string]keeper.Kind{"arena": keeper.KindArena, "sockets": keeper.KindSocket} {
		t.Run(name, func(t *testing.T) {
			u := newUnit(t)
			f := u.worker(1)
			u.withArena(f)
			ref := u.owned(f, true)
			asked := u.denied(kind, 3)
			var h heir
			u.s.call(func() { h = u.s.heir(u.s.sessions[ref.ID]) })
			e := &estate{worker: f.w.ID}
			batch := []heir{h}
			u.s.recoverBatch(e, batch)
			if !errors.Is(batch[0].err, ktls.ErrNoJournal) || asked.Load() < 4 {
				t.Errorf("%v after %d questions, want that the arena was looked at", batch[0].err, asked.Load())
			}
			_ = sys.Unmap(e.mem)
		})
	}
}

// Sessions in the kernel layer can do without the arena: all of a worker's wait for it
// once, and not batch after batch.
func TestKernelLayerWaitsForAnArenaOnce(t *testing.T) {
	u := newUnit(t)
	f := u.worker(1)
	u.withArena(f)
	ref := u.owned(f, false)
	asked := u.denied(keeper.KindArena, 1<<30)
	e := &estate{worker: f.w.ID, until: time.Now()} // an earlier batch has waited
	for range 3 {
		var h heir
		u.s.call(func() { h = u.s.heir(u.s.sessions[ref.ID]) })
		batch := []heir{h}
		u.s.recoverBatch(e, batch)
		if batch[0].err != nil {
			t.Error(batch[0].err)
		}
	}
	if n := asked.Load(); n != 3 {
		t.Errorf("the keeper was asked %d times for three batches, want once for each", n)
	}
}

// Sessions in the kernel layer go on without what was committed when the arena is damaged,
// and it is said which ones.
func TestDamagedArenaIsSaid(t *testing.T) {
	u := newUnit(t)
	var said testlog.Buffer
	f := u.worker(1)
	ref := u.owned(f, false)
	fd, err := sys.SharedMemfd("damaged", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer closeFDs([]int{fd})
	if err := u.store.Put(t.Context(), keeper.Entry{Key: arenaKey(f.w.ID), FDs: []int{fd}}); err != nil {
		t.Fatal(err)
	}
	var h heir
	u.s.call(func() {
		u.s.log = hclog.New(&hclog.LoggerOptions{Output: &said})
		h = u.s.heir(u.s.sessions[ref.ID])
	})
	batch := []heir{h}
	u.s.recoverBatch(&estate{worker: f.w.ID}, batch)
	if batch[0].err != nil {
		t.Error(batch[0].err)
	}
	if text := said.String(); !strings.Contains(text, "count=1 sessions="+sid(ref.ID)) {
		t.Errorf("said: %s", text)
	}
}
