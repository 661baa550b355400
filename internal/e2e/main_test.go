package e2e

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
	"github.com/ktlsvisor/ktlsvisor/internal/load"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// patience bounds what takes no time on an idle machine.
const patience = 30 * time.Second

// workDir is where programs are built, and where units have their files. Its name
// is short, because a Unix socket's is at most 107 bytes.
var workDir string

func TestMain(m *testing.M) {
	if name, ok := strings.CutPrefix(filepath.Base(os.Args[0]), rolePrefix); ok {
		os.Exit(playRole(name))
	}
	// A program with the race detector otherwise waits for a second before it exits.
	err := os.Setenv("GORACE", "atexit_sleep_ms=0")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if workDir, err = os.MkdirTemp("", "kve"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	_ = os.RemoveAll(workDir)
	os.Exit(code)
}

// build builds one program once. In a guest it is there already.
func build(t *testing.T, pkg, name string, race bool, flags ...string) string {
	t.Helper()
	if guest.InGuest() {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		return path
	}
	if race && raceEnabled {
		name += "-race"
		flags = append(flags, "-race")
	}
	out := filepath.Join(workDir, name)
	f, _ := builds.LoadOrStore(out, sync.OnceValue(func() error {
		cmd := exec.Command("go", slices.Concat([]string{"build", "-o", out}, flags, []string{"github.com/ktlsvisor/ktlsvisor/" + pkg})...)
		if msg, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w\n%s", cmd.Args, err, msg)
		}
		return nil
	}))
	if err := f.(func() error)(); err != nil {
		t.Fatal(err)
	}
	return out
}

var builds sync.Map // path of the program to func() error

// The programs. With the race detector where the tests have it.
func ktlsvisor(t *testing.T) string { return build(t, "cmd/ktlsvisor", "ktlsvisor", true) }
func echo(t *testing.T) string      { return build(t, "examples/echo", "echo", true) }

// unit is a visor.Unit that fails its test.
type unit struct {
	*visor.Unit
	t *testing.T
}

// start runs a unit for the length of the test, by default with two echo workers.
func start(t *testing.T, o visor.Options) *unit {
	t.Helper()
	if o.Program == "" {
		o.Program = ktlsvisor(t)
	}
	if o.Command == nil && o.Args == nil {
		o.Command = []string{echo(t)}
	}
	if o.Dir == "" {
		o.Dir = tempDir(t)
	}
	u, err := visor.Start(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// Its own end, when a test did not ask for another: what hangs then is a bug.
		select {
		case <-u.Ended():
		default:
			if !t.Failed() && !o.NotReady {
				if err := u.Stop(); err != nil {
					t.Errorf("the end: %v", err)
				}
			}
		}
		u.Kill()
		log := u.Log()
		for _, bad := range []string{"DATA RACE", "panic:", "fatal error:"} {
			if strings.Contains(log, bad) {
				t.Errorf("the log has %q", bad)
			}
		}
		if t.Failed() {
			t.Log(u.LogTail())
		}
	})
	return &unit{u, t}
}

func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(workDir, "u")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func (u *unit) await(what string, ok func(*admin.Status) bool) *admin.Status {
	u.t.Helper()
	st, err := u.Await(patience, what, ok)
	if err != nil {
		u.t.Fatal(err)
	}
	return st
}

func (u *unit) awaitLog(text string) {
	u.t.Helper()
	if err := u.AwaitLog(patience, fmt.Sprintf("%q", text), func(log string) bool { return strings.Contains(log, text) }); err != nil {
		u.t.Fatal(err)
	}
}

func (u *unit) status() *admin.Status {
	u.t.Helper()
	return u.await("an answer", func(*admin.Status) bool { return true })
}

// settled waits until the supervisor counts n sessions and every worker serves.
func (u *unit) settled(n int) *admin.Status {
	u.t.Helper()
	return u.await(fmt.Sprintf("%d sessions, settled", n), func(st *admin.Status) bool {
		return visor.Settled(st) && st.Sessions.Total == n
	})
}

// run runs a command of the CLI, which must exit with code.
func (u *unit) run(code int, args ...string) visor.Result {
	u.t.Helper()
	r := u.Run(args...)
	if r.Code != code {
		u.t.Fatalf("ktlsvisor %s: want exit code %d: %s", strings.Join(args, " "), code, r)
	}
	return r
}

