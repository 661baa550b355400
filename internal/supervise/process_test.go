package supervise

import (
	"errors"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// A worker that the keeper cannot hold never serves: a successor would take it for
// dead and give its sessions to another.
func TestWorkerThatTheKeeperCannotHoldNeverServes(t *testing.T) {
	for name, full := range map[string]bool{"held": false, "keeper full": true} {
		t.Run(name, func(t *testing.T) {
			u := newUnit(t)
			f := u.worker(1)
			u.s.call(func() { f.w.state, f.w.deadline = workerStarting, time.Now().Add(patience) })
			u.store.mu.Lock()
			u.store.full = full
			u.store.mu.Unlock()
			f.send(&wire.Message{Type: wire.TypeHello, Hello: &wire.Hello{Min: 1, Max: 1}})
			f.send(&wire.Message{Type: wire.TypeReady})
			u.silent(f) // before the keeper has answered there is no WELCOME
			u.s.call(func() {
				if f.w.state != workerStarting {
					t.Errorf("it is %v before the keeper holds it", f.w.state)
				}
				fd, err := f.w.ch.Dup()
				if err == nil {
					err = u.s.retainWorker(f.w, fd, func(err error) { u.s.workerRetained(f.w, err) })
				}
				if err != nil {
					t.Error(err)
				}
			})
			if !full {
				f.expect(wire.TypeWelcome)
				u.until(func() bool { return f.w.state == workerReady })
				return
			}
			u.until(func() bool { return f.w.state == workerDead })
			if !errors.Is(f.w.broke, keeper.ErrFull) {
				t.Errorf("the reason is %v", f.w.broke)
			}
		})
	}
}

// A unit that stops while a worker is being started does not end before that worker
// is gone, and does end then.
func TestStopWhileAWorkerIsBeingStarted(t *testing.T) {
	u := newUnit(t)
	dead := make(chan error, 1)
	u.s.call(func() {
		u.s.spawn(u.pool, 1, []string{"/bin/sleep", "1000"}, func(w *worker, err error) {
			if w != nil || err == nil {
				t.Errorf("worker %v, error %v: the unit stops", w, err)
			}
		})
		u.s.stopping = true
		u.s.allDead = func() {
			var err error
			if u.pool.starting > 0 || len(u.s.workers) > 0 {
				err = errors.New("a worker is left")
			}
			dead <- err
		}
		u.s.checkAllDead()
	})
	select {
	case err := <-dead:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("the stop does not end")
	}
}

// Descriptors of a program that cannot be started are closed.
func TestProgramThatCannotBeStartedLeaksNothing(t *testing.T) {
	first, err := sys.Dup(0)
	if err != nil {
		t.Fatal(err)
	}
	sys.CloseAll([]int{first})
	for range 3 {
		if _, err := startProcess([]string{"/nonexistent"}, "", nil, 0, 0); err == nil {
			t.Fatal("it was started")
		}
	}
	again, err := sys.Dup(0)
	if err != nil {
		t.Fatal(err)
	}
	sys.CloseAll([]int{again})
	if again != first {
		t.Errorf("the next free descriptor was %d and is %d", first, again)
	}
}
