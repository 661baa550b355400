package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// fakeSupervisor answers upgrades as a test wants.
type fakeSupervisor struct {
	admin.Backend
	pools   []string
	upgrade func(admin.UpgradeRequest) (*admin.UpgradeReport, error)
	sup     *admin.SupervisorReport
	session []admin.Session
}

func (f *fakeSupervisor) Status(context.Context) (*admin.Status, error) {
	st := &admin.Status{}
	for _, p := range f.pools {
		st.Pools = append(st.Pools, admin.PoolStatus{Name: p})
	}
	return st, nil
}

func (f *fakeSupervisor) Sessions(context.Context) ([]admin.Session, error) { return f.session, nil }

func (f *fakeSupervisor) Upgrade(_ context.Context, r admin.UpgradeRequest, p func(admin.Progress)) (*admin.UpgradeReport, error) {
	p(admin.Progress{Text: "moving sessions", Done: 1, Total: 2})
	return f.upgrade(r)
}

func (f *fakeSupervisor) UpgradeSupervisor(context.Context, func(admin.Progress)) (*admin.SupervisorReport, error) {
	return f.sup, nil
}

// serveFake returns the admin socket of f.
func serveFake(t *testing.T, f *fakeSupervisor) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "a.sock")
	l, err := admin.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, l, f)
	return path
}

func serveOn(t *testing.T, l net.Listener, f *fakeSupervisor) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- admin.Serve(ctx, l, uint32(os.Getuid()), f, hclog.NewNullLogger()) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func cli(args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	code = Main(args, &out, &errs)
	return code, out.String(), errs.String()
}

func TestUpgradeExitCodes(t *testing.T) {
	since := time.Now()
	for _, tt := range []struct {
		name   string
		rep    *admin.UpgradeReport
		err    error
		code   int
		stdout string // for people
		stderr string
	}{
		{"moved", &admin.UpgradeReport{Pools: []admin.PoolReport{{Pool: "chat", From: 1, To: 2, Moved: 7}}}, nil, 0, "Upgraded: everything moved, nothing lost.", "moving sessions 1 of 2"},
		{"rolled back", &admin.UpgradeReport{Outcome: 1, Error: "the new workers were not ready in 10s"}, nil, 1, "Not upgraded: the old generation serves on, nothing lost.", ""},
		{"lost", &admin.UpgradeReport{Outcome: 3, Pools: []admin.PoolReport{{Pool: "chat", Lost: 1, Reasons: map[string]int{"worker died": 1}}}}, nil, 3, "1 × worker died", ""},
		{"stayed", &admin.UpgradeReport{Outcome: 4, Pools: []admin.PoolReport{{Pool: "chat", Stayed: 2}}}, nil, 4, "some sessions stay with the old generation", ""},
		{"why they stayed", &admin.UpgradeReport{Outcome: 4, Pools: []admin.PoolReport{{Pool: "chat", Stayed: 6, Reasons: map[string]int{"b": 1, "handshake": 4, "a": 1}}}}, nil, 4,
			"-            -\npool chat: 4 × handshake\npool chat: 1 × a\npool chat: 1 × b\n", ""},
		{"why an error came", &admin.UpgradeReport{Outcome: 1, Error: "rolled back", Pools: []admin.PoolReport{{Pool: "chat", Returned: 2, Error: "rolled back", Reasons: map[string]int{"worker refused": 2}}}}, nil, 1,
			"pool chat: rolled back\npool chat: 2 × worker refused\nNot upgraded", ""},
		{"busy", nil, &admin.BusyError{Pool: "chat", Since: since}, 1, "", "ktlsvisor: an upgrade of pool chat is running since " + since.Format(time.TimeOnly)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := serveFake(t, &fakeSupervisor{pools: []string{"chat"}, upgrade: func(admin.UpgradeRequest) (*admin.UpgradeReport, error) { return tt.rep, tt.err }})
			code, stdout, stderr := cli("upgrade", "--admin", path)
			if code != tt.code || !strings.Contains(stdout, tt.stdout) || !strings.Contains(stderr, tt.stderr) {
				t.Errorf("exit code %d, want %d\nstdout: %s\nstderr: %s", code, tt.code, stdout, stderr)
			}
			if tt.err != nil && stdout != "" {
				t.Errorf("stdout of a failure: %s", stdout)
			}
			code, stdout, _ = cli("upgrade", "--json", "--admin", path)
			if strings.Contains(stdout, "null") {
				t.Errorf("--json has a null: %s", stdout)
			}
			var rep admin.UpgradeReport
			if err := json.Unmarshal([]byte(stdout), &rep); err != nil {
				t.Fatalf("--json: %v: %s", err, stdout)
			}
			if code != tt.code || int(rep.Outcome) != tt.code {
				t.Errorf("--json: exit code %d, in the report %d, want %d", code, rep.Outcome, tt.code)
			}
		})
	}
}

