package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
)

// A canary whose handler fails costs the sessions that it was given and no other: the
// rest comes back, and the old generation goes on.
func TestCanaryWhoseHandlerFails(t *testing.T) {
	const clients, canary = 100, 10
	dir := tempDir(t)
	u := start(t, visor.Options{Command: []string{role(t, "faulty"), dir}})
	f := u.fleet(clients)
	before := visor.WorkerPIDs(u.settled(clients))
	if err := os.WriteFile(filepath.Join(dir, "faulty"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	rep := u.upgradeReport(1, "--canary", "10", "--soak", "1m")
	p := rep.Pools[0]
	if !strings.Contains(p.Error, "with an error") || p.Moved > canary || p.Lost+p.Interrupted+p.Stayed != 0 {
		t.Errorf("report %+v", p)
	}
	st := u.await("the old generation alone", visor.Settled)
	sameWorkers(t, before, st)
	failed := int(st.Counters.ClosedByOwner)
	if failed > canary || failed < 3 || st.Sessions.Total != clients-failed {
		t.Errorf("%d failed: %s", failed, visor.Describe(st))
	}
	f.advance()
	r := f.stop()
	if r.Lost != failed || r.WrongBytes > 0 {
		t.Errorf("%d failed, and the clients say %v", failed, r.Err())
	}
}

// A new generation on probation that says it is not well: everything goes back, and
// nobody notices. When it is well, the old one ends.
func TestProbationOfASickGeneration(t *testing.T) {
	dir := tempDir(t)
	u := start(t, visor.Options{Command: []string{role(t, "sickly"), dir}})
	f := u.fleet(bystanders, busy)
	before := visor.WorkerPIDs(u.settled(bystanders))
	c := u.begin("upgrade", "--probation", "10m")
	u.awaitOperation("probation")
	f.advance()
	if err := os.WriteFile(filepath.Join(dir, "sick"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if r := ended(t, c, 1); !strings.Contains(r.Stdout, "no database") {
		t.Errorf("the report does not say why: %s", r)
	}
	if err := os.Remove(filepath.Join(dir, "sick")); err != nil {
		t.Fatal(err)
	}
	sameWorkers(t, before, u.settled(bystanders))
	f.advance()
	u.run(0, "upgrade", "--canary", "20%", "--soak", "500ms", "--probation", "500ms")
	allNew(t, before, visor.WorkerPIDs(u.settled(bystanders)))
	r := f.intact()
	t.Logf("longest stall over moves there and back: %v", r.LongestStall)
}

// A worker of the new generation that dies within its probation, or as a canary, takes
// the whole generation back.
func TestNewGenerationThatDiesInItsProbation(t *testing.T) {
	for name, args := range map[string][]string{"probation": {"--probation", "10m"}, "soaking": {"--canary", "50", "--soak", "10m"}} {
		t.Run(name, func(t *testing.T) {
			u := start(t, visor.Options{})
			f := u.fleet(1)
			before := visor.WorkerPIDs(u.settled(1))
			c := u.begin(append([]string{"upgrade"}, args...)...)
			st := u.awaitOperation(name)
			for _, w := range st.Pools[0].Workers { // one that has no session, so that none is lost with it
				if w.Generation == 2 && w.Sessions == 0 {
					if err := u.KillProcess(w.PID); err != nil {
						t.Fatal(err)
					}
					break
				}
			}
			if r := ended(t, c, 1); !strings.Contains(r.Stdout, "of generation 2 died") {
				t.Errorf("the report does not say why: %s", r)
			}
			sameWorkers(t, before, u.settled(1))
			f.intact()
		})
	}
}

// One that dies with its sessions: they go on in the old generation, and are counted.
func TestNewGenerationThatDiesWithItsSessions(t *testing.T) {
	u := start(t, visor.Options{})
	f := u.fleet(bystanders)
	before := visor.WorkerPIDs(u.settled(bystanders))
	c := u.begin("upgrade", "--probation", "10m", "--json")
	st := u.awaitOperation("probation")
	f.Phase("kill -9", true)
	var culprit admin.WorkerStatus
	for _, w := range st.Pools[0].Workers {
		if w.Generation == 2 {
			culprit = w
		}
	}
	if err := u.KillProcess(culprit.PID); err != nil {
		t.Fatal(err)
	}
	var rep admin.UpgradeReport
	if err := json.Unmarshal([]byte(ended(t, c, 1).Stdout), &rep); err != nil {
		t.Fatal(err)
	}
	if p := rep.Pools[0]; p.Interrupted != culprit.Sessions || p.Returned != bystanders-culprit.Sessions || p.Lost+p.Stayed != 0 {
		t.Errorf("%d sessions were with the worker that died; report %+v", culprit.Sessions, p)
	}
	sameWorkers(t, before, u.settled(bystanders))
	f.advance()
	if r := f.stop(); r.Err() != nil {
		t.Error(r.Err())
	}
}

// Whether the new generation understands the old one's state is asked before anything
// moves; so is the reverse, where there is to be a way back.
func TestStateCompatibilityBothWays(t *testing.T) {
	u := start(t, visor.Options{Command: []string{role(t, "writes-1")}})
	f := u.fleet(bystanders)
	before := visor.WorkerPIDs(u.settled(bystanders))
	for name, c := range map[string]struct {
		args []string
		code int
		says string
	}{
		"new cannot restore":       {[]string{"--command", role(t, "writes-2")}, 1, "would be refused: the new program cannot restore the state of the old one"},
		"old cannot, canary":       {[]string{"--command", role(t, "writes-2-restores-both"), "--canary", "10"}, 1, "--no-return"},
		"old cannot, nobody cares": {[]string{"--command", role(t, "writes-2-restores-both")}, 0, "there is no way back"},
		"both can":                 {nil, 0, "it restores what the old one writes"},
	} {
		r := u.run(c.code, append([]string{"upgrade", "--dry-run", "--probe"}, c.args...)...)
		if !strings.Contains(r.Stdout, c.says) || !strings.Contains(r.Stdout, "Nothing was moved.") {
			t.Errorf("probe, %s: %s", name, r.Stdout)
		}
		sameWorkers(t, before, u.settled(bystanders))
	}
	for name, c := range map[string]struct {
		args []string
		says string
	}{
		"new cannot restore":      {[]string{"--command", role(t, "writes-2")}, "cannot restore the state of the old one"},
		"old cannot, canary":      {[]string{"--command", role(t, "writes-2-restores-both"), "--canary", "10"}, "--no-return"},
		"old cannot, a probation": {[]string{"--command", role(t, "writes-2-restores-both"), "--probation", "1s"}, "there is no way back"},
	} {
		rep := u.upgradeReport(1, c.args...)
		if !strings.Contains(rep.Error, c.says) || rep.Pools[0].Moved != 0 {
			t.Errorf("%s: %+v", name, rep)
		}
		sameWorkers(t, before, u.settled(bystanders))
	}
	rep := u.upgradeReport(0, "--command", role(t, "writes-2-restores-both"), "--canary", "10", "--soak", "100ms", "--no-return")
	if rep.Pools[0].OneWay == "" || rep.Pools[0].Moved != bystanders {
		t.Errorf("with --no-return: %+v", rep)
	}
	f.intact()
}

// A second upgrade waits for the first; a third generation follows while a session of
// the first has not moved yet, and takes it when it can.
func TestUpgradesInARow(t *testing.T) {
	u, dir := startStubborn(t, `freeze_timeout = "200ms"`)
	f := u.fleet(bystanders)
	s := u.stubborn(dir)
	first := u.begin("upgrade", "--wait", "1s", "--canary", "10", "--soak", "300ms")
	u.await("the first upgrade", func(st *admin.Status) bool { return st.Pools[0].Upgrading })
	u.run(1, "upgrade")
	u.run(1, "scale", "3")
	second := u.begin("upgrade", "--wait", "1s", "--queue")
	ended(t, first, 4)
	if r := ended(t, second, 4); !strings.Contains(r.Stdout, "2 -> 3") {
		t.Errorf("the second: %s", r)
	}
	st := u.status()
	if st.Pools[0].Generation != 3 {
		t.Errorf("after two upgrades: %s", visor.Describe(st))
	}
	// A plan knows what is the matter with it.
	r := u.run(4, "upgrade", "--dry-run")
	if !strings.Contains(r.Stdout, "1 session after drain: when it was last asked: no safe point within freeze_timeout") {
		t.Errorf("the plan: %s", r)
	}
	s.yield()
	s.talk()
	u.settled(bystanders + 1)
	s.talk()
	f.intact()
}

// A supervisor that is killed while a canary soaks or a probation lasts: no session is
// lost, the canary comes back, the probation goes on and can still go back.
func TestSupervisorKilledOverAnUpgradeThatCanGoBack(t *testing.T) {
	u := start(t, visor.Options{})
	f := u.fleet(bystanders)
	before := visor.WorkerPIDs(u.settled(bystanders))
	c := u.begin("upgrade", "--canary", "50", "--soak", "10m")
	u.awaitOperation("soaking")
	u.killSupervisor()
	ended(t, c, 1)
	sameWorkers(t, before, u.settled(bystanders))

	c = u.begin("upgrade", "--probation", "10m")
	u.awaitOperation("probation")
	u.killSupervisor()
	ended(t, c, 1)
	st := u.awaitOperation("probation")
	sameWorkers(t, before, st)
	if st.Pools[0].Generation != 3 {
		t.Errorf("in the probation: %s", visor.Describe(st))
	}
	u.run(0, "upgrade", "--abort")
	sameWorkers(t, before, u.settled(bystanders))
	f.intact()
	st = u.await("all sessions to have ended", func(st *admin.Status) bool { return st.Sessions.Total == 0 })
	if c := st.Counters; c.ClosedByPeer != bystanders || c.Lost+c.Interrupted+c.ClosedUnknown != 0 {
		t.Errorf("counters %+v", c)
	}
}
