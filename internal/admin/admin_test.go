package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"

	"github.com/ktlsvisor/ktlsvisor/internal/testlog"
)

func TestMain(m *testing.M) {
	if path := os.Getenv(foreignEnv); path != "" {
		foreignMain(path)
		return
	}
	goleak.VerifyTestMain(m)
}

// fakeBackend answers what a test put into it.
type fakeBackend struct {
	operations
	status   func() (*Status, error)
	sessions []Session
	upgrade  func(context.Context, UpgradeRequest, func(Progress)) (*UpgradeReport, error)
	rekey    func(context.Context, RekeyRequest, func(Progress)) (*RekeyReport, error)
	stop     func(context.Context, time.Duration) error
}

func (b *fakeBackend) Rekey(ctx context.Context, r RekeyRequest, p func(Progress)) (*RekeyReport, error) {
	return b.rekey(ctx, r, p)
}

func (b *fakeBackend) Status(context.Context) (*Status, error) {
	if b.status == nil {
		return &Status{Supervisor: SupervisorStatus{PID: 4711}}, nil
	}
	return b.status()
}
func (b *fakeBackend) Sessions(context.Context) ([]Session, error) { return b.sessions, nil }
func (b *fakeBackend) Upgrade(ctx context.Context, r UpgradeRequest, p func(Progress)) (*UpgradeReport, error) {
	return b.upgrade(ctx, r, p)
}
func (b *fakeBackend) UpgradeSupervisor(context.Context, func(Progress)) (*SupervisorReport, error) {
	return &SupervisorReport{OldPID: 1, NewPID: 2}, nil
}
func (b *fakeBackend) Stop(ctx context.Context, grace time.Duration) error {
	return b.stop(ctx, grace)
}

// serve runs a server for the length of a test.
func serve(t *testing.T, b Backend) (path string, log *testlog.Buffer, shutdown func()) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "a.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	log = &testlog.Buffer{}
	shutdown = serveOn(t, l, b, log)
	return path, log, shutdown
}

func serveOn(t *testing.T, l net.Listener, b Backend, log *testlog.Buffer) (shutdown func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- Serve(ctx, l, uint32(os.Getuid()), b, hclog.New(&hclog.LoggerOptions{Output: log, Level: hclog.Debug}))
	}()
	var once sync.Once
	shutdown = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Serve: %v", err)
			}
		})
	}
	t.Cleanup(shutdown)
	return shutdown
}

func TestRoundTrip(t *testing.T) {
	want := &UpgradeReport{Outcome: OutcomeStay, Pools: []PoolReport{{Pool: "chat", From: 1, To: 2, Moved: 7, Stayed: 1}}}
	var asked UpgradeRequest
	b := &fakeBackend{
		sessions: []Session{{ID: "1", Layer: "kernel"}},
		upgrade: func(_ context.Context, r UpgradeRequest, p func(Progress)) (*UpgradeReport, error) {
			asked = r
			p(Progress{Text: "moving", Done: 1, Total: 8})
			return want, nil
		},
	}
	path, _, _ := serve(t, b)
	c := Dial(path)
	ctx := t.Context()

	st, err := c.Status(ctx)
	if err != nil || st.Supervisor.PID != 4711 {
		t.Fatalf("Status = %+v, %v", st, err)
	}
	list, err := c.Sessions(ctx)
	if err != nil || cmp.Diff(b.sessions, list) != "" {
		t.Fatalf("Sessions = %+v, %v", list, err)
	}
	var seen []Progress
	req := UpgradeRequest{Pool: "chat", Command: "/bin/chat2", Wait: 3 * time.Second}
	rep, err := c.Upgrade(ctx, req, func(p Progress) { seen = append(seen, p) })
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, rep, cmpopts.EquateEmpty()); d != "" {
		t.Errorf("report (-want +got):\n%s", d)
	}
	if d := cmp.Diff(req, asked); d != "" {
		t.Errorf("request as the backend saw it (-want +got):\n%s", d)
	}
	if d := cmp.Diff([]Progress{{Text: "moving", Done: 1, Total: 8}}, seen); d != "" {
		t.Errorf("progress (-want +got):\n%s", d)
	}
	sup, err := c.UpgradeSupervisor(ctx, nil)
	if err != nil || sup.NewPID != 2 {
		t.Errorf("UpgradeSupervisor = %+v, %v", sup, err)
	}
}

