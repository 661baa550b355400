package e2e

import (
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// Workers that commit are killed with -9 under load, again and again, between upgrades
// and together with the supervisor: no client loses a byte or gets one twice, and no
// session counts as interrupted.
func TestHostCommittingWorkersAreExactOverKills(t *testing.T) {
	committingOverKills(t, "software", bystanders, 6)
}

// The same in the kernel layer.
func TestKernelLayerCommittingWorkersAreExactOverKills(t *testing.T) {
	guest.NeedKernelTLS(t)
	committingOverKills(t, "kernel", 12, 6)
}

func committingOverKills(t *testing.T, offload string, clients, rounds int) {
	if s := os.Getenv("KTLSVISOR_KILLS"); s != "" {
		rounds, _ = strconv.Atoi(s)
	}
	program := build(t, "examples/committing", "committing", true)
	u := start(t, visor.Options{Args: []string{"-c", configFile(t, []string{program}, "", "offload = \""+offload+"\"")}})
	f := u.fleet(clients, busy)
	for round := range rounds {
		st := u.settled(clients)
		victim := st.Pools[0].Workers[rand.IntN(len(st.Pools[0].Workers))]
		wait := time.NewTimer(time.Duration(rand.IntN(50)) * time.Millisecond)
		<-wait.C
		if round%3 == 2 { // the next supervisor finds a dead worker and its arena
			if err := u.KillProcess(st.Supervisor.PID); err != nil {
				t.Fatal(err)
			}
		}
		if err := u.KillProcess(victim.PID); err != nil {
			t.Fatal(err)
		}
		u.await("another worker", func(now *admin.Status) bool {
			return visor.Settled(now) && now.Sessions.Total == clients && now.Sessions.Parked == 0 && len(now.Pools[0].Workers) == 2 &&
				!slices.Contains(visor.WorkerPIDs(now), victim.PID)
		})
		if round%3 == 1 {
			u.run(0, "upgrade")
		}
		f.advance()
		if err := f.Snapshot().Err(); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
	}
	if c := u.status().Counters; c.Lost != 0 || c.Interrupted != 0 {
		t.Errorf("counters %+v, want none lost and none interrupted", c)
	}
	if r := f.stop(); r.Err() != nil {
		t.Errorf("%v; reasons: %v, examples: %q", r.Err(), r.LostReasons, r.Examples)
	}
}
