package handoff

import (
	"errors"
	"os"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// A session at rest is phaseIdle: ours, with no handler. What makes it different from
// one that is just between two runs of its handler is that the next run waits for
// input. All of it belongs to the worker's loop.
type rest struct {
	after time.Duration
	watch *sys.Watch
	tick  *time.Ticker
	trim  sys.Trim
	left  int // sessions that left and are still watched
}

// startRest begins giving sessions a rest, if the program wants that.
func (w *worker) startRest() (tick <-chan time.Time, end func()) {
	if w.restAfter <= 0 {
		return nil, func() {}
	}
	watch, err := sys.NewWatch()
	if err != nil {
		w.log.Warn("sessions get no rest: idle ones take more memory", "error", err)
		return nil, func() {}
	}
	w.rest = &rest{after: w.restAfter, watch: watch, tick: time.NewTicker(max(w.restAfter/2, 10*time.Millisecond))}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			ids, err := watch.Wait()
			if err != nil {
				if !errors.Is(err, os.ErrClosed) {
					w.in.post(func() { w.restFailed(err) })
				}
				return
			}
			ids = append([]uint64(nil), ids...)
			w.in.post(func() {
				for _, id := range ids {
					if s := w.sessions[id]; s != nil {
						w.wake(s)
					}
				}
			})
		}
	}()
	return w.rest.tick.C, func() {
		w.rest.tick.Stop()
		_ = watch.Close()
		<-done
	}
}

// restFailed starts all handlers again, and no session gets a rest any more.
func (w *worker) restFailed(err error) {
	w.log.Error("sessions get no rest any more: waiting for their input failed", "error", err)
	for _, s := range w.snapshot() {
		w.wake(s)
	}
	w.rest.after = 0
}

// restIdle asks the handlers of idle sessions to return, once every half of the time
// that a session must have been idle.
func (w *worker) restIdle() {
	now := w.ticks.Add(1) | 1<<31 // never 0
	w.rest.trim.Tick()
	if w.rest.after == 0 || w.stopping || w.handlers == 0 { // none to look for among very many
		return
	}
	for _, s := range w.sessions {
		if s.phase == phaseRunning && s.group == "" && s.join == nil && s.attempt == 0 && s.next == 0 && !s.kicked && s.conn.tire(now) {
			s.resting, s.frozen = true, true
		}
	}
}

// tire makes Read return ErrMoving when the handler has waited in it for two ticks,
// and nothing else is going on.
func (c *Conn) tire(now uint32) bool {
	since := c.since.Load()
	if since == 0 || now-since < 2 {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	idle := c.dead == nil && !c.detached && !c.moving.on && !c.stopping && !c.flushing && c.barrier == nil &&
		c.holds == 0 && c.rdl.IsZero() && c.tls.Buffered() == 0 && c.tls.Uncommitted() == 0 && c.tls.Pending() == 0
	if !idle || !c.since.CompareAndSwap(since, 0) { // Read came back
		return false
	}
	c.tired = true
	c.interruptLocked()
	return true
}

// isTired reports that the handler was asked to return for a rest, and for nothing else
// since: only then it has nothing more to do before there is input.
func (c *Conn) isTired() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.tired
}

// fresh takes tire back: there was input after all, or its end, and what the handler
// writes now is to be sent.
func (c *Conn) fresh() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.tired {
		c.goOnLocked()
	}
}

// sleep lets an idle session wait for input without a handler. It reports that it
// cannot, and the handler has to run.
func (w *worker) sleep(s *session) bool {
	c := s.conn
	c.mu.Lock()
	c.told = false
	c.wdl = time.Time{} // the handler's, and for what is sent now it would be over
	c.mu.Unlock()
	c.thaw() // other goroutines of the application may still write, or close it
	if w.rest.after == 0 || s.join != nil || s.group != "" || c.session().Buffered() > 0 {
		return false
	}
	c.session().Trim()
	if err := c.watched(func(fd int) error { return w.rest.watch.Add(fd, s.id) }); err != nil {
		return false // most likely it was closed, which the handler's Read says
	}
	s.asleep = true
	if c.isDead() { // Close came in between, and nobody would wake it
		w.awake(s)
		return false
	}
	w.rest.trim.Did(1)
	return true
}

// wake starts the handler of a session at rest.
func (w *worker) wake(s *session) {
	if s.asleep {
		w.awake(s)
		w.step(s)
	}
}

// awake ends the wait for input.
func (w *worker) awake(s *session) {
	if s.asleep {
		// After Close there is no descriptor any more; the kernel forgets the rest with
		// the supervisor's duplicate.
		_ = s.conn.watched(w.rest.watch.Remove)
	}
	s.asleep, s.resting = false, false
}

// leaves is awake for a session that is to be parked. The kernel goes on watching it:
// taking it out takes longer than anything else that parking does, and as a rule this
// process ends soon. At most one more event comes of that, which nobody waits for; what
// returns is put in anew.
func (w *worker) leaves(s *session) {
	s.watched = s.watched || s.asleep
	s.asleep, s.resting = false, false
}

// maxWatched bounds what the kernel watches for nothing, some 200 bytes each.
const maxWatched = 1 << 16

// unwatch is for a session that has left, whose descriptor is about to be closed: as long
// as others have duplicates, that alone does not end the watching.
func (w *worker) unwatch(s *session) {
	if s.watched && w.rest != nil {
		if w.rest.left++; w.rest.left > maxWatched {
			_ = watched(s.kept.sock, w.rest.watch.Remove)
		}
	}
}

func (c *Conn) watched(f func(fd int) error) error { return watched(c.session().Socket(), f) }

// watched runs f on the descriptor of a socket.
func watched(sock ktls.Socket, f func(fd int) error) error {
	rc, err := sock.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := rc.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}

func (c *Conn) isDead() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.dead != nil
}