func TestBusyKeepsItsIdentity(t *testing.T) {
	for _, afterProgress := range []bool{false, true} {
		b := &fakeBackend{upgrade: func(_ context.Context, _ UpgradeRequest, p func(Progress)) (*UpgradeReport, error) {
			if afterProgress {
				p(Progress{Text: "x"})
			}
			return nil, fmt.Errorf("refused: %w", &BusyError{Pool: "chat", Since: time.Now()})
		}}
		path, _, _ := serve(t, b)
		_, err := Dial(path).Upgrade(t.Context(), UpgradeRequest{}, nil)
		if !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), "an upgrade of pool chat is running since") {
			t.Errorf("after progress: %v: error %v", afterProgress, err)
		}
	}
}

func TestClientThatGoesAwayDoesNotCancel(t *testing.T) {
	started, finish, ended := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	b := &fakeBackend{upgrade: func(ctx context.Context, _ UpgradeRequest, p func(Progress)) (*UpgradeReport, error) {
		close(started)
		<-finish
		for range 10 * progressQueue { // nobody reads them
			p(Progress{Text: "still moving"})
		}
		ended <- ctx.Err()
		return &UpgradeReport{}, nil
	}}
	path, _, _ := serve(t, b)
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() {
		_, err := Dial(path).Upgrade(ctx, UpgradeRequest{}, nil)
		result <- err
	}()
	<-started
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("client: %v", err)
	}
	close(finish)
	if err := <-ended; err != nil {
		t.Errorf("the operation's context after its client went away: %v", err)
	}
}

func TestShutdownLetsOperationsFinish(t *testing.T) {
	started, finish := make(chan struct{}), make(chan struct{})
	b := &fakeBackend{upgrade: func(context.Context, UpgradeRequest, func(Progress)) (*UpgradeReport, error) {
		close(started)
		<-finish
		return &UpgradeReport{DurationSecs: 1.5}, nil
	}}
	path, _, shutdown := serve(t, b)
	type answer struct {
		rep *UpgradeReport
		err error
	}
	got := make(chan answer, 1)
	go func() {
		rep, err := Dial(path).Upgrade(t.Context(), UpgradeRequest{}, nil)
		got <- answer{rep, err}
	}()
	<-started
	stopped := make(chan struct{})
	go func() { shutdown(); close(stopped) }()
	close(finish)
	if a := <-got; a.err != nil || a.rep.DurationSecs != 1.5 {
		t.Errorf("answer during shutdown: %+v, %v", a.rep, a.err)
	}
	<-stopped
}

// A supervisor that is restarted closes its connections; the next one finds the
// listener with the keeper. A question asked in between is answered by it.
func TestStatusSurvivesRestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := l.File() // what the keeper holds
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()

	type answer struct {
		st  *Status
		err error
	}
	got := make(chan answer, 1)
	go func() {
		st, err := Dial(path).Status(t.Context())
		got <- answer{st, err}
	}()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close() // the first supervisor dies with the request
	_ = l.Close()

	again, err := net.FileListener(f)
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, again, &fakeBackend{status: func() (*Status, error) {
		return &Status{Supervisor: SupervisorStatus{Generation: 2}}, nil
	}}, &testlog.Buffer{})
	if a := <-got; a.err != nil || a.st.Supervisor.Generation != 2 {
		t.Errorf("Status = %+v, %v", a.st, a.err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the socket's file went away with the first supervisor: %v", err)
	}
}

// A supervisor that has handed over says so; its successor gets the request, once.
func TestEndingIsAskedAgain(t *testing.T) {
	asked := 0
	b := &fakeBackend{upgrade: func(context.Context, UpgradeRequest, func(Progress)) (*UpgradeReport, error) {
		if asked++; asked < 3 {
			return nil, fmt.Errorf("pool chat: %w", ErrEnding)
		}
		return &UpgradeReport{}, nil
	}}
	path, _, _ := serve(t, b)
	if _, err := Dial(path).Upgrade(t.Context(), UpgradeRequest{}, nil); err != nil || asked != 3 {
		t.Errorf("error %v after %d requests", err, asked)
	}
}

func TestUpgradeIsNeverRepeated(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan int, 1)
	go func() {
		n := 0
		for {
			c, err := l.Accept()
			if err != nil {
				accepted <- n
				return
			}
			n++
			var buf [1024]byte
			_, _ = c.Read(buf[:])
			_ = c.Close()
		}
	}()
	_, err = Dial(path).Upgrade(t.Context(), UpgradeRequest{}, nil)
	if !errors.Is(err, ErrInterrupted) {
		t.Errorf("error %v, want ErrInterrupted", err)
	}
	_ = l.Close()
	if n := <-accepted; n != 1 {
		t.Errorf("the upgrade was asked for %d times", n)
	}
}

