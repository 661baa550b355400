package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
)

// An upgrade to a program that does not get ready is refused: exit code 1, the
// reason in the report, and the old workers serve on.
func TestUpgradeToBadProgramIsRefused(t *testing.T) {
	u := start(t, visor.Options{Args: []string{"-c", configFile(t, []string{echo(t)}, "", `ready_timeout = "2s"`)}})
	f := u.fleet(bystanders)
	before := visor.WorkerPIDs(u.settled(bystanders))
	notExecutable := writeFile(t, "worker", "#!/bin/sh\n")
	wrongFormat := writeFile(t, "worker", "\x7fELFnonsense")
	if err := os.Chmod(wrongFormat, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ program, says string }{
		"missing":             {"/nowhere/worker", "/nowhere/worker"},
		"not executable":      {notExecutable, "permission denied"},
		"not a program":       {wrongFormat, "exec format error"},
		"exits before ready":  {role(t, "exits"), "ended before it was ready"},
		"says nothing":        {role(t, "silent"), "not ready in time"},
		"says hello only":     {role(t, "says-hello-only"), "not ready in time"},
		"speaks the future":   {role(t, "speaks-the-future"), "broke the protocol"},
		"sends no CBOR":       {role(t, "not-cbor"), "broke the protocol"},
		"oversized message":   {role(t, "oversized"), "broke the protocol"},
		"an empty message":    {role(t, "empty-message"), "ended before it was ready"},
		"not a worker at all": {"/bin/true", "ended before it was ready"},
	} {
		t.Run(name, func(t *testing.T) {
			u := &unit{u.Unit, t}
			r := u.run(1, "upgrade", "--command", c.program)
			if !strings.Contains(r.Stdout+r.Stderr, c.says) {
				t.Errorf("the answer does not say %q: %s", c.says, r)
			}
			sameWorkers(t, before, u.settled(bystanders))
		})
	}
	if log := u.Log(); !strings.Contains(log, "I give up") {
		t.Error("the log does not have what the worker said before it gave up")
	}
	if c := u.status().Counters; c.Moved+c.Lost+c.Returned != 0 {
		t.Errorf("something moved: %+v", c)
	}
	// And the way is still free.
	u.run(0, "upgrade")
	u.settled(bystanders)
	f.intact()
	u.addsUp(bystanders)
}

// A worker that sends what no worker may send loses its channel, with one line in
// the log; its sessions stay with it, another worker takes its place, and the rest
// goes on.
func TestWorkerThatBreaksTheProtocolKeepsItsSessions(t *testing.T) {
	for name := range attacks {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u := start(t, visor.Options{Command: []string{role(t, "echo-"+name)}})
			f := u.fleet(bystanders)
			// One that has not answered since it was told to go on with its sessions could not
			// be left alone with them.
			st := u.await("workers that have answered", func(st *admin.Status) bool {
				return visor.Settled(st) && st.Sessions.Total == bystanders &&
					!slices.ContainsFunc(st.Pools[0].Workers, func(w admin.WorkerStatus) bool { return w.Behind })
			})
			culprit := slices.MaxFunc(st.Pools[0].Workers, func(a, b admin.WorkerStatus) int { return a.Sessions - b.Sessions })
			if culprit.Sessions == 0 {
				t.Fatalf("the culprit has no session: %s", visor.Describe(st))
			}
			if err := u.Signal(culprit.PID, syscall.SIGUSR1); err != nil {
				t.Fatal(err)
			}
			u.await("a detached worker, and another in its place", func(st *admin.Status) bool {
				ready, detached := 0, 0
				for _, w := range st.Pools[0].Workers {
					switch {
					case w.State == "ready":
						ready++
					case w.State == "detached" && w.PID == culprit.PID && w.Sessions == culprit.Sessions:
						detached++
					}
				}
				return ready == 2 && detached == 1
			})
			if n := u.linesWith("control channel of a worker closed"); n != 1 {
				t.Errorf("%d lines of the log say that the channel was closed, want 1", n)
			}
			f.advance()
			// What it cannot be asked for stays with it; everything else moves.
			rep := u.upgradeReport(4, "--wait", "1s")
			if p := rep.Pools[0]; p.Stayed != culprit.Sessions || p.Moved != bystanders-culprit.Sessions || p.Lost != 0 {
				t.Errorf("report %+v, want %d stayed", p, culprit.Sessions)
			}
			f.intact()
			// Without sessions it has nothing to live for, and nobody heard how they ended.
			st = u.settled(0)
			if c := st.Counters; c.Lost+c.Interrupted != 0 || c.ClosedUnknown != uint64(culprit.Sessions) || c.ClosedByPeer != uint64(bystanders-culprit.Sessions) {
				t.Errorf("counters %+v, want %d closed_unknown and the rest closed_by_peer", c, culprit.Sessions)
			}
		})
	}
}

// A message that may just be late is ignored.
func TestLateMessagesOfWorkersChangeNothing(t *testing.T) {
	for name := range harmless {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			u := start(t, visor.Options{Command: []string{role(t, "echo-"+name)}})
			f := u.fleet(bystanders)
			st := u.settled(bystanders)
			if err := u.Signal(visor.WorkerPIDs(st)[0], syscall.SIGUSR1); err != nil {
				t.Fatal(err)
			}
			u.awaitLog("attack: <nil>")
			u.run(0, "upgrade")
			u.settled(bystanders)
			f.intact()
			u.addsUp(bystanders)
		})
	}
}

