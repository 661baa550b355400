package e2e

import (
	"encoding/json"
	"slices"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// In the kernel layer even a worker that is killed in the middle of an upgrade, old
// or new, costs no connection: what it was serving goes on elsewhere and is counted
// as interrupted.
func TestKernelLayerWorkerKilledInTheMiddleOfAnUpgrade(t *testing.T) {
	guest.NeedKernelTLS(t)
	const clients = 12
	for _, which := range []string{"old", "new"} {
		t.Run(which, func(t *testing.T) {
			u, dir := startStubborn(t, "offload = \"kernel\"\nfreeze_timeout = \"1s\"")
			f := u.fleet(clients)
			before := visor.WorkerPIDs(u.settled(clients))
			s := u.stubborn(dir)
			running := make(chan visor.Result, 1)
			go func() { running <- u.Run("upgrade", "--wait", "60s", "--json") }()
			victim := u.middleOfUpgrade(before, which == "old")
			f.Phase("kill -9 in the middle", true)
			if err := u.KillProcess(victim.PID); err != nil {
				t.Fatal(err)
			}
			if which == "new" {
				s.yield()
			}
			want := map[string]int{"old": 0, "new": 1}[which] // a new generation that dies is given up
			r := <-running
			var rep admin.UpgradeReport
			if err := json.Unmarshal([]byte(r.Stdout), &rep); err != nil || r.Code != want || rep.Pools[0].Lost != 0 || rep.Pools[0].Interrupted != victim.Sessions {
				t.Errorf("want exit code %d, nothing lost and %d interrupted (%v): %s", want, victim.Sessions, err, r)
			}
			st := u.await("everything to be in order again", func(st *admin.Status) bool {
				return visor.Settled(st) && len(st.Pools[0].Workers) == 2 && st.Sessions.Kernel == clients+1
			})
			if c := st.Counters; c.Lost != 0 || c.Interrupted != uint64(victim.Sessions) {
				t.Errorf("counters %+v, want %d interrupted", c, victim.Sessions)
			}
			s.talk() // its handler's hold died with the worker
			f.advance()
			if err := f.stop().Err(); err != nil {
				t.Error(err)
			}
		})
	}
}

// The supervisor is killed in the middle of an upgrade in the kernel layer.
func TestKernelLayerSupervisorKilledInTheMiddleOfAnUpgrade(t *testing.T) {
	guest.NeedKernelTLS(t)
	const clients, rounds = 12, 4
	u := start(t, visor.Options{})
	f := u.fleet(clients)
	for round := range rounds {
		before := visor.WorkerPIDs(u.settled(clients))
		running := make(chan visor.Result, 1)
		go func() { running <- u.Run("upgrade") }()
		u.await("the upgrade to begin", func(st *admin.Status) bool {
			return st.Pools[0].Upgrading || !slices.Equal(visor.WorkerPIDs(st), before)
		})
		wait := time.NewTimer(time.Duration(round) * 400 * time.Millisecond)
		<-wait.C
		u.killSupervisor()
		<-running
		st := u.await("workers of the serving generation", func(st *admin.Status) bool {
			return visor.Settled(st) && st.Sessions.Kernel == clients && len(st.Pools[0].Workers) == 2
		})
		if st.Counters.Lost+st.Counters.Interrupted != 0 {
			t.Fatalf("round %d: %s", round, visor.Describe(st))
		}
		f.advance()
		if err := f.Snapshot().Err(); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
	}
	u.run(0, "upgrade")
	u.settled(clients)
	f.intact()
}
