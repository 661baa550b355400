package e2e

import (
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
)

// Without journals a worker of the software layer that is killed takes its sessions along: they are
// counted as lost, their clients see the end at once, the others notice nothing,
// and another worker takes its place.
func TestHostKilledWorkerOfSoftwareLayerIsCountedAsLost(t *testing.T) {
	u := start(t, visor.Options{Args: []string{"-c", configFile(t, []string{echo(t)}, "", "offload = \"software\"\ncrash_exact = false")}})
	f := u.fleet(bystanders)
	st := u.settled(bystanders)
	victim := st.Pools[0].Workers[0]
	if victim.Sessions == 0 {
		t.Fatalf("nothing to lose: %s", visor.Describe(st))
	}
	if err := u.KillProcess(victim.PID); err != nil {
		t.Fatal(err)
	}
	st = u.await("another worker", func(st *admin.Status) bool {
		return visor.Settled(st) && st.Sessions.Total == bystanders-victim.Sessions && len(st.Pools[0].Workers) == 2
	})
	eventually(t, "the clients to see the end", func() bool { return f.Snapshot().Lost == victim.Sessions })
	if c := st.Counters; c.Lost != uint64(victim.Sessions) || c.ClosedUnknown != 0 {
		t.Errorf("counters %+v, want %d lost", c, victim.Sessions)
	}
	// Those that are left are well.
	u.run(0, "upgrade")
	u.settled(bystanders - victim.Sessions)
	f.advance()
	r := f.stop()
	if r.Lost != victim.Sessions || r.WrongBytes > 0 || r.Unclean > 0 {
		t.Errorf("%d lost, %d wrong bytes, %d unclean; want %d lost and no more", r.Lost, r.WrongBytes, r.Unclean, victim.Sessions)
	}
}

// A worker, old or new, is killed in the middle of an upgrade. In the software layer,
// without journals, its sessions are lost, and the upgrade says so with exit code 3; the supervisor's
// account is that of the clients, and everybody else lives.
func TestHostWorkerKilledInTheMiddleOfAnUpgradeIsAccountedFor(t *testing.T) {
	for _, which := range []string{"old", "new"} {
		t.Run(which, func(t *testing.T) {
			u, dir := startStubborn(t, "offload = \"software\"\ncrash_exact = false\nfreeze_timeout = \"100ms\"")
			f := u.fleet(bystanders)
			before := visor.WorkerPIDs(u.settled(bystanders))
			s := u.stubborn(dir)
			running := make(chan visor.Result, 1)
			go func() { running <- u.Run("upgrade", "--wait", "20s", "--json") }()
			victim := u.middleOfUpgrade(before, which == "old")
			if err := u.KillProcess(victim.PID); err != nil {
				t.Fatal(err)
			}
			lost := victim.Sessions
			if which == "new" {
				s.yield()
			}
			r := <-running
			var rep admin.UpgradeReport
			if err := json.Unmarshal([]byte(r.Stdout), &rep); err != nil || r.Code != 3 || rep.Pools[0].Lost != lost {
				t.Errorf("want exit code 3 and %d lost (%v): %s", lost, err, r)
			}
			st := u.await("everything to be in order again", func(st *admin.Status) bool {
				return visor.Settled(st) && len(st.Pools[0].Workers) == 2 && st.Sessions.Total == bystanders+1-lost
			})
			if st.Counters.Lost != uint64(lost) {
				t.Errorf("counters %+v, want %d lost", st.Counters, lost)
			}
			if which == "old" {
				lost-- // the stubborn one, which is none of the fleet
			} else {
				s.talk()
			}
			eventually(t, "the clients to see what the supervisor counts", func() bool { return f.Snapshot().Lost == lost })
			f.advance()
			if rep := f.stop(); rep.Lost != lost || rep.WrongBytes > 0 || rep.Unclean > 0 {
				t.Errorf("%d of the fleet should be lost: %v", lost, rep.Err())
			}
		})
	}
}

// A worker that dies again and again is started again and again, ever more slowly,
// and a good program afterwards serves.
func TestWorkerThatDiesIsStartedAgainWithBackoff(t *testing.T) {
	dir := tempDir(t)
	u := start(t, visor.Options{Command: []string{role(t, "dies-young"), dir}})
	if err := u.echoOnce("hello"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/sick", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, pid := range visor.WorkerPIDs(u.status()) {
		if err := u.KillProcess(pid); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Fatal(err)
		}
	}
	eventually(t, "six failed starts", func() bool { return u.linesWith("worker cannot be started; trying again") >= 6 })
	// 0, 100, 200, 400, ... ms between them: a tight loop would have had hundreds.
	starts := u.linesWith("worker started")
	if starts > 20 {
		t.Errorf("%d starts by now: no backoff", starts)
	}
	if err := os.Remove(dir + "/sick"); err != nil {
		t.Fatal(err)
	}
	u.settled(0)
	if err := u.echoOnce("hello again"); err != nil {
		t.Error(err)
	}
}

