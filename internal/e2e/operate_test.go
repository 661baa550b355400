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
