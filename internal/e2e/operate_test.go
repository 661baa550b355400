package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/handoff"
	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
	"github.com/ktlsvisor/ktlsvisor/state"
)

func init() {
	// An echo worker that says it is not well while there is a file.
	roles["sickly"] = func() int {
		sick := filepath.Join(os.Args[1], "sick")
		return exitOf(handoff.Serve(context.Background(), echoing, handoff.WithHealth(func(context.Context) error {
			if _, err := os.Stat(sick); err == nil {
				return errors.New("no database")
			}
			return nil
		})))
	}
	// One whose handler fails at the first byte, if a file was there when it started.
	roles["faulty"] = func() int {
		if _, err := os.Stat(filepath.Join(os.Args[1], "faulty")); err != nil {
			return echoWorker()
		}
		return exitOf(handoff.Serve(context.Background(), handoff.HandlerFunc(func(_ context.Context, c *handoff.Conn) error {
			if _, err := c.Read(make([]byte, 1)); err != nil {
				return err
			}
			return errors.New("this version cannot handle a thing")
		})))
	}
	for name, s := range map[string]state.Info{
		"writes-1":               {Name: "chat", Writes: 1, Restores: []uint32{1}},
		"writes-2-restores-both": {Name: "chat", Writes: 2, Restores: []uint32{1, 2}},
		"writes-2":               {Name: "chat", Writes: 2, Restores: []uint32{2}},
	} {
		roles[name] = func() int {
			return exitOf(handoff.Serve(context.Background(), echoing, handoff.WithSchemas(s)))
		}
	}
}

// echoing is the handler of an echo worker.
var echoing = handoff.HandlerFunc(func(_ context.Context, c *handoff.Conn) error {
	buf := make([]byte, 4096)
	for {
		n, err := c.Read(buf)
		if _, werr := c.Write(buf[:n]); werr != nil {
			return werr
		}
		if err != nil {
			return err
		}
	}
})

func (u *unit) taskReport(code int, args ...string) (rep admin.TaskReport) {
	u.t.Helper()
	r := u.run(code, append(args, "--json")...)
	if err := json.Unmarshal([]byte(r.Stdout), &rep); err != nil {
		u.t.Fatalf("%v: %s", err, r)
	}
	return rep
}

// begin runs a command beside the test.
func (u *unit) begin(args ...string) <-chan visor.Result {
	c := make(chan visor.Result, 1)
	go func() { c <- u.Run(args...) }()
	return c
}

func (u *unit) awaitOperation(text string) *admin.Status {
	u.t.Helper()
	return u.await("operation "+text, func(st *admin.Status) bool { return strings.Contains(st.Pools[0].Operation, text) })
}

func ended(t *testing.T, c <-chan visor.Result, code int) visor.Result {
	t.Helper()
	select {
	case r := <-c:
		if r.Code != code {
			t.Errorf("want exit code %d: %s", code, r)
		}
		return r
	case <-time.After(patience):
		t.Fatal("the command does not end")
		return visor.Result{}
	}
}

// Workers come and go by the operator's word, under load: the sessions are spread over
// those that there are, and nobody notices.
func TestScaleUnderLoad(t *testing.T) {
	const clients = 100
	u := start(t, visor.Options{})
	f := u.fleet(clients, busy)
	u.settled(clients)
	workers := 2
	for _, n := range []int{4, 1, 3} {
		rep := u.taskReport(0, "scale", strconv.Itoa(n))
		least := clients - clients*min(n, workers)/max(n, workers) // that have to move
		workers = n
		if rep.Workers != n || len(rep.Spread) != n || rep.Lost+rep.Interrupted+rep.Stayed != 0 || rep.Moved > least+clients/20 {
			t.Errorf("scale %d: report %+v", n, rep)
		}
		st := u.settled(clients)
		if len(st.Pools[0].Workers) != n || st.Pools[0].Wanted != n {
			t.Errorf("scale %d: %s", n, visor.Describe(st))
		}
		for _, w := range st.Pools[0].Workers {
			if even := clients / n; w.Sessions < even-2 || w.Sessions > even+2 {
				t.Errorf("scale %d: %s", n, visor.Describe(st))
			}
		}
		t.Logf("scale %d: %d moved in %.2f s, stall p50 %.1f, p99 %.1f, max %.1f ms", n, rep.Moved, rep.DurationSecs, rep.StallP50, rep.StallP99, rep.StallMax)
		f.advance()
	}
	// The next supervisor, and the next generation, keep to the number.
	u.killSupervisor()
	u.settled(clients)
	u.run(0, "upgrade")
	st := u.settled(clients)
	if len(st.Pools[0].Workers) != 3 {
		t.Errorf("after a kill of the supervisor and an upgrade: %s", visor.Describe(st))
	}
	// One worker is taken out of service.
	pid := st.Pools[0].Workers[0].PID
	rep := u.taskReport(0, "drain", strconv.Itoa(pid))
	if rep.Moved != st.Pools[0].Workers[0].Sessions || len(rep.StartedPIDs) != 1 || len(rep.StoppedPIDs) != 1 || rep.StoppedPIDs[0] != pid {
		t.Errorf("drain: %+v", rep)
	}
	st = u.settled(clients)
	if len(st.Pools[0].Workers) != 3 {
		t.Errorf("after a drain: %s", visor.Describe(st))
	}
	f.intact()
	u.addsUp(clients)
}

