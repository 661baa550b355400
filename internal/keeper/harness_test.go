package keeper

import (
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/testlog"
)

// world is a keeper process and the test's connections to what it starts.
type world struct {
	t    *testing.T
	cmd  *exec.Cmd
	ln   *net.UnixListener
	out  testlog.Buffer
	log  testlog.Buffer
	exit chan int
}

func self(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// startKeeper starts a keeper process; the test ends it if it still runs.
func startKeeper(t *testing.T, tc keeperConfig) *world {
	t.Helper()
	if tc.Supervisor == nil {
		tc.Supervisor = []string{self(t), "supervise"}
	}
	if tc.Role == "" {
		tc.Role = "supervisor"
	}
	w := &world{t: t, exit: make(chan int, 1)}
	socket := filepath.Join(t.TempDir(), "s")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	w.ln = ln
	config, err := json.Marshal(tc)
	if err != nil {
		t.Fatal(err)
	}
	w.cmd = exec.Command(self(t))
	w.cmd.Env = append(os.Environ(), envRole+"=keeper", envConfig+"="+string(config), envSocket+"="+socket, noRaceSleep)
	w.cmd.Stdout, w.cmd.Stderr = &w.out, &w.log
	if tc.deaf {
		r, pw, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		_ = r.Close()
		defer pw.Close()
		w.cmd.Stdout, w.cmd.Stderr = pw, pw
	}
	// Workers that outlive the keeper hold its stderr.
	w.cmd.WaitDelay = 2 * time.Second
	if err := w.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = w.cmd.Wait()
		w.exit <- w.cmd.ProcessState.ExitCode()
	}()
	t.Cleanup(func() {
		_ = ln.Close()
		_ = w.cmd.Process.Kill()
		<-done
		if t.Failed() {
			t.Logf("keeper's log:\n%s", w.log.String())
		}
		if strings.Contains(w.log.String(), "DATA RACE") {
			t.Errorf("data race in the keeper:\n%s", w.log.String())
		}
	})
	return w
}

// proc is a supervisor or writer process that called the test.
type child struct {
	t    *testing.T
	conn *net.UnixConn
	dec  *json.Decoder
	enc  *json.Encoder
	pid  int
}

// next waits for the next process to call.
func (w *world) next() *child {
	w.t.Helper()
	c := w.nextWithin(10 * time.Second)
	if c == nil {
		w.t.Fatal("no supervisor called")
	}
	return c
}

// nextWithin returns nil when none calls in time.
func (w *world) nextWithin(d time.Duration) *child {
	w.t.Helper()
	if err := w.ln.SetDeadline(time.Now().Add(d)); err != nil {
		w.t.Fatal(err)
	}
	conn, err := w.ln.AcceptUnix()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = conn.Close() })
	c := &child{t: w.t, conn: conn, dec: json.NewDecoder(conn), enc: json.NewEncoder(conn)}
	var hello response
	if err := c.dec.Decode(&hello); err != nil {
		w.t.Fatalf("a process called and said nothing: %v", err)
	}
	c.pid = hello.Pid
	return c
}

// lead waits for the next supervisor and lets it lead.
func (w *world) lead() *child {
	w.t.Helper()
	c := w.next()
	c.ok(command{Op: "lead"})
	return c
}

func (c *child) send(cmd command) {
	c.t.Helper()
	if err := c.enc.Encode(cmd); err != nil {
		c.t.Fatal(err)
	}
}

func (c *child) do(cmd command) response {
	c.t.Helper()
	c.send(cmd)
	var r response
	if err := c.conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		c.t.Fatal(err)
	}
	if err := c.dec.Decode(&r); err != nil {
		c.t.Fatalf("%s: %v", cmd.Op, err)
	}
	return r
}

func (c *child) ok(cmd command) response {
	c.t.Helper()
	r := c.do(cmd)
	if r.Err != "" {
		c.t.Fatalf("%s: %s", cmd.Op, r.Err)
	}
	return r
}

// refused expects a sentinel error.
func (c *child) refused(cmd command, is string) response {
	c.t.Helper()
	r := c.do(cmd)
	if r.Is != is {
		c.t.Fatalf("%s: error %q (%s), want %s", cmd.Op, r.Err, r.Is, is)
	}
	return r
}

func (c *child) kill() {
	c.t.Helper()
	if err := syscall.Kill(c.pid, syscall.SIGKILL); err != nil {
		c.t.Fatal(err)
	}
}

func (c *child) exit(code int) {
	c.t.Helper()
	c.send(command{Op: "exit", Code: code})
}

// fds counts the keeper's descriptors.
func (w *world) fds() int { return countFDs(strconv.Itoa(w.cmd.Process.Pid)) }

// wantFDs waits until the keeper has n descriptors.
func (w *world) wantFDs(n int) {
	w.t.Helper()
	if !eventually(func() bool { return w.fds() == n }) {
		w.t.Fatalf("the keeper has %d descriptors, want %d", w.fds(), n)
	}
}

func (w *world) wantLog(text string) {
	w.t.Helper()
	if !eventually(func() bool { return strings.Contains(w.log.String(), text) }) {
		w.t.Fatalf("the keeper did not log %q", text)
	}
}

func (w *world) wantExit(code int) {
	w.t.Helper()
	select {
	case got := <-w.exit:
		if got != code {
			w.t.Fatalf("the keeper exited with %d, want %d", got, code)
		}
	case <-time.After(15 * time.Second):
		w.t.Fatal("the keeper did not exit")
	}
}

// eventually polls a fact of another process.
func eventually(ok func() bool) bool {
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return true
		}
	}
	return ok()
}

func alive(pid int) bool {
	_, err := os.Stat("/proc/" + strconv.Itoa(pid))
	return err == nil
}

// wantFound checks that exactly the entries From… of a put are there.
func wantFound(t *testing.T, got []found, cmd command) {
	t.Helper()
	if len(got) != cmd.Count {
		t.Fatalf("%d entries, want %d", len(got), cmd.Count)
	}
	seen := make(map[uint64]bool)
	for _, f := range got {
		if f.Key.ID < cmd.From || f.Key.ID >= cmd.From+uint64(cmd.Count) || seen[f.Key.ID] || f.Key.Kind != cmd.Kind || f.Key.Name != cmd.Name {
			t.Fatalf("unexpected entry %v", f.Key)
		}
		seen[f.Key.ID] = true
		if f.Meta != cmd.Tag || len(f.FDs) != cmd.FDs {
			t.Fatalf("entry %v: meta %q, %d descriptors", f.Key, f.Meta, len(f.FDs))
		}
		for j, text := range f.FDs {
			if want := cmd.Tag + "/" + strconv.FormatUint(f.Key.ID, 10) + "/" + strconv.Itoa(j); text != want {
				t.Fatalf("entry %v: descriptor %d holds %q, want %q", f.Key, j, text, want)
			}
		}
	}
}
