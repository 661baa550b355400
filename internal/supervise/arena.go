package supervise

import (
	"context"
	"fmt"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// Arenas: the memory in which workers keep journals of their sessions in the software
// layer (package ktls). The keeper holds the descriptor, from before the worker has it
// until the last of its sessions has found another owner or its end. While the worker
// lives nobody else looks into it; see estate.go for what happens then.

// arenaSlots says how many sessions an arena of so many bytes has room for: a quarter of
// it is slots. Memory is only used where something is written.
func arenaSlots(size int64) int { return int(size / 4 / 1024) }

func arenaKey(worker uint64) keeper.Key { return keeper.Key{Kind: keeper.KindArena, ID: worker} }

// newArena makes an empty arena; the caller owns the descriptor.
func newArena(size int64) (int, error) {
	fd, err := sys.SharedMemfd("ktlsvisor-arena", size)
	if err != nil {
		return -1, err
	}
	mem, err := sys.MapShared(fd, int(size))
	if err == nil {
		err = ktls.FormatArena(mem, arenaSlots(size))
		_ = sys.Unmap(mem)
	}
	if err != nil {
		sys.CloseAll([]int{fd})
		return -1, err
	}
	return fd, nil
}

// giveArena makes the arena of a worker that can use one, and calls then with its size
// when the keeper has it; 0: there is none.
func (s *Supervisor) giveArena(w *worker, then func(size uint64)) {
	if !w.arena {
		then(0)
		return
	}
	w.arena = false
	size := int64(w.pool.cfg.CrashMemory) << 20
	fd, err := newArena(size)
	if err != nil {
		s.log.Error("a worker keeps no journals: a crash of it will cost its sessions in the software layer", "pid", w.pid, "error", err)
		then(0)
		return
	}
	s.retain.put(keeper.Entry{Key: arenaKey(w.ID), FDs: []int{fd}}, func(err error) {
		if err != nil {
			s.log.Error("a worker keeps no journals: the keeper cannot hold its arena", "pid", w.pid, "error", err)
			then(0)
			return
		}
		if w.state == workerDead {
			s.retain.delete(arenaKey(w.ID))
			return
		}
		w.arena = true
		then(uint64(size))
	})
}

// arenaOf adds a worker's arena to its WELCOME, from the keeper. Without it the worker
// keeps no journals. The descriptor is m's.
func arenaOf(ctx context.Context, k store, m *wire.Message) {
	fd, err := fetchArena(ctx, k, m.Welcome.Worker)
	if err != nil {
		m.Welcome.Arena = 0
		return
	}
	m.File = fd
}

// fetchArena returns a duplicate of a worker's arena, which the caller owns.
func fetchArena(ctx context.Context, k store, worker uint64) (int, error) {
	entries, err := k.Get(ctx, keeper.KindArena, worker)
	if err != nil {
		return -1, err
	}
	fd := -1
	for i := range entries {
		if fd < 0 && entries[i].Key == arenaKey(worker) && len(entries[i].FDs) == 1 {
			fd = entries[i].FDs[0]
			continue
		}
		sys.CloseAll(entries[i].FDs)
	}
	if fd < 0 {
		return -1, errNoArena
	}
	return fd, nil
}

// recoverArenas takes over which workers have arenas, and forgets those of workers whose
// sessions are settled.
func (s *Supervisor) recoverArenas(ctx context.Context) error {
	list, err := s.keeper.List(ctx, keeper.KindArena)
	if err != nil {
		return fmt.Errorf("arenas of workers: %w", err)
	}
	for i := range list {
		k := list[i].Key
		switch w := s.workers[k.ID]; {
		case w != nil:
			w.arena = true
		case s.estates[k.ID] == nil:
			s.retain.delete(k)
		}
	}
	return nil
}
