package e2e

import (
	"encoding/json"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
)

// Workers of the software layer that are killed with -9 under load, again and again,
// cost no connection: another one goes on from the journal, with the exact record
// stream, and the sessions are counted as interrupted.
func TestHostKilledWorkersOfSoftwareLayerLoseNothing(t *testing.T) {
	rounds := 6
	if s := os.Getenv("KTLSVISOR_KILLS"); s != "" {
		rounds, _ = strconv.Atoi(s)
	}
	u := start(t, visor.Options{Args: []string{"-c", configFile(t, []string{echo(t)}, "", `offload = "software"`)}})
	f := u.fleet(bystanders, busy)
	interrupted := uint64(0)
	for round := range rounds {
		st := u.settled(bystanders)
		victim := st.Pools[0].Workers[rand.IntN(len(st.Pools[0].Workers))]
		if !victim.CrashExact {
			t.Fatalf("worker %d keeps no journals", victim.PID)
		}
		f.Phase("kill -9 of a worker", true)
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
		interrupted += uint64(victim.Sessions)
		u.await("another worker", func(now *admin.Status) bool {
			return visor.Settled(now) && now.Sessions.Total == bystanders && now.Sessions.Parked == 0 && len(now.Pools[0].Workers) == 2 &&
				!slices.Contains(visor.WorkerPIDs(now), victim.PID)
		})
		f.advance()
	}
	if c := u.status().Counters; c.Lost != 0 || c.Interrupted != interrupted {
		t.Errorf("counters %+v, want %d interrupted and none lost", c, interrupted)
	}
	u.run(0, "upgrade")
	u.settled(bystanders)
	f.advance()
	if r := f.stop(); r.Err() != nil {
		t.Errorf("%v; reasons: %v, examples: %q", r.Err(), r.LostReasons, r.Examples)
	}
}

// A worker, old or new, is killed in the middle of an upgrade: nothing is lost, and the
// account is right.
func TestHostJournalsInTheMiddleOfAnUpgrade(t *testing.T) {
	for _, which := range []string{"old", "new"} {
		t.Run(which, func(t *testing.T) {
			u, dir := startStubborn(t, "offload = \"software\"\nfreeze_timeout = \"100ms\"")
			f := u.fleet(bystanders)
			before := visor.WorkerPIDs(u.settled(bystanders))
			s := u.stubborn(dir)
			running := make(chan visor.Result, 1)
			go func() { running <- u.Run("upgrade", "--wait", "20s", "--json") }()
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
				return visor.Settled(st) && len(st.Pools[0].Workers) == 2 && st.Sessions.Software == bystanders+1 && st.Sessions.Parked == 0
			})
			if c := st.Counters; c.Lost != 0 || c.Interrupted != uint64(victim.Sessions) {
				t.Errorf("counters %+v, want %d interrupted", c, victim.Sessions)
			}
			s.talk()
			f.advance()
			if err := f.stop().Err(); err != nil {
				t.Error(err)
			}
		})
	}
}
