package e2e

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/load"
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
	s := &selfUpgrader{t: t, bin: filepath.Join(dir, "program"), pid: filepath.Join(dir, "pid")}
	s.install(bin)
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

// install puts a program where the row of processes starts from.
func (s *selfUpgrader) install(bin string) {
	s.t.Helper()
	_ = os.Remove(s.bin)
	if err := os.Link(bin, s.bin); err != nil {
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
	eventually(s.t, "the old process to end", func() bool { return syscall.Kill(pid, 0) != nil })
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

// Ten upgrades in a row: no client loses a byte, and no process has more descriptors
// than the one before.
func TestEmbeddedUpgradesInARow(t *testing.T) {
	s := startSelfUpgrader(t, build(t, "examples/selfupgrade", "selfupgrade", true))
	f := s.fleet(100, busy)
	f.advance()
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