// killSupervisor kills it with -9 and waits for the next.
func (u *unit) killSupervisor() (oldPID, newPID int, back time.Duration) {
	u.t.Helper()
	oldPID, newPID, back, err := u.KillSupervisor(patience)
	if err != nil {
		u.t.Fatal(err)
	}
	return oldPID, newPID, back
}

// insecure is the configuration of clients: the certificate is made in the memory
// of our own child.
func insecure() *tls.Config { return &tls.Config{InsecureSkipVerify: true} }

// fleet connects n clients that check every byte.
func (u *unit) fleet(n int, change ...func(*load.Options)) *fleet {
	u.t.Helper()
	o := load.Options{Addr: u.Addr, TLS: insecure(), Sessions: n, StallLimit: patience}
	for _, c := range change {
		c(&o)
	}
	f, err := load.Start(context.Background(), o)
	if err != nil {
		u.t.Fatal(err)
	}
	fl := &fleet{Fleet: f, u: u, n: n}
	u.t.Cleanup(func() { fl.stop() })
	return fl
}

type fleet struct {
	*load.Fleet
	u       *unit
	n       int
	stopped bool
}

func (f *fleet) stop() load.Report {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	if f.stopped {
		cancel() // it only reports again
	}
	defer cancel()
	f.stopped = true
	return f.Stop(ctx)
}

// advancing is the name of the phases that advance makes.
const advancing = "advance"

// advance waits until every client has had echoes again, so that what was done
// before is seen by all of them.
func (f *fleet) advance() {
	f.u.t.Helper()
	eventually(f.u.t, "every client to get echoes", func() bool {
		f.Phase(advancing, false)
		began := time.Now()
		was := f.Snapshot()
		want := was.FramesChecked + int64(was.Alive)*3
		var r load.Report
		eventually(f.u.t, "the clients to get more echoes", func() bool {
			r = f.Snapshot()
			return r.FramesChecked >= want || r.Alive == 0
		})
		// A frame that waited all this time, or still does, is of a client that stands
		// still.
		return r.Phases[len(r.Phases)-1].LongestStall < time.Since(began)
	})
}

// intact ends the clients; none may have noticed anything.
func (f *fleet) intact() load.Report {
	f.u.t.Helper()
	f.advance()
	r := f.stop()
	if err := r.Err(); err != nil {
		f.u.t.Errorf("%v; reasons: %v", err, r.LostReasons)
	}
	if r.Interrupted > 0 {
		f.u.t.Errorf("%d sessions were interrupted", r.Interrupted)
	}
	f.u.t.Logf("%d clients: %d frames, %d lost, %d wrong bytes; longest stall %v (own pause %v)",
		r.Sessions, r.FramesChecked, r.Lost, r.WrongBytes, r.LongestStall.Round(time.Millisecond), r.ClientPause.Round(time.Millisecond))
	return r
}

// eventually polls a fact of another process.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited %s for %s", patience, what)
		}
		<-tick.C
	}
}

// allNew fails unless no pid of before is among those of after.
func allNew(t *testing.T, before, after []int) {
	t.Helper()
	if len(after) == 0 {
		t.Error("no process is left")
	}
	for _, pid := range after {
		if slices.Contains(before, pid) {
			t.Errorf("process %d is still there; before: %v, after: %v", pid, before, after)
		}
	}
}

// upgradeReport is what `ktlsvisor upgrade --json` answers, with exit code code.
func (u *unit) upgradeReport(code int, args ...string) (rep admin.UpgradeReport) {
	u.t.Helper()
	r := u.run(code, append([]string{"upgrade", "--json"}, args...)...)
	if err := json.Unmarshal([]byte(r.Stdout), &rep); err != nil {
		u.t.Fatalf("%v: %s", err, r)
	}
	if int(rep.Outcome) != code {
		u.t.Errorf("the report says %d, the exit code is %d", rep.Outcome, code)
	}
	return rep
}

// busy makes clients that always have something on its way.
func busy(o *load.Options) {
	o.Interval, o.MinPayload, o.MaxPayload = 20*time.Millisecond, 0, 4096
}

// upgradeTime is about what an upgrade of a hundred sessions takes.
const upgradeTime = 150 * time.Millisecond
