package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/load"
	"github.com/ktlsvisor/ktlsvisor/internal/testlog"
)

// A program that is its own supervisor, as its users build and run it.
type selfUpgrader struct {
	t    *testing.T
	Addr string
	bin  string // what it is started from
	pid  string // file
	mu   sync.Mutex
	log  bytes.Buffer
	pids []int
}

func (s *selfUpgrader) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.Write(p)
}

func (s *selfUpgrader) Log() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.String()
}

func startSelfUpgrader(t *testing.T, bin string, args ...string) *selfUpgrader {
	t.Helper()
	dir := tempDir(t)
	s := &selfUpgrader{t: t, bin: filepath.Join(dir, filepath.Base(bin)), pid: filepath.Join(dir, "pid")}
	if err := os.Symlink(bin, s.bin); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.Addr = ln.Addr().String()
	_ = ln.Close()
	cmd := exec.Command(s.bin, append([]string{"-listen", s.Addr, "-pid-file", s.pid}, args...)...)
	// All processes of the row write to the same pipe.
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		buf := make([]byte, 4096)
		for {
			n, err := r.Read(buf)
			_, _ = s.Write(buf[:n])
			if err != nil {
				return
			}
		}
	}()
	go func() { _ = cmd.Wait() }()
	t.Cleanup(func() {
		for _, pid := range s.pids {
			_ = syscall.Kill(pid, syscall.SIGTERM)
		}
		<-copied
		_ = r.Close()
		for _, bad := range []string{"DATA RACE", "panic:", "fatal error:"} {
			if strings.Contains(s.Log(), bad) {
				t.Errorf("the log has %q", bad)
			}
		}
		if t.Failed() {
			t.Log(s.Log())
		}
	})
	s.awaitPID(0)
	return s
}

// mode says how the next process is to misbehave; "" is not at all.
func (s *selfUpgrader) mode(m string) {
	s.t.Helper()
	if err := os.WriteFile(s.bin+modeFile, []byte(m), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// awaitPID waits for a process other than old to be in charge.
func (s *selfUpgrader) awaitPID(old int) int {
	s.t.Helper()
	pid := 0
	eventually(s.t, "a process to take over", func() bool {
		b, err := os.ReadFile(s.pid)
		if err != nil {
			return false
		}
		pid, err = strconv.Atoi(strings.TrimSpace(string(b)))
		return err == nil && pid != old
	})
	s.pids = append(s.pids, pid)
	return pid
}

func (s *selfUpgrader) current() int { return s.pids[len(s.pids)-1] }

// upgrade goes on to the next process and waits for the end of the one before.
func (s *selfUpgrader) upgrade() {
	s.t.Helper()
	old := s.current()
	if err := syscall.Kill(old, syscall.SIGHUP); err != nil {
		s.t.Fatal(err)
	}
	s.awaitPID(old)
	s.awaitEnd(old)
}

func (s *selfUpgrader) awaitEnd(pid int) {
	s.t.Helper()
	eventually(s.t, "the old process to end", func() bool { // whoever inherits it may not wait for it
		b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
		return err != nil || strings.Contains(string(b), ") Z ")
	})
}

func (s *selfUpgrader) descriptors() int {
	s.t.Helper()
	l, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(s.current()), "fd"))
	if err != nil {
		s.t.Fatal(err)
	}
	return len(l)
}

func (s *selfUpgrader) fleet(n int, change ...func(*load.Options)) *fleet {
	s.t.Helper()
	o := load.Options{Addr: s.Addr, TLS: insecure(), Sessions: n, StallLimit: patience}
	for _, c := range change {
		c(&o)
	}
	f, err := load.Start(context.Background(), o)
	if err != nil {
		s.t.Fatal(err)
	}
	fl := &fleet{Fleet: f, u: &unit{t: s.t}, n: n}
	s.t.Cleanup(func() { fl.stop() })
	return fl
}

func (s *selfUpgrader) hangup() {
	s.t.Helper()
	if err := syscall.Kill(s.current(), syscall.SIGHUP); err != nil {
		s.t.Fatal(err)
	}
}

// awaitLog waits for the nth line with text and returns it.
func (s *selfUpgrader) awaitLog(text string, n int) string {
	s.t.Helper()
	var line string
	eventually(s.t, fmt.Sprintf("line %d with %q", n, text), func() bool {
		found := 0
		for l := range strings.Lines(s.Log()) {
			if strings.Contains(l, text) {
				if found++; found == n {
					line = l
					return true
				}
			}
		}
		return false
	})
	return line
}

