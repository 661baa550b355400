package keeper

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

func (w *world) terminate() {
	w.t.Helper()
	if err := w.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		w.t.Fatal(err)
	}
}

// The exit code is the supervisor's; the keeper process checks by itself that no
// goroutine and no descriptor is left.
func TestDone(t *testing.T) {
	for _, code := range []int{0, 7} {
		w := startKeeper(t, keeperConfig{})
		s := w.lead()
		s.ok(sockets)
		s.ok(command{Op: "done", Code: code})
		s.refused(command{Op: "put", Kind: KindSocket, From: 1, Count: 1, Tag: "x"}, "ending")
		s.exit(0)
		w.wantExit(code)
	}
}

// A supervisor that says Done and does not exit is killed.
func TestDoneButStays(t *testing.T) {
	w := startKeeper(t, keeperConfig{})
	s := w.lead()
	s.ok(command{Op: "done", Code: 5})
	w.wantExit(5)
	if !eventually(func() bool { return !alive(s.pid) }) {
		t.Fatal("the supervisor lives")
	}
}

func TestTerminate(t *testing.T) {
	w := startKeeper(t, keeperConfig{})
	s := w.lead()
	if s.ok(command{Op: "terminated"}).N != 0 {
		t.Fatal("told to terminate before anybody asked for it")
	}
	w.terminate()
	if s.ok(command{Op: "terminated", Wait: 5 * time.Second}).N != 1 {
		t.Fatal("the supervisor was not told")
	}
	s.ok(command{Op: "put", Kind: KindSocket, From: 1, Count: 1, FDs: 1, Tag: "x"}) // it still leads
	s.ok(command{Op: "done", Code: 0})
	s.exit(0)
	w.wantExit(0)
}

func TestTerminateGrace(t *testing.T) {
	w := startKeeper(t, keeperConfig{Grace: 200 * time.Millisecond})
	s := w.lead()
	w.terminate()
	w.wantExit(1)
	w.wantLog("did not stop within 200ms")
	if alive(s.pid) {
		t.Fatal("the supervisor lives")
	}
}

// A supervisor that dies while it stops is not restarted, and the exit code tells.
func TestTerminateThenDeath(t *testing.T) {
	w := startKeeper(t, keeperConfig{})
	s := w.lead()
	w.terminate()
	s.ok(command{Op: "terminated", Wait: 5 * time.Second})
	s.kill()
	w.wantExit(128 + 9)
}

// One that was only about to lead hears of the end too.
func TestTerminateInSuccession(t *testing.T) {
	w := startKeeper(t, keeperConfig{})
	a := w.lead()
	a.ok(command{Op: "successor"})
	b := w.next()
	a.ok(command{Op: "yield"})
	w.terminate()
	if b.ok(command{Op: "terminated", Wait: 5 * time.Second}).N != 1 {
		t.Fatal("the successor was not told")
	}
	b.ok(command{Op: "lead"})
	b.ok(command{Op: "done", Code: 4})
	b.exit(0)
	w.wantExit(4)
	if alive(a.pid) {
		t.Fatal("the old supervisor lives")
	}
}

func TestTerminateBetweenRestarts(t *testing.T) {
	w := startKeeper(t, keeperConfig{Role: "crash", Min: time.Minute, Max: time.Minute})
	for range 2 {
		w.nextCrash()
	}
	if !eventually(func() bool { return strings.Count(w.log.String(), "supervisor died") == 2 }) {
		t.Fatal("want two deaths in the log")
	}
	w.terminate()
	w.wantExit(0)
}

// nextCrash waits for a supervisor that only calls and dies.
func (w *world) nextCrash() time.Time {
	w.t.Helper()
	if err := w.ln.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		w.t.Fatal(err)
	}
	conn, err := w.ln.AcceptUnix()
	if err != nil {
		w.t.Fatal(err)
	}
	now := time.Now()
	_ = conn.Close()
	return now
}

// restarts are the times from each death of a supervisor to the next start, by the
// keeper's log.
func restarts(log string) (gaps []time.Duration) {
	var died time.Time
	for line := range strings.Lines(log) {
		stamp, _, _ := strings.Cut(line, " ")
		at, err := time.Parse("2006-01-02T15:04:05.000Z0700", stamp)
		switch {
		case err != nil || !strings.HasSuffix(line, "\n"): // it is still being written
		case strings.Contains(line, "the supervisor died"):
			died = at
		case strings.Contains(line, "started the supervisor") && !died.IsZero():
			gaps = append(gaps, at.Sub(died))
			died = time.Time{}
		}
	}
	return gaps
}