// Whatever a worker prints is text in the log, and never more than that: no line of
// it can be taken for the unit's own, end the unit or drive a terminal.
func TestWorkerMayPrintAnything(t *testing.T) {
	u := start(t, visor.Options{Command: []string{role(t, "prints")}})
	f := u.fleet(bystanders)
	eventually(t, "all that the workers print", func() bool { return u.linesWith("that was all") >= 4 })
	u.run(0, "upgrade")
	u.settled(bystanders)
	u.run(0, "upgrade", "--supervisor")
	u.killSupervisor()
	u.run(0, "upgrade")
	u.settled(bystanders)
	f.intact()
	log := u.Log()
	if strings.ContainsAny(log, "\x1b\x07") {
		t.Error("control characters got into the log")
	}
	for line := range strings.Lines(log) {
		if len(line) > 20<<10 {
			t.Errorf("a line of the log has %d bytes: %.100s...", len(line), line)
		}
	}
}

// A new generation that dies, or cannot take what it is given, in the middle of a
// move: everything comes back, exit code 1, nobody notices.
func TestNewGenerationThatFailsInTheMiddleGivesEverythingBack(t *testing.T) {
	for _, name := range []string{"dies-adopting", "garbage-on-adopt"} {
		t.Run(name, func(t *testing.T) {
			dir := tempDir(t)
			if err := os.WriteFile(filepath.Join(dir, "culprit"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			// The first generation has no culprit, because the file is there.
			u := start(t, visor.Options{Command: []string{role(t, name), dir}})
			f := u.fleet(bystanders)
			before := visor.WorkerPIDs(u.settled(bystanders))
			if err := os.Remove(filepath.Join(dir, "culprit")); err != nil {
				t.Fatal(err)
			}
			rep := u.upgradeReport(1)
			p := rep.Pools[0]
			if p.Lost+p.Stayed+p.Interrupted != 0 || p.Moved != p.Returned || p.Error == "" {
				t.Errorf("report %+v: want all that moved returned, nothing lost, and why", p)
			}
			t.Logf("%d moved and returned: %s", p.Moved, p.Error)
			sameWorkers(t, before, u.settled(bystanders))
			f.advance()
			// The file is there again: the next one is good.
			u.run(0, "upgrade")
			allNew(t, before, visor.WorkerPIDs(u.settled(bystanders)))
			f.intact()
			st := u.await("all sessions to have ended", func(st *admin.Status) bool { return st.Sessions.Total == 0 })
			if c := st.Counters; c.Lost+c.Interrupted+c.ClosedUnknown != 0 || c.ClosedByPeer != bystanders || c.Returned != uint64(p.Returned) {
				t.Errorf("counters %+v, want %d returned", c, p.Returned)
			}
		})
	}
}

// One worker of the new generation that refuses sessions, or never answers, costs
// nobody anything: they go to another.
func TestNewWorkerThatDoesNotAdoptCostsNothing(t *testing.T) {
	for _, name := range []string{"refuses", "ignores-adopt"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := tempDir(t)
			if err := os.WriteFile(filepath.Join(dir, "culprit"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			u := start(t, visor.Options{Command: []string{role(t, name), dir}})
			f := u.fleet(bystanders)
			u.settled(bystanders)
			if err := os.Remove(filepath.Join(dir, "culprit")); err != nil {
				t.Fatal(err)
			}
			// The other new worker takes them all.
			u.run(0, "upgrade", "--wait", "30s")
			u.await("no session between two owners", func(st *admin.Status) bool {
				return st.Sessions.Total == bystanders && st.Sessions.Parked == 0 && !st.Pools[0].Upgrading
			})
			f.advance()
			u.run(0, "upgrade")
			u.settled(bystanders)
			f.intact()
			u.addsUp(bystanders)
		})
	}
}

// A worker that does not end when it is told to is killed, after its sessions have
// moved.
func TestWorkerThatDoesNotEndIsKilled(t *testing.T) {
	u := start(t, visor.Options{Args: []string{"-c", configFile(t, []string{role(t, "never-ends")}, "", `stop_timeout = "500ms"`)}})
	f := u.fleet(bystanders)
	before := visor.WorkerPIDs(u.settled(bystanders))
	began := time.Now()
	u.run(0, "upgrade")
	if d := time.Since(began); d > generous {
		t.Errorf("that took %v", d)
	}
	allNew(t, before, visor.WorkerPIDs(u.settled(bystanders)))
	f.intact()
	u.addsUp(bystanders)
}

// A unit whose workers do not get ready when it is started says so, answers, takes
// an upgrade to a good program, lets early clients wait meanwhile, and can be
// stopped.
func TestUnitThatStartsWithABadWorkerRecovers(t *testing.T) {
	dir := tempDir(t)
	if err := os.WriteFile(filepath.Join(dir, "sick"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	u := start(t, visor.Options{Command: []string{role(t, "dies-young"), dir}, NotReady: true})
	u.awaitLog("ended before it was ready")
	st := u.await("the listener", func(st *admin.Status) bool { return len(st.Listeners) == 1 })
	u.Addr = st.Listeners[0].Address
	early := make(chan error, 1)
	go func() { early <- u.echoOnce("anybody there?") }()
	if err := os.Remove(filepath.Join(dir, "sick")); err != nil {
		t.Fatal(err)
	}
	if err := <-early; err != nil {
		t.Errorf("the client that came too early: %v", err)
	}
	u.settled(0)
	if err := u.Stop(); err != nil {
		t.Error(err)
	}
}

func TestUnitThatNeverHadAWorkerCanBeStopped(t *testing.T) {
	u := start(t, visor.Options{Args: []string{"-c", configFile(t, []string{role(t, "silent")}, "", `ready_timeout = "300ms"`)}, NotReady: true})
	u.awaitLog("worker did not get ready in time")
	if err := u.Stop(); err != nil {
		t.Error(err)
	}
}
