package e2e

import (
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
)

// The promise, at the size that it is made for: a thousand busy clients do not
// notice two upgrades of the workers, one of the supervisor, a kill -9 of the
// supervisor and an upgrade after that. The clients are a program of their own and
// nothing here is slowed down by a race detector, so that the stalls it logs mean
// something; cmd/drill is the same without a test around it.
func TestHostThousandClientsNoticeNothing(t *testing.T) {
	clients := 1000
	if testing.Short() {
		clients = 250
	}
	u := start(t, visor.Options{
		Program: build(t, "cmd/ktlsvisor", "ktlsvisor-plain", false),
		Command: []string{build(t, "examples/echo", "echo-plain", false)},
	})
	f := startLoad(t, u, clients)
	st := u.settled(clients)
	if st.Counters.Accepted != uint64(clients) {
		t.Errorf("%d accepted, want %d", st.Counters.Accepted, clients)
	}
	workers, moved := visor.WorkerPIDs(st), uint64(0)
	upgrade := func(name string) {
		f.phase(name)
		u.run(0, "upgrade")
		st := u.settled(clients)
		now := visor.WorkerPIDs(st)
		allNew(t, workers, now)
		workers, moved = now, moved+uint64(clients)
		if st.Counters.Moved != moved {
			t.Errorf("%s: %d moved in all, want %d", name, st.Counters.Moved, moved)
		}
	}
	upgrade("first upgrade")
	upgrade("second upgrade")

	f.phase("supervisor upgrade")
	old := u.status().Supervisor.PID
	u.run(0, "upgrade", "--supervisor")
	st = u.await("another supervisor", func(st *admin.Status) bool { return st.Supervisor.PID != old })
	sameWorkers(t, workers, u.settled(clients))

	f.phase("kill -9 of the supervisor")
	_, pid, back := u.killSupervisor()
	if pid == st.Supervisor.PID {
		t.Errorf("the supervisor still has pid %d", pid)
	}
	t.Logf("the next supervisor answered %v after the kill", back)
	if back > generous {
		t.Errorf("that is more than %v", generous)
	}
	sameWorkers(t, workers, u.settled(clients))
	upgrade("upgrade after the kill")

	r := f.stop()
	if err := r.Err(); err != nil || r.Interrupted > 0 {
		t.Errorf("%v, %d interrupted; reasons: %v", err, r.Interrupted, r.LostReasons)
	}
	for _, p := range r.Phases {
		t.Logf("%-26s longest stall %v, p99 %v, own pause %v", p.Name, p.LongestStall, p.StallP99, p.ClientPause)
		if p.LongestStall > generous {
			t.Errorf("%s: a client waited %v", p.Name, p.LongestStall)
		}
	}
	u.addsUp(clients)
}

// addsUp checks the supervisor's account after all clients have said goodbye:
// every session that there was has ended in the way that it did.
func (u *unit) addsUp(clients int) {
	u.t.Helper()
	st := u.await("all sessions to have ended", func(st *admin.Status) bool { return st.Sessions.Total == 0 })
	c := st.Counters
	if c.Accepted != uint64(clients) || c.ClosedByPeer != uint64(clients) || c.Lost+c.Interrupted+c.Returned+c.ClosedByOwner+c.ClosedUnknown != 0 {
		u.t.Errorf("%d clients said goodbye, but the counters are %+v", clients, c)
	}
}

func sameWorkers(t *testing.T, want []int, st *admin.Status) {
	t.Helper()
	got := visor.WorkerPIDs(st)
	for _, pid := range want {
		found := false
		for _, g := range got {
			found = found || g == pid
		}
		if !found {
			t.Errorf("worker %d did not survive its supervisor: %s", pid, visor.Describe(st))
		}
	}
}
