package supervise

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/pidfd"
)

// Sessions without a duplicate at the keeper: pools with retain = false. Their sockets
// are at the keeper only while nobody owns them.
//
//	ADOPT, RESUME     the worker has it, the keeper's duplicate goes (within a second)
//	PARKED            brings it back, to the keeper first, then the move goes on
//	it hangs, or has  SIGSTOP, its sockets are taken by pidfd_getfd and go to the keeper,
//	to be killed      SIGKILL; from there on it is any death
//	the worker dies   the kernel closes what it had: its sessions are lost, and counted
//
// A worker that cannot send sockets back, because it is of another kind or older, is
// treated as if retain were true.

const (
	// takeTimeout bounds the taking of a worker's sockets.
	takeTimeout = 10 * time.Second
	// takeBatch is how many sockets are held here at a time, on their way to the keeper.
	takeBatch = 64
	// sweepEvery is how often the keeper's surplus duplicates are dropped.
	sweepEvery = time.Second
)

const goneWithWorker = "its worker died, and its socket with it (retain = false)"

// sweepSockets drops the keeper's duplicates of sessions that a worker without
// duplicates owns.
func (s *Supervisor) sweepSockets(now time.Time) {
	if now.Before(s.sweepAt) || s.recovery != nil || s.holding {
		return
	}
	s.sweepAt = now.Add(sweepEvery)
	for _, w := range s.workers {
		if !w.bare || w.killed {
			continue
		}
		for _, o := range w.Sessions {
			ss := sessionOf(o)
			if !ss.away && ss.Try == nil && (ss.rekey == nil || ss.rekey.ops == 0) {
				ss.away = true
				s.retain.delete(ss.key())
			}
		}
	}
}

// parkSockets takes the sockets that PARKED brings to the keeper. It runs in the
// goroutine that reads w's channel, before the message is handled: whatever the worker
// says next comes after it, and so does the end of its channel.
func (s *Supervisor) parkSockets(w *worker, m *wire.Message) error {
	if m.Type != wire.TypeParked || !m.HasSockets() {
		return nil
	}
	defer m.CloseSockets()
	var put []keeper.Entry
	err := errEnding
	s.call(func() { put, err = s.checkSockets(w, m) })
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(s.ctx, keeperTimeout)
	defer cancel()
	kept, err := s.keepSockets(ctx, put)
	for i := range m.Items {
		ref := m.Items[i].Ref
		if m.Items[i].Socket >= 0 || kept[ref.ID] {
			continue
		}
		s.post(func() { s.socketNotKept(ref, err) })
	}
	return nil
}

// checkSockets takes what is to go to the keeper out of a PARKED.
func (s *Supervisor) checkSockets(w *worker, m *wire.Message) (put []keeper.Entry, err error) {
	for i := range m.Items {
		it := &m.Items[i]
		ss := s.sessions[it.ID]
		switch {
		case !it.WithSocket || ss == nil || ss.owner() != w:
			// onParked finds the same, and has the words for it.
		case !w.bare:
			err = fmt.Errorf("%w: PARKED with the socket of session %s, which WELCOME did not ask for", wire.ErrProtocol, sid(it.ID))
		case !s.isSocketOf(it.Socket, ss):
			err = fmt.Errorf("%w: PARKED with a socket that is not that of session %s", wire.ErrProtocol, sid(it.ID))
		}
	}
	if err != nil {
		return nil, err
	}
	for i := range m.Items {
		it := &m.Items[i]
		ss := s.sessions[it.ID]
		if it.WithSocket && ss != nil && ss.owner() == w && ss.Try != nil && ss.Try.Epoch == it.Epoch {
			put = append(put, keeper.Entry{Key: ss.key(), FDs: []int{it.Socket}})
			it.Socket, ss.away = -1, false
		}
	}
	return put, nil
}

// keepSockets gives entries to the keeper, behind all earlier orders, and waits. It
// returns the ids of those that are there.
func (s *Supervisor) keepSockets(ctx context.Context, list []keeper.Entry) (kept map[uint64]bool, err error) {
	type result struct {
		id  uint64
		err error
	}
	results := make(chan result, len(list))
	for i := range list {
		id := list[i].Key.ID
		s.retain.put(list[i], func(err error) { results <- result{id, err} })
	}
	kept = map[uint64]bool{}
	for range list {
		select {
		case r := <-results:
			if r.err != nil {
				err = r.err
				continue
			}
			kept[r.id] = true
		case <-ctx.Done():
			return kept, ctx.Err()
		case <-s.done:
			return kept, errEnding
		}
	}
	return kept, err
}

// socketNotKept takes back the attempt of a session whose socket came back and could not
// be kept; its worker has another one.
func (s *Supervisor) socketNotKept(ref wire.Ref, err error) {
	ss := s.sessions[ref.ID]
	if ss == nil || ss.Try == nil || ss.Try.Epoch != ref.Epoch {
		return
	}
	ss.away = true
	s.refuse(ss.Try, fmt.Sprintf("the keeper cannot hold its socket: %v", err))
}

// withoutSocket says that a PARKED of w does not bring what it has to.
func (w *worker) withoutSocket(m *wire.Message) error {
	for i := range m.Items {
		if w.bare && !m.Items[i].WithSocket {
			return fmt.Errorf("%w: PARKED without the socket of session %s, which WELCOME asked for", wire.ErrProtocol, sid(m.Items[i].ID))
		}
	}
	return nil
}