func TestStopWaitsForTheEnd(t *testing.T) {
	var path string
	var shutdown func()
	asked := make(chan time.Duration, 1)
	b := &fakeBackend{stop: func(_ context.Context, grace time.Duration) error {
		asked <- grace
		go shutdown()
		return nil
	}}
	path, _, shutdown = serve(t, b)
	if err := Dial(path).Stop(t.Context(), 3*time.Second); err != nil {
		t.Fatal(err)
	}
	if g := <-asked; g != 3*time.Second {
		t.Errorf("grace %s", g)
	}
	_, err := Dial(path).Status(t.Context())
	if !errors.Is(err, ErrNotRunning) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "ktlsvisor run") {
		t.Errorf("Status after Stop: %v", err)
	}
	if err := RemoveStale(path); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file after RemoveStale: %v", err)
	}
}

func TestBadRequests(t *testing.T) {
	b := &fakeBackend{upgrade: func(context.Context, UpgradeRequest, func(Progress)) (*UpgradeReport, error) {
		t.Error("a bad request started an upgrade")
		return &UpgradeReport{}, nil
	}}
	path, _, _ := serve(t, b)
	hc := Dial(path).http
	for _, tt := range []struct {
		name, method, path, body string
		status                   int
		says                     string
	}{
		{"not JSON", "POST", "/v1/upgrade", "pool=chat", 400, "invalid character"},
		{"unknown field", "POST", "/v1/upgrade", `{"poool":"chat"}`, 400, `unknown field \"poool\"`},
		{"two objects", "POST", "/v1/upgrade", `{}{}`, 400, "follows"},
		{"wrong type", "POST", "/v1/upgrade", `{"wait":"1s"}`, 400, "cannot unmarshal"},
		{"oversized", "POST", "/v1/upgrade", `{"pool":"` + strings.Repeat("x", maxBody) + `"}`, 400, "too large"},
		{"relative command", "POST", "/v1/upgrade", `{"pool":"a","command":"chat2"}`, 400, "absolute"},
		{"negative wait", "POST", "/v1/upgrade", `{"wait":-1}`, 400, "negative"},
		{"field for an operation without any", "POST", "/v1/upgrade-supervisor", `{"a":1}`, 400, "unknown field"},
		{"negative grace", "POST", "/v1/stop", `{"grace":-1}`, 400, "negative"},
		{"wrong method", "GET", "/v1/upgrade", "", 404, "no such request"},
		{"wrong path", "GET", "/v1/secrets", "", 404, "/v1/secrets"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			req, err := http.NewRequestWithContext(t.Context(), tt.method, "http://x"+tt.path, strings.NewReader(tt.body))
			if err != nil {
				t.Fatal(err)
			}
			resp, err := hc.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			var body [2048]byte
			n, _ := resp.Body.Read(body[:])
			if resp.StatusCode != tt.status || !strings.Contains(string(body[:n]), tt.says) {
				t.Errorf("%s: %s, want %d and %q", resp.Status, body[:n], tt.status, tt.says)
			}
		})
	}
	if _, err := Dial(path).Status(t.Context()); err != nil {
		t.Errorf("status after all that: %v", err)
	}
}

func TestGarbageClosesTheConnectionOnly(t *testing.T) {
	path, _, _ := serve(t, &fakeBackend{})
	for name, data := range map[string]string{
		"binary":     "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
		"big header": "GET /v1/status HTTP/1.1\r\nX: " + strings.Repeat("y", 1<<20),
	} {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write([]byte(data)) // the server may close before all is written
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		var buf [4096]byte
		for err == nil {
			_, err = c.Read(buf[:])
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: the connection stays open", name)
		}
		_ = c.Close()
	}
	if _, err := Dial(path).Status(t.Context()); err != nil {
		t.Errorf("status after garbage: %v", err)
	}
}

// A script that counts what is in a list must not meet null.
func TestReportsHaveListsNotNull(t *testing.T) {
	for _, r := range []any{
		UpgradeReport{},
		&UpgradeReport{Outcome: OutcomeRefused, Pools: []PoolReport{{Pool: "chat"}}},
		struct{ R *UpgradeReport }{&UpgradeReport{Pools: []PoolReport{{Pool: "chat", OldPIDs: []int{7}}}}},
	} {
		b, err := json.Marshal(r)
		if err != nil || strings.Contains(string(b), "null") {
			t.Errorf("%s, %v", b, err)
		}
	}
	b, err := json.Marshal(PoolReport{OldPIDs: []int{7}, Moved: 3})
	if err != nil || !strings.Contains(string(b), `"old_pids":[7],"new_pids":[]`) || !strings.Contains(string(b), `"moved":3`) {
		t.Errorf("%s, %v", b, err)
	}
}
