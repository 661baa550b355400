package handoff

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// ErrNoCommit is returned by Commit and Checkpoint in a program that did not ask for
// them with WithCommit or WithCheckpoint.
var ErrNoCommit = ktls.ErrNoCommit

// commitMode says what is kept of sessions for the case that this process dies.
type commitMode uint8

const (
	commitNothing commitMode = iota
	commitStates             // WithCheckpoint
	commitAll                // WithCommit
)

// WithCommit makes Conn.Commit available: input is kept from when it is read until it is
// committed. A handler must then commit what it is done with: beyond
// ktls.MaxUncommitted bytes Read fails with ktls.ErrUncommitted. docs/crash.md says what
// a crash restores.
func WithCommit() Option { return func(o *options) { o.commit = commitAll } }

// WithCheckpoint makes Conn.Checkpoint available without keeping input: after a crash
// State is the last checkpoint, and what was read since is gone.
func WithCheckpoint() Option {
	return func(o *options) { o.commit = max(o.commit, commitStates) }
}

// Commit says in one step, which a crash of this process leaves done or undone as a
// whole: the first consumed bytes of what Read has given since the last Commit are done
// with; state is what the next run of the handler gets from State (nil: unchanged);
// output reaches the client, once. After a crash, and after a move too, the next run
// reads everything again that was read and not committed, and what is left of output is
// sent before anything else.
//
// At most ktls.MaxQueued bytes of output and ktls.MaxCommitState bytes of state. Commit
// keeps state, which must not be changed afterwards. It returns when the socket has taken
// output, or nil as well when a deadline or a move came first: it is committed, and sent
// by whoever comes next. While a move is wanted it may return ErrMoving, with nothing
// committed. Any other error means that the session is at its end, or that nothing was
// committed.
//
// Write may be used beside Commit, but not all of what it was given needs to have left
// after a crash, nor is it sent again: a session of which that may be is Interrupted, until
// its next Commit. SetState is for moves only. Needs WithCommit.
func (c *Conn) Commit(consumed int, state, output []byte) error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	defer c.written(c.writing())
	for {
		c.mu.Lock()
		s, err := c.usableLocked()
		moving := err == nil && c.wantsOutLocked()
		c.told = c.told || errors.Is(err, ErrMoving)
		c.mu.Unlock()
		if err != nil {
			return err
		}
		done, err := s.Commit(consumed, state, output, !moving)
		c.mu.Lock()
		if done && state != nil {
			c.app = state
		}
		ours := c.wantsOutLocked() || c.dead != nil
		expired := !c.wdl.IsZero() && !time.Now().Before(c.wdl)
		if moving && errors.Is(err, ktls.ErrQueueFull) {
			c.told = true
			err = ErrMoving
		}
		c.mu.Unlock()
		switch {
		case moving:
			c.flush() // when the move was called off meanwhile
			return err
		case err == nil:
			return nil
		case !errors.Is(err, os.ErrDeadlineExceeded):
			return c.failed(err)
		case done:
			c.flush()
			return nil
		case !ours && expired:
			return err
		}
	}
}

// Checkpoint makes state what the next run of the handler gets from State, also after a
// crash: Commit(0, state, nil). Needs WithCheckpoint or WithCommit.
func (c *Conn) Checkpoint(state []byte) error {
	if state == nil {
		state = []byte{}
	}
	return c.Commit(0, state, nil)
}

// Durable reports whether what is committed outlives a crash of this process. It does
// not where the pool has crash_exact = false, in a program that is its own supervisor,
// and when the arena was full. Moves are exact in any case.
func (c *Conn) Durable() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	// In the software layer a session goes on from its journal, or not at all.
	return c.commits.Live() && c.durable && (c.tls.Layer() != ktls.LayerSoftware || c.place.Live())
}

// takeCommits begins keeping what is committed of a session; nil: nothing is. durable:
// in the supervisor's arena.
func (w *worker) takeCommits(id uint64, epoch wire.Epoch, t *ktls.Conn, state []byte) (k *ktls.Commits, durable bool) {
	if w.commit == commitNothing {
		return nil, false
	}
	key := ktls.JournalKey{ID: id, Epoch: uint64(epoch)}
	var err error
	if w.arena != nil {
		if k, err = w.arena.NewCommits(t, key, state, w.commit == commitStates); err == nil {
			return k, true
		}
		w.log.Warn("a crash of this worker will cost what is committed of a session", "session", id, "error", err)
	}
	private, err := w.private.open()
	if err != nil {
		w.log.Error("Commit is not possible", "error", err)
		return nil, false
	}
	if k, err = private.NewCommits(t, key, state, w.commit == commitStates); err != nil {
		w.log.Error("Commit is not possible", "session", id, "error", err)
		return nil, false
	}
	return k, false
}

// lazyArena is made when the first session needs it. Sessions that come back onto their
// Conns do so in goroutines of their own.
type lazyArena struct {
	mu sync.Mutex
	a  *ktls.Arena
}

func (l *lazyArena) open() (a *ktls.Arena, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.a == nil {
		l.a, err = privateArena()
	}
	return l.a, err
}

// opened is nil when nobody has needed it yet.
func (l *lazyArena) opened() *ktls.Arena {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.a
}

// privateArena is for sessions that nobody could go on with: for moves.
func privateArena() (*ktls.Arena, error) {
	const size, slots = 16 << 30, 1 << 17 // of memory that is not there before it is used
	fd, err := sys.SharedMemfd("ktlsvisor-commits", size)
	if err != nil {
		return nil, err
	}
	defer sys.CloseAll([]int{fd})
	mem, err := sys.MapShared(fd, size)
	if err != nil {
		return nil, err
	}
	if err := ktls.FormatArena(mem, slots); err != nil {
		_ = sys.Unmap(mem)
		return nil, fmt.Errorf("memory for commits: %w", err)
	}
	return ktls.OpenArena(mem)
}

// rewind makes a run of the handler begin with what is not committed.
func (c *Conn) rewind() {
	if c.w.commit == commitAll {
		c.session().Rewind()
	}
}