// isSocketOf says whether fd is a duplicate of the socket that ss was admitted with.
func (s *Supervisor) isSocketOf(fd int, ss *session) bool {
	want := s.cookie(ss)
	got, err := sys.SocketCookie(fd)
	return err == nil && got == want && want != 0
}

func (s *Supervisor) cookie(ss *session) uint64 {
	f, err := ss.allFacts(s.led)
	if err != nil {
		return 0
	}
	return f.Cookie
}

// takeAndKill is how a worker without duplicates is killed: stopped, so that its
// descriptors stay what they are, its sockets taken, killed. Being stopped is no fence;
// nothing is concluded from it, and its sessions wait for its death like all others.
func (s *Supervisor) takeAndKill(w *worker, why string) {
	want := map[uint64]uint64{} // ids by cookie
	for _, o := range w.Sessions {
		ss := sessionOf(o)
		if c := s.cookie(ss); ss.away && c != 0 {
			want[c] = ss.ID
		}
	}
	all := len(want)
	go func() {
		ctx, cancel := context.WithTimeout(s.ctx, takeTimeout)
		defer cancel()
		taken, err := s.takeSockets(ctx, w, want)
		s.post(func() {
			for _, id := range taken {
				if ss := s.sessions[id]; ss != nil && ss.owner() == w {
					ss.away = false
				} else if ss == nil {
					s.retain.delete(socketKey(id)) // it ended meanwhile
				}
			}
			if len(taken) < all {
				s.log.Error("not all sockets of a worker that is to be killed could be taken: those sessions are lost", "pool", w.pool.name, "pid", w.pid,
					"taken", len(taken), "sessions", all, "error", err)
			} else {
				s.log.Info("took the sockets of a worker that is to be killed", "pool", w.pool.name, "pid", w.pid, "taken", len(taken))
			}
			s.sigkill(w, why)
		})
	}()
}

// takeSockets stops a worker and gives its sockets, found by their cookies, to the
// keeper. It returns the ids of those that are there.
func (s *Supervisor) takeSockets(ctx context.Context, w *worker, want map[uint64]uint64) (taken []uint64, err error) {
	if err := w.proc.Signal(syscall.SIGSTOP); err != nil {
		return nil, err
	}
	var batch []keeper.Entry
	flush := func() error {
		list := batch
		batch = nil
		kept, err := s.keepSockets(ctx, list)
		for id := range kept {
			taken = append(taken, id)
		}
		return err
	}
	err = eachSocket(ctx, w.proc, w.pid, func(fd int, cookie uint64) (keep, more bool, err error) {
		id, ok := want[cookie]
		if !ok {
			return false, true, nil
		}
		delete(want, cookie) // it may have several
		batch = append(batch, keeper.Entry{Key: socketKey(id), FDs: []int{fd}})
		if len(batch) == takeBatch {
			err = flush()
		}
		return true, len(want) > 0, err
	})
	return taken, errors.Join(err, flush())
}

// eachSocket takes the descriptors of a process one after the other, and calls f with
// those that are sockets, which closes what it keeps.
func eachSocket(ctx context.Context, proc *pidfd.Process, pid int, f func(fd int, cookie uint64) (keep, more bool, err error)) error {
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return fmt.Errorf("descriptors of a worker: %w", err)
	}
	// The process is not waited for before its death was seen here, so while it lives
	// the id is its own.
	if dead, err := proc.Dead(); err != nil || dead {
		return errors.Join(pidfd.ErrDead, err)
	}
	for _, e := range list {
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		fd, err := proc.GetFD(n)
		if errors.Is(err, syscall.EBADF) {
			continue // closed meanwhile
		}
		if err != nil {
			return err
		}
		cookie, err := sys.SocketCookie(fd)
		if err != nil {
			sys.CloseAll([]int{fd})
			continue
		}
		keep, more, err := f(fd, cookie)
		if !keep {
			sys.CloseAll([]int{fd})
		}
		if err != nil || !more {
			return err
		}
	}
	return nil
}

// borrowed runs f with a duplicate of a socket that only a worker has.
func borrowed(ctx context.Context, proc *pidfd.Process, pid int, cookie uint64, f func(fd int) error) error {
	found := false
	var ferr error
	err := eachSocket(ctx, proc, pid, func(fd int, c uint64) (bool, bool, error) {
		if c != cookie {
			return false, true, nil
		}
		found = true
		ferr = f(fd)
		return false, false, nil
	})
	switch {
	case found:
		return ferr
	case err != nil:
		return fmt.Errorf("%w: %w", errNoSocket, err)
	}
	return errNoSocket
}

// bareReady looks, once, whether the sockets of a worker could be taken if it hung: better
// to know now.
func (s *Supervisor) bareReady(w *worker) {
	if !w.bare {
		return
	}
	proc, pool, pid := w.proc, w.pool.name, w.pid
	go func() {
		fd, err := proc.GetFD(wire.ChannelFD)
		if err == nil {
			sys.CloseAll([]int{fd})
			return
		}
		if !errors.Is(err, pidfd.ErrDead) && !errors.Is(err, syscall.EBADF) && !errors.Is(err, os.ErrClosed) {
			s.log.Error("the sockets of this worker could not be taken if it hung, and its sessions would be lost; use retain = true, or give the right",
				"pool", pool, "pid", pid, "error", err)
		}
	}()
}

// bareKeeper is what WELCOME says to a worker of whose sockets nobody keeps duplicates.
func (s *Supervisor) bareKeeper(w *worker) int {
	if !w.bare {
		return 0
	}
	return max(s.keeperPID, 1)
}

func socketKey(id uint64) keeper.Key { return keeper.Key{Kind: keeper.KindSocket, ID: id} }