func TestUpgradeRequestAsTyped(t *testing.T) {
	var got admin.UpgradeRequest
	f := &fakeSupervisor{pools: []string{"chat"}, upgrade: func(r admin.UpgradeRequest) (*admin.UpgradeReport, error) {
		got = r
		return &admin.UpgradeReport{}, nil
	}}
	path := serveFake(t, f)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Dir(self)
	t.Chdir(dir)
	if code, _, stderr := cli("upgrade", "--admin", path, "--command", "./"+filepath.Base(self), "--wait", "7s"); code != 0 {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	if want := (admin.UpgradeRequest{Pool: "chat", Command: self, Wait: 7 * time.Second}); got != want {
		t.Errorf("request %+v, want %+v", got, want)
	}
	f.pools = []string{"chat", "mail"}
	code, _, stderr := cli("upgrade", "--admin", path, "--command", self)
	if code != 2 || !strings.Contains(stderr, "chat, mail") {
		t.Errorf("--command for one of two pools: exit code %d: %s", code, stderr)
	}
}

func TestSupervisorNotReplaced(t *testing.T) {
	path := serveFake(t, &fakeSupervisor{sup: &admin.SupervisorReport{Outcome: 1, OldPID: 7, Error: "the successor was not ready in 20s"}})
	code, stdout, _ := cli("upgrade", "--supervisor", "--admin", path)
	if code != 1 || !strings.Contains(stdout, "pid 7 serves on: the successor was not ready") {
		t.Errorf("exit code %d: %s", code, stdout)
	}
}

// Where the supervisor dies over an upgrade, what its successor counted decides.
func TestUpgradeOfASupervisorThatDies(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.sock")
	l, err := admin.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		// Three connections: status, the upgrade that gets no answer, status.
		for i := range 3 {
			c, err := l.Accept()
			if err != nil {
				return
			}
			var buf [4096]byte
			_, _ = c.Read(buf[:])
			body := `{"counters":{"lost":0}}`
			if i == 2 {
				body = `{"counters":{"lost":1}}`
			}
			if i != 1 {
				_, _ = c.Write([]byte("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body))
			}
			_ = c.Close()
		}
	}()
	code, _, stderr := cli("upgrade", "--admin", path)
	_ = l.Close()
	<-served
	if code != 3 || !strings.Contains(stderr, "went away") {
		t.Errorf("exit code %d: %s", code, stderr)
	}
}

// What a stranger sends as its server name must not reach the terminal as it is.
func TestStrangersTextIsHarmless(t *testing.T) {
	path := serveFake(t, &fakeSupervisor{session: []admin.Session{{ID: "1", ServerName: "a\x1b]0;owned\x07\n2  forged", ALPN: "h2\u202e"}}})
	code, stdout, _ := cli("sessions", "--admin", path)
	if code != 0 || strings.ContainsAny(stdout, "\x1b\x07\u202e") || strings.Count(stdout, "\n") != 3 {
		t.Errorf("exit code %d: %q", code, stdout)
	}
}

func TestAge(t *testing.T) {
	for seconds, want := range map[float64]string{
		0.04: "0s", 2.34: "2.3s", 61: "1m1s", 3600 + 59: "1h1m", 86400*3 + 7300: "3d2h",
	} {
		if got := age(seconds); got != want {
			t.Errorf("age(%v) = %s, want %s", seconds, got, want)
		}
	}
}

// A child of a child that dies stays a descendant, for the keeper is a subreaper.
func TestKillDescendants(t *testing.T) {
	if err := sys.SetSubreaper(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", "sleep 100 & echo $!; wait")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var buf [32]byte
	if _, err := out.Read(buf[:]); err != nil { // the grandchild is there
		t.Fatal(err)
	}
	if got := descendants(os.Getpid()); len(got) != 2 || !slices.Contains(got, cmd.Process.Pid) {
		t.Errorf("descendants %v, want %d and its child", got, cmd.Process.Pid)
	}
	if n := killDescendants(); n != 2 {
		t.Errorf("%d were killed, want 2", n)
	}
	err = cmd.Wait()
	if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || !ws.Signaled() {
		t.Errorf("the child: %v", err)
	}
}
