package handoff

import (
	"os"
	"sync"
	"time"
)

// barrier holds back the input of a group's members after a move until the handlers
// of all of them ask for input (or have left): what one member says then reaches all
// the others.
type barrier struct {
	mu      sync.Mutex
	missing map[*Conn]struct{}
	open    chan struct{}
	timer   *time.Timer
}

// newBarrier waits for conns, at most limit; late is then called with the number of
// members that are missing.
func newBarrier(conns []*Conn, limit time.Duration, late func(missing int)) *barrier {
	b := &barrier{missing: make(map[*Conn]struct{}, len(conns)), open: make(chan struct{})}
	for _, c := range conns {
		b.missing[c] = struct{}{}
	}
	if len(conns) == 0 {
		close(b.open)
		return b
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.timer = time.AfterFunc(limit, func() {
		b.mu.Lock()
		n := len(b.missing)
		clear(b.missing)
		if n > 0 {
			close(b.open)
		}
		b.mu.Unlock()
		if n > 0 {
			late(n)
		}
	})
	return b
}

// leave counts c as arrived.
func (b *barrier) leave(c *Conn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.missing[c]; !ok {
		return
	}
	delete(b.missing, c)
	if len(b.missing) == 0 {
		b.timer.Stop()
		close(b.open)
	}
}

// wait arrives and waits for the others. It returns nil when there is something new
// for the caller to look at.
func (b *barrier) wait(c *Conn, moving, dead <-chan struct{}, deadline time.Time) error {
	b.leave(c)
	var expired <-chan time.Time
	if !deadline.IsZero() {
		t := time.NewTimer(time.Until(deadline))
		defer t.Stop()
		expired = t.C
	}
	select {
	case <-b.open:
		c.mu.Lock()
		if c.barrier == b {
			c.barrier = nil
		}
		c.mu.Unlock()
	case <-moving:
	case <-dead:
	case <-expired:
		return os.ErrDeadlineExceeded
	}
	return nil
}