// Upgrades in a row: no client loses a byte, and no process has more descriptors
// than the one before.
func TestEmbeddedUpgradesInARow(t *testing.T) {
	s := startSelfUpgrader(t, build(t, "examples/selfupgrade", "selfupgrade", true))
	f := s.fleet(40)
	before := 0
	for i := range 10 {
		s.upgrade()
		if n := s.descriptors(); i == 1 {
			before = n
		} else if i > 1 && n > before+5 {
			t.Errorf("process %d of the row has %d descriptors, the second had %d", i+2, n, before)
		}
	}
	f.intact()
}

// New programs that fail in every way leave everything as it is, and the next one that
// does not fail gets everything.
func TestEmbeddedFailedUpgrades(t *testing.T) {
	s := startSelfUpgrader(t, role(t, "embed"))
	f := s.fleet(50, busy)
	for i, mode := range []string{"exit", "hang", "no-upgrader", "other-state", "unready"} {
		s.mode(mode)
		s.hangup()
		t.Log(mode, ": ", s.awaitLog("no upgrade: this process goes on", i+1))
	}
	f.advance()
	eventually(t, "descriptors of failed upgrades to be closed", func() bool { return s.descriptors() < 50+25 })
	s.mode("")
	s.upgrade()
	f.intact()
}

// A new process that is killed in the middle takes along what it had been given, and
// nothing else.
func TestEmbeddedNewProcessKilled(t *testing.T) {
	s := startSelfUpgrader(t, role(t, "embed"))
	const n = 200 // more than are on their way at a time
	f := s.fleet(n)
	s.mode("die 1")
	s.hangup()
	line := s.awaitLog("no upgrade: this process goes on", 1)
	t.Log(line)
	eventually(t, "the clients of the dead process to notice", func() bool { return f.Snapshot().Lost > 0 })
	s.mode("")
	s.upgrade()
	f.advance()
	r := f.stop()
	if r.WrongBytes != 0 || r.Unclean != 0 {
		t.Errorf("%d wrong bytes, %d unclean ends", r.WrongBytes, r.Unclean)
	}
	m := regexp.MustCompile(`in charge: sessions=(\d+)`).FindAllStringSubmatch(s.Log(), -1)
	got, err := strconv.Atoi(m[len(m)-1][1])
	if err != nil || got != r.Alive {
		t.Errorf("%d clients live, the last process took over with %d sessions (%v)", r.Alive, got, err)
	}
	if want := fmt.Sprintf("lost=%d ", r.Lost); !strings.Contains(line, want) {
		t.Errorf("%d clients lost their session, the old process says: %s", r.Lost, line)
	}
	if r.Lost == 0 {
		t.Errorf("%d of %d sessions were lost with a process that died in the middle", r.Lost, n)
	}
}

// An old process that is killed in the middle: the new one takes over with what it has.
func TestEmbeddedOldProcessKilled(t *testing.T) {
	s := startSelfUpgrader(t, role(t, "embed"), "-die-moving", "160")
	const n = 200 // of which a part is on its way at a time
	f := s.fleet(n)
	old := s.current()
	s.hangup()
	s.awaitPID(old)
	f.advance()
	more := s.fleet(5)
	r := f.stop()
	if r.WrongBytes != 0 || r.Lost == n {
		t.Errorf("%d wrong bytes, %d of %d sessions lost", r.WrongBytes, r.Lost, n)
	}
	t.Logf("%d of %d sessions went on", r.Alive, n)
	more.intact()
	s.upgrade()
}

// OpenSSL's client, with KeyUpdates of its own, over upgrades.
func TestEmbeddedOpenSSL(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("no openssl")
	}
	s := startSelfUpgrader(t, role(t, "embed"))
	cmd := exec.Command("openssl", "s_client", "-connect", s.Addr, "-tls1_3", "-ign_eof")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var out testlog.Buffer
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for i := range 4 {
		text := fmt.Sprintf("line number %d", i)
		if _, err := fmt.Fprintln(in, text); err != nil {
			t.Fatal(err)
		}
		eventually(t, text, func() bool { return strings.Contains(out.String(), text) })
		if i < 3 {
			s.upgrade()
		}
	}
}