func init() {
	roles["dies-young"] = func() int {
		if _, err := os.Stat(os.Args[1] + "/sick"); err == nil {
			return 5
		}
		return echoWorker()
	}
}

// The supervisor is killed at random moments of an upgrade. Nobody notices, and an
// upgrade afterwards brings all workers to one generation.
func TestSupervisorKilledInTheMiddleOfAnUpgrade(t *testing.T) {
	rounds, clients := 20, 100
	if testing.Short() {
		rounds = 5
	}
	u := start(t, visor.Options{})
	f := u.fleet(clients, busy)
	u.settled(clients)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	for round := range rounds {
		before := visor.WorkerPIDs(u.settled(clients))
		running := make(chan visor.Result, 1)
		go func() { running <- u.Run("upgrade") }()
		u.await("the upgrade to begin", func(st *admin.Status) bool {
			return st.Pools[0].Upgrading || !slices.Equal(visor.WorkerPIDs(st), before)
		})
		// Somewhere in the start of the workers, the move, or just after it.
		wait := time.NewTimer(time.Duration(rng.IntN(int(upgradeTime))))
		<-wait.C
		_, _, back := u.killSupervisor()
		r := <-running
		if r.Code != 0 && r.Code != 1 {
			t.Errorf("round %d: the interrupted upgrade: %s", round, r)
		}
		st := u.await("workers of the serving generation, and no session without one", func(st *admin.Status) bool {
			return visor.Settled(st) && st.Sessions.Total == clients && len(st.Pools[0].Workers) == 2
		})
		if st.Counters.Lost != 0 {
			t.Fatalf("round %d: %s", round, visor.Describe(st))
		}
		if back > generous {
			t.Errorf("round %d: back after %v", round, back)
		}
		f.advance()
		if f.Snapshot().Err() != nil {
			t.Fatalf("round %d: %v", round, f.Snapshot().Err())
		}
		if round%5 == 4 {
			u.run(0, "upgrade")
			allNew(t, visor.WorkerPIDs(st), visor.WorkerPIDs(u.settled(clients)))
		}
	}
	f.intact()
	st := u.await("all sessions to have ended", func(st *admin.Status) bool { return st.Sessions.Total == 0 })
	if c := st.Counters; c.Lost+c.Interrupted+c.ClosedUnknown != 0 || c.ClosedByPeer != uint64(clients) {
		t.Errorf("counters %+v", c)
	}
}

// Kills of supervisor after supervisor, also while the next one is only starting.
func TestSupervisorKilledAgainAndAgain(t *testing.T) {
	const clients = 50
	u := start(t, visor.Options{})
	f := u.fleet(clients)
	before := visor.WorkerPIDs(u.settled(clients))
	for range 6 {
		u.killSupervisor()
		// No settling: the next kill comes as soon as there is something to kill.
	}
	st := u.settled(clients)
	sameWorkers(t, before, st)
	u.run(0, "upgrade")
	u.run(0, "upgrade", "--supervisor")
	u.settled(clients)
	f.intact()
	u.addsUp(clients)
}

// Connections that arrive while there is no supervisor, or while one is replaced,
// wait and are served.
func TestNoConnectionIsRefusedWhileSupervisorsChange(t *testing.T) {
	u := start(t, visor.Options{})
	stop := make(chan struct{})
	errs := make(chan error, 4)
	var n [4]int
	for i := range n {
		go func() {
			for {
				select {
				case <-stop:
					errs <- nil
					return
				default:
				}
				if err := u.echoOnce("hello, whoever you are"); err != nil {
					errs <- err
					return
				}
				n[i]++
			}
		}()
	}
	for range 3 {
		u.run(0, "upgrade", "--supervisor")
		u.run(0, "upgrade")
	}
	close(stop)
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	t.Logf("connections made: %v", n)
	st := u.settled(0)
	if st.Counters.Lost+st.Handshakes.Failed+st.Handshakes.Refused+st.Handshakes.TimedOut != 0 {
		t.Errorf("counters %+v, handshakes %+v", st.Counters, st.Handshakes)
	}
}

// middleOfUpgrade waits until all sessions but a stubborn one have moved, and returns
// an old worker, or a new one, that has sessions then. before names the old ones.
func (u *unit) middleOfUpgrade(before []int, wantOld bool) (victim admin.WorkerStatus) {
	u.t.Helper()
	u.await("the middle of the upgrade", func(st *admin.Status) bool {
		left := 0
		for _, w := range st.Pools[0].Workers {
			old := slices.Contains(before, w.PID)
			if old {
				left += w.Sessions
			}
			if old == wantOld && w.Sessions > 0 {
				victim = w
			}
		}
		return left == 1 && victim.Sessions > 0
	})
	return victim
}
