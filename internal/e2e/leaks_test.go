package e2e

import (
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
)

// Upgrade after upgrade costs nothing that stays: as many descriptors as before,
// and no more memory than the noise.
func TestUpgradesLeakNothing(t *testing.T) {
	const clients = 30
	upgrades := 20
	if testing.Short() {
		upgrades = 6
	}
	u := start(t, visor.Options{})
	f := u.fleet(clients)
	cycle := func(n int) {
		for i := range n {
			u.run(0, "upgrade")
			if i%(max(n/3, 1)) == 0 {
				u.run(0, "upgrade", "--supervisor")
			}
			u.settled(clients)
		}
	}
	cycle(3) // everything has been done once: what is kept for good is there
	// Both are looked at with workers that another supervisor started: one's own
	// child costs a descriptor more while it lives.
	u.run(0, "upgrade", "--supervisor")
	u.settled(clients)
	keeper, supervisor := u.usage("at first")
	cycle(upgrades)
	u.run(0, "upgrade", "--supervisor")
	u.settled(clients)
	// What ends, ends a moment later.
	eventually(t, "the descriptors of keeper and supervisor to be no more than before", func() bool {
		k, err1 := visor.Descriptors(u.KeeperPID())
		s, err2 := visor.Descriptors(u.status().Supervisor.PID)
		return err1 == nil && err2 == nil && k <= keeper.fds && s <= supervisor.fds
	})
	keeper2, supervisor2 := u.usage("at last")
	if keeper2.kib > 2*keeper.kib+8<<10 {
		t.Errorf("the keeper has grown from %d to %d KiB", keeper.kib, keeper2.kib)
	}
	if supervisor2.kib > 2*supervisor.kib+32<<10 {
		t.Errorf("the supervisor has grown from %d to %d KiB", supervisor.kib, supervisor2.kib)
	}
	// Keeper, supervisor and two workers, and no zombie or left-over.
	if n := len(u.Processes()); n != 4 {
		t.Errorf("%d processes, want 4", n)
	}
	f.intact()
	u.addsUp(clients)
	// Without sessions their sockets are gone, too.
	eventually(t, "the keeper to close the sockets of sessions that ended", func() bool {
		n, err := visor.Descriptors(u.KeeperPID())
		return err == nil && n <= keeper.fds-clients
	})
}

type usage struct{ fds, kib int }

func (u *unit) usage(when string) (keeper, supervisor usage) {
	u.t.Helper()
	get := func(pid int) (us usage) {
		var err1, err2 error
		us.fds, err1 = visor.Descriptors(pid)
		us.kib, err2 = visor.ResidentKiB(pid)
		if err1 != nil || err2 != nil {
			u.t.Fatal(err1, err2)
		}
		return us
	}
	keeper, supervisor = get(u.KeeperPID()), get(u.status().Supervisor.PID)
	u.t.Logf("%s: keeper %d descriptors, %d KiB; supervisor %d descriptors, %d KiB", when, keeper.fds, keeper.kib, supervisor.fds, supervisor.kib)
	return keeper, supervisor
}
