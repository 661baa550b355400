package e2e

import (
	"fmt"
	"os"
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
