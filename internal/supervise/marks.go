package supervise

import (
	"context"
	"fmt"
	"sync/atomic"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// marks are a worker's words, in shared memory, about which sessions it is handling
// (package wire has the layout). The keeper holds the descriptor for successors. A
// worker can write anything there: what is read counts for sessions that it owned, and
// for nothing but the question whose fault its death was.
type marks struct {
	fd    int
	mem   []byte
	words []atomic.Uint64
}

// maxMarks is how many sessions of a worker have a mark, at most.
const maxMarks = 1 << 16

const marksName = "marks"

func (w *worker) marksKey() keeper.Key {
	return keeper.Key{Kind: keeper.KindBlob, ID: w.ID, Name: marksName}
}

// giveMarks sends a worker the memory for its marks, before its first session.
func (s *Supervisor) giveMarks(w *worker) {
	if w.able&wire.AbleMarks == 0 || w.pool.cfg.Poison == 0 || w.marks != nil {
		return
	}
	give := -1
	err := func() error {
		fd, err := sys.SharedMemfd("ktlsvisor-marks", 8*int64(1+min(s.cfg.MaxSessions, maxMarks)))
		if err != nil {
			return err
		}
		if w.marks, err = openMarks(fd); err != nil {
			return err
		}
		dup, err := sys.Dup(fd)
		if err != nil {
			return err
		}
		s.retain.put(keeper.Entry{Key: w.marksKey(), FDs: []int{dup}}, nil)
		give, err = sys.Dup(fd)
		return err
	}()
	if err != nil {
		w.marks.close()
		w.marks = nil
		s.log.Warn("a worker cannot say which sessions it is handling when it dies", "pid", w.pid, "error", err)
		return
	}
	s.send(w, &wire.Message{Type: wire.TypeMarks, File: give})
}

// openMarks owns fd, also when it fails.
func openMarks(fd int) (*marks, error) {
	size, err := sys.FileSize(fd)
	if err == nil && (size < 16 || size > 8*(1+maxMarks)) {
		err = fmt.Errorf("marks of %d bytes", size)
	}
	var mem []byte
	if err == nil {
		mem, err = sys.MapShared(fd, int(size))
	}
	if err != nil {
		sys.CloseAll([]int{fd})
		return nil, err
	}
	return &marks{fd: fd, mem: mem, words: sys.Words(mem)}, nil
}

// recoverMarks takes over what an earlier supervisor left of a worker's marks.
func (s *Supervisor) recoverMarks(ctx context.Context, w *worker) {
	entries, err := s.keeper.Get(ctx, keeper.KindBlob, w.ID)
	for i := range entries {
		e := &entries[i]
		if e.Key != w.marksKey() || len(e.FDs) != 1 || w.marks != nil {
			sys.CloseAll(e.FDs)
			continue
		}
		w.marks, err = openMarks(e.FDs[0])
	}
	if err != nil {
		s.log.Warn("it cannot be seen which sessions a worker is handling", "pid", w.pid, "error", err)
	}
}

// forgetMarks drops the marks of workers that are no more: an earlier supervisor died
// between forgetting a worker and them.
func (s *Supervisor) forgetMarks(ctx context.Context) error {
	list, err := s.keeper.List(ctx, keeper.KindBlob)
	if err != nil {
		return fmt.Errorf("marks of workers: %w", err)
	}
	for i := range list {
		if k := list[i].Key; k.Name == marksName && s.workers[k.ID] == nil {
			s.retain.delete(k)
		}
	}
	return nil
}

func (m *marks) close() {
	if m == nil {
		return
	}
	_ = sys.Unmap(m.mem)
	sys.CloseAll([]int{m.fd})
}

// handled returns the sessions of a worker whose handlers' own code was running.
func (m *marks) handled(w *worker) (list []*session) {
	for id := range m.handling() {
		if ls := w.Sessions[id]; ls != nil {
			list = append(list, sessionOf(ls))
		}
	}
	return list
}

// handling returns the sessions that are marked so, whoever owns them.
func (m *marks) handling() map[uint64]bool {
	ids := map[uint64]bool{}
	used := min(m.words[0].Load(), uint64(len(m.words)-1))
	for i := uint64(1); i <= used; i++ {
		if word := m.words[i].Load(); word&wire.MarkHandling != 0 && word&wire.MarkWriting == 0 {
			ids[word&wire.MarkID] = true
		}
	}
	return ids
}
