package e2e

import (
	"fmt"
	"os"
	"slices"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// Pools with retain = false: the keeper has no sessions' sockets, and moves, upgrades and
// deaths of the supervisor cost nothing all the same.

const bare = "retain = false\n" + alert

// keeperFDs counts the keeper's descriptors.
func (u *unit) keeperFDs() int {
	u.t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", u.KeeperPID()))
	if err != nil {
		u.t.Fatal(err)
	}
	return len(list)
}

func (u *unit) keeperHasNoSockets(empty int) {
	u.t.Helper()
	eventually(u.t, "the keeper to give up the sessions' sockets", func() bool { return u.keeperFDs() < empty+bystanders/2 })
}

func TestHostPoolThatRetainsNothing(t *testing.T) {
	u := start(t, visor.Options{Args: []string{"-c", configFile(t, []string{echo(t)}, "", bare)}})
	empty := u.keeperFDs()
	f := u.fleet(bystanders, busy)
	u.settled(bystanders)
	u.keeperHasNoSockets(empty)
	for range 2 {
		if rep := u.upgradeReport(0); rep.Pools[0].Moved != bystanders {
			t.Errorf("%d sessions moved", rep.Pools[0].Moved)
		}
	}
	u.killSupervisor()
	u.settled(bystanders)
	u.run(0, "upgrade", "--supervisor")
	u.upgradeReport(0)
	u.keeperHasNoSockets(empty)
	f.intact()
}

// Workers of the kernel layer that hang: their sockets are taken from them.
func TestKernelLayerHangInAPoolThatRetainsNothing(t *testing.T) {
	guest.NeedKernelTLS(t)
	const clients = 16
	u := start(t, visor.Options{Args: []string{"-c", configFile(t, []string{echo(t)}, "", "offload = \"kernel\"\n"+bare)}})
	empty := u.keeperFDs()
	f := u.fleet(clients, busy)
	u.settled(clients)
	u.keeperHasNoSockets(empty)
	victim, st := u.stopWorker(f, func(admin.WorkerStatus) int { return clients })
	if c := st.Counters; c.Lost != 0 || c.Interrupted != uint64(victim.Sessions) {
		t.Errorf("counters %+v, want %d interrupted", c, victim.Sessions)
	}
	f.advance()
	if st.Kernel.Rekey { // keys are changed on sockets borrowed from the workers
		u.run(0, "rekey")
	}
	f.advance()
	u.upgradeReport(0)
	f.advance()
	if err := f.stop().Err(); err != nil {
		t.Error(err)
	}
}

// Commits in such a pool. A worker that hangs costs nothing: its sockets are taken from
// it, and its memory tells how far its sessions were. One that dies takes the sockets
// along, and with them the sessions; what it had committed is of no use then. Nobody gets
// a byte twice, and the others notice nothing.
func TestHostCommitsInAPoolThatRetainsNothing(t *testing.T) {
	commitsWithoutDuplicates(t, "software", bystanders)
}

// The same in the kernel layer.
func TestKernelLayerCommitsInAPoolThatRetainsNothing(t *testing.T) {
	guest.NeedKernelTLS(t)
	commitsWithoutDuplicates(t, "kernel", 16)
}

func commitsWithoutDuplicates(t *testing.T, offload string, clients int) {
	program := build(t, "examples/committing", "committing", true)
	u := start(t, visor.Options{Args: []string{"-c", configFile(t, []string{program}, "", "offload = \""+offload+"\"\n"+bare)}})
	empty := u.keeperFDs()
	f := u.fleet(clients, busy)
	u.settled(clients)
	givenUp := func() {
		t.Helper()
		eventually(t, "the keeper to give up the sessions' sockets", func() bool { return u.keeperFDs() < empty+2 })
	}
	givenUp()
	_, st := u.stopWorker(f, func(admin.WorkerStatus) int { return clients })
	if c := st.Counters; c.Lost != 0 || c.Interrupted != 0 {
		t.Errorf("after a hang: counters %+v, want none lost and none interrupted", c)
	}
	f.advance()
	if err := f.Snapshot().Err(); err != nil {
		t.Fatalf("after a hang: %v", err)
	}
	u.upgradeReport(0)
	victim := u.settled(clients).Pools[0].Workers[0]
	givenUp() // up to a second after the move
	if err := u.KillProcess(victim.PID); err != nil {
		t.Fatal(err)
	}
	st = u.await("another worker", func(now *admin.Status) bool {
		return visor.Settled(now) && len(now.Pools[0].Workers) == 2 && !slices.Contains(visor.WorkerPIDs(now), victim.PID)
	})
	if c := st.Counters; victim.Sessions == 0 || c.Lost != uint64(victim.Sessions) || c.Interrupted != 0 || st.Sessions.Total != clients-victim.Sessions {
		t.Errorf("after a kill: %d sessions, counters %+v; want %d lost", st.Sessions.Total, c, victim.Sessions)
	}
	eventually(t, "the clients to see the end", func() bool { return f.Snapshot().Lost == victim.Sessions })
	f.advance()
	if r := f.stop(); r.Lost != victim.Sessions || r.WrongBytes > 0 || r.Unclean > 0 {
		t.Errorf("%d lost, %d wrong bytes, %d unclean; want %d lost and no more; %v, %q", r.Lost, r.WrongBytes, r.Unclean, victim.Sessions, r.LostReasons, r.Examples)
	}
}
