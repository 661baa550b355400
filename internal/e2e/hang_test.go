package e2e

import (
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
	"github.com/ktlsvisor/ktlsvisor/internal/load"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
	"github.com/ktlsvisor/ktlsvisor/pidfd"
)

// alert is a heartbeat that finds a hanging worker soon, and still no slow one.
const alert = "heartbeat = \"200ms\"\nhang_timeout = \"4s\""

// stopWorker stops a worker that has sessions, and waits until the supervisor has
// killed it and everything is in order again. live says how many sessions are then
// left.
func (u *unit) stopWorker(f *fleet, live func(victim admin.WorkerStatus) int) (victim admin.WorkerStatus, after *admin.Status) {
	u.t.Helper()
	hangs := u.status().Counters.Hangs
	for _, w := range u.settled(f.n).Pools[0].Workers {
		if w.Sessions > victim.Sessions {
			victim = w
		}
	}
	f.Phase("stopped worker", true)
	if err := u.Signal(victim.PID, syscall.SIGSTOP); err != nil {
		u.t.Fatal(err)
	}
	after = u.await("the worker's end", func(st *admin.Status) bool {
		return st.Counters.Hangs == hangs+1 && !slices.Contains(visor.WorkerPIDs(st), victim.PID) && visor.Settled(st) && len(st.Pools[0].Workers) == 2 && st.Sessions.Total == live(victim)
	})
	// It is dead: continuing it wakes nobody who could write. Its parent may not have
	// waited for it yet.
	if p, err := pidfd.Open(victim.PID); err == nil {
		defer p.Close()
		if dead, err := p.Dead(); err != nil || !dead {
			u.t.Errorf("process %d is still alive (%v)", victim.PID, err)
		}
	}
	return victim, after
}

// A worker that is stopped under load is killed, and in the kernel layer its sessions
// go on in another one; every byte is checked, and nobody writes twice.
func TestKernelLayerStoppedWorkerIsReplaced(t *testing.T) {
	guest.NeedKernelTLS(t)
	const clients, rounds = 16, 2
	u := start(t, visor.Options{Args: []string{"-c", configFile(t, []string{echo(t)}, "", "offload = \"kernel\"\n"+alert)}})
	f := u.fleet(clients, busy)
	interrupted := 0
	for range rounds {
		victim, st := u.stopWorker(f, func(admin.WorkerStatus) int { return clients })
		interrupted += victim.Sessions
		if c := st.Counters; c.Lost != 0 || c.Interrupted != uint64(interrupted) || st.Sessions.Kernel != clients {
			t.Errorf("counters %+v, want %d interrupted", c, interrupted)
		}
		f.advance()
	}
	if err := f.stop().Err(); err != nil {
		t.Error(err)
	}
}

// On a host without kernel TLS: the hanging worker is replaced, its sessions are
// accounted for, and the others notice nothing.
func TestHostStoppedWorkerIsReplaced(t *testing.T) {
	u := start(t, visor.Options{Args: []string{"-c", configFile(t, []string{echo(t)}, "", "offload = \"software\"\n"+alert)}})
	f := u.fleet(bystanders, func(o *load.Options) { busy(o) })
	victim, st := u.stopWorker(f, func(v admin.WorkerStatus) int {
		c := u.status().Counters
		if c.Lost+c.Interrupted < uint64(v.Sessions) {
			return -1
		}
		return bystanders - int(c.Lost)
	})
	if c := st.Counters; c.Lost+c.Interrupted != uint64(victim.Sessions) || c.ClosedUnknown != 0 {
		t.Errorf("counters %+v, want %d sessions lost or interrupted", c, victim.Sessions)
	}
	u.run(0, "upgrade")
	u.settled(bystanders - int(st.Counters.Lost))
	f.advance()
	if r := f.stop(); uint64(r.Lost) != st.Counters.Lost || r.WrongBytes > 0 || r.Unclean > 0 {
		t.Errorf("%d lost, %d wrong bytes, %d unclean; the supervisor counted %d lost", r.Lost, r.WrongBytes, r.Unclean, st.Counters.Lost)
	}
}

// A supervisor that was stopped for longer than hang_timeout kills nobody.
func TestHostStoppedSupervisorKillsNoWorker(t *testing.T) {
	u := start(t, visor.Options{Args: []string{"-c", configFile(t, []string{echo(t)}, "", "heartbeat = \"100ms\"\nhang_timeout = \"1s\"")}})
	f := u.fleet(bystanders)
	before := u.settled(bystanders)
	pid := before.Supervisor.PID
	if err := u.Signal(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	f.advance()
	<-after(3) // s, of which the supervisor knows nothing
	if err := u.Signal(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	<-after(2)
	st := u.settled(bystanders)
	if st.Supervisor.PID != pid || st.Counters.Hangs != 0 || strings.Contains(u.Log(), "does not answer") {
		t.Errorf("after a stop of the supervisor: %s", visor.Describe(st))
	}
	f.intact()
}

// after waits for time itself, which is what these tests are about.
func after(seconds int) <-chan time.Time { return time.After(time.Duration(seconds) * time.Second) }