// A pool that cannot be scaled up stays as it is.
func TestScaleUpThatFailsChangesNothing(t *testing.T) {
	dir := tempDir(t)
	u := start(t, visor.Options{Command: []string{role(t, "dies-young"), dir}})
	f := u.fleet(bystanders)
	before := visor.WorkerPIDs(u.settled(bystanders))
	if err := os.WriteFile(filepath.Join(dir, "sick"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	rep := u.taskReport(1, "scale", "5")
	if rep.Workers != 2 || !strings.Contains(rep.Error, "ended before it was ready") {
		t.Errorf("report %+v", rep)
	}
	if err := os.Remove(filepath.Join(dir, "sick")); err != nil {
		t.Fatal(err)
	}
	sameWorkers(t, before, u.settled(bystanders))
	f.intact()
	u.addsUp(bystanders)
}

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
	dir := tempDir(t)
	u := start(t, visor.Options{Args: []string{"-c", configFile(t, []string{role(t, "stubborn"), dir}, "", `freeze_timeout = "200ms"`)}})
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

// The same in the kernel layer: workers come and go, a canary goes there and back, a
// generation dies in its probation, and every session stays in the kernel.
func TestKernelLayerOperations(t *testing.T) {
	guest.NeedKernelTLS(t)
	const clients = 16
	u := start(t, visor.Options{})
	f := u.fleet(clients)
	u.settled(clients)
	for _, n := range []string{"3", "1", "2"} {
		if rep := u.taskReport(0, "scale", n); rep.Lost+rep.Interrupted+rep.Stayed != 0 {
			t.Errorf("scale %s: report %+v", n, rep)
		}
	}
	before := visor.WorkerPIDs(u.settled(clients))
	c := u.begin("upgrade", "--canary", "25", "--soak", "10m")
	u.awaitOperation("soaking")
	f.advance()
	u.run(0, "upgrade", "--abort")
	ended(t, c, 1)
	sameWorkers(t, before, u.settled(clients))

	c = u.begin("upgrade", "--probation", "10m")
	st := u.awaitOperation("probation")
	f.Phase("kill -9", true)
	for _, w := range st.Pools[0].Workers {
		if w.Generation == st.Pools[0].Generation {
			if err := u.KillProcess(w.PID); err != nil {
				t.Fatal(err)
			}
			break
		}
	}
	ended(t, c, 1)
	st = u.settled(clients)
	sameWorkers(t, before, st)
	if st.Sessions.Kernel != clients || st.Counters.Lost != 0 {
		t.Errorf("afterwards: %s", visor.Describe(st))
	}
	f.advance()
	if r := f.stop(); r.Err() != nil {
		t.Error(r.Err())
	}
}

// Rooms move whole, and no word is lost, while workers come and go and a canary is
// taken back.
func TestChatRoomsAreSpreadWhole(t *testing.T) {
	const rooms, each = 4, 4
	u := start(t, visor.Options{Workers: 2, Command: []string{chat(t, "1")}})
	var talkers []*talker
	for r := range rooms {
		for m := range each {
			talkers = append(talkers, u.talker(fmt.Sprintf("r%dm%d", r, m), fmt.Sprintf("room%d", r)))
		}
	}
	quiet := make(chan struct{})
	var talking sync.WaitGroup
	for _, k := range talkers {
		talking.Go(func() { k.talk(quiet) })
	}
	for _, n := range []string{"1", "4"} {
		u.taskReport(0, "scale", n)
	}
	for _, w := range u.settled(rooms * each).Pools[0].Workers {
		if w.Sessions != each {
			t.Errorf("worker %d has %d sessions; want one room of %d in each worker", w.PID, w.Sessions, each)
		}
	}
	c := u.begin("upgrade", "--canary", "25", "--soak", "10m")
	u.awaitOperation("soaking")
	u.run(0, "upgrade", "--abort")
	ended(t, c, 1)
	u.run(0, "upgrade", "--canary", "25", "--soak", "100ms")
	u.taskReport(0, "scale", "2")
	list, err := u.Admin.Sessions(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	home := map[string]int{}
	for _, s := range list {
		if pid, ok := home[s.Group]; ok && pid != s.WorkerPID {
			t.Errorf("%s is split over workers %d and %d", s.Group, pid, s.WorkerPID)
		}
		home[s.Group] = s.WorkerPID
	}
	close(quiet)
	talking.Wait()
	u.everyWordOnce(talkers)
}