func TestCrashLoop(t *testing.T) {
	w := startKeeper(t, keeperConfig{Role: "crash", Min: 200 * time.Millisecond, Max: 400 * time.Millisecond})
	for range 5 {
		w.nextCrash()
	}
	// The first restart is at once; then 200 ms, doubled, up to 400 ms. By the keeper's
	// log, for the call of a supervisor comes some time after its start.
	waits := []time.Duration{0, 200, 400, 400}
	var gaps []time.Duration
	if !eventually(func() bool { gaps = restarts(w.log.String()); return len(gaps) >= len(waits) }) {
		t.Fatalf("the log tells of the restarts after %v, want %d", gaps, len(waits))
	}
	for i, least := range waits {
		if gaps[i] < (least*9/10)*time.Millisecond {
			t.Errorf("restart %d after %v, want at least %v ms", i+1, gaps[i], int(least))
		}
	}
	if !strings.Contains(w.log.String(), "keeper's own image") {
		t.Error("after three deaths the keeper's own image was not tried")
	}
	if !strings.Contains(w.log.String(), `status="exit code 3"`) {
		t.Error("the log does not tell how the supervisor died")
	}
}

func TestFallback(t *testing.T) {
	dir := t.TempDir()
	text := filepath.Join(dir, "text")
	if err := os.WriteFile(text, []byte("not a program"), 0o755); err != nil {
		t.Fatal(err)
	}
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ name, path string }{
		{"missing", filepath.Join(dir, "missing")},
		{"not a program", text},
		{"not executable", plain},
		{"dies at once", "/bin/false"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := startKeeper(t, keeperConfig{Supervisor: []string{tc.path, "supervise"}, Min: time.Millisecond})
			s := w.lead()
			s.ok(sockets)
			w.wantLog("keeper's own image")
		})
	}
}

// A replaced binary is picked up at the next start, and the broken path of before
// is tried again when it had a supervisor that lived.
func TestReplacedBinary(t *testing.T) {
	path := filepath.Join(t.TempDir(), "supervisor")
	if err := os.Symlink(self(t), path); err != nil {
		t.Fatal(err)
	}
	w := startKeeper(t, keeperConfig{Supervisor: []string{path}})
	s := w.lead()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("#!/bin/sh\nexec "+self(t)+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	s.kill()
	s = w.lead()
	if n := strings.Count(w.log.String(), "image="+path); n != 2 {
		t.Fatalf("the path was started %d times, want 2", n)
	}
	s.ok(sockets)
}

func TestConfigIsChecked(t *testing.T) {
	for _, argv := range [][]string{nil, {}, {"relative/path"}} {
		fd, err := sys.SealedMemfd("x", nil)
		if err != nil {
			t.Fatal(err)
		}
		code, err := Run(context.Background(), Config{Supervisor: argv, Initial: []Entry{{FDs: []int{fd}}}})
		if err == nil || code == 0 {
			t.Fatalf("%q: code %d, error %v", argv, code, err)
		}
		if sys.Close(fd) == nil {
			t.Fatalf("%q: the descriptor was not closed", argv)
		}
	}
}

// A log that nobody reads any more (SIGPIPE) does not end the keeper.
func TestBrokenStderr(t *testing.T) {
	w := startKeeper(t, keeperConfig{deaf: true})
	s := w.lead()
	worker := w.worker(s, "echo")
	s.ok(sockets)
	s.kill()
	worker.ok(command{Op: "write", Count: 200, N: 1000, Tag: "x"})
	s = w.lead()
	wantSockets(t, s)
}

// A terminal's ^C goes to the keeper's process group; the supervisor and its
// workers hear of it through the keeper.
func TestOwnProcessGroup(t *testing.T) {
	w := startKeeper(t, keeperConfig{})
	s := w.lead()
	if pgid, err := syscall.Getpgid(s.pid); err != nil || pgid != s.pid {
		t.Fatalf("process group %d (%v), want %d", pgid, err, s.pid)
	}
}

func TestKeeperGone(t *testing.T) {
	w := startKeeper(t, keeperConfig{})
	s := w.lead()
	if err := w.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if s.ok(command{Op: "closed", Wait: 5 * time.Second}).N != 1 {
		t.Fatal("the supervisor was not told")
	}
	s.refused(command{Op: "get", Kind: KindSocket}, "closed")
}
