package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/ktls"
	"github.com/ktlsvisor/ktlsvisor/pidfd"
)

// Whoever starts another one after `stop` must not meet what is left of the first.
func TestStopReturnsAfterTheKeeper(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.sock")
	// The scripts' program, which is this test's.
	program, err := exec.LookPath("ktlsvisor")
	if err != nil {
		t.Fatal(err)
	}
	// The tree is this test's alone; a failure must not leave it behind.
	var log bytes.Buffer
	run := exec.CommandContext(t.Context(), program, "run", "--listen", "127.0.0.1:0", "--self-signed", "--admin", path, "--", program, "echo-worker")
	run.Cancel = func() error { return run.Process.Signal(os.Interrupt) }
	run.WaitDelay = 10 * time.Second
	run.Stdout, run.Stderr = &log, &log
	if err := run.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- run.Wait() }()
	waited := false
	defer func() {
		if !waited {
			_ = run.Process.Signal(os.Interrupt)
			<-ended
		}
		if t.Failed() {
			t.Logf("%s", log.String())
		}
	}()

	c := admin.Dial(path)
	var st *admin.Status
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if st, err = c.Status(t.Context()); err == nil && len(st.Listeners) > 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("it does not serve: %v", err)
		}
	}
	if st.Supervisor.KeeperPID != run.Process.Pid {
		t.Errorf("keeper_pid %d, the keeper is %d", st.Supervisor.KeeperPID, run.Process.Pid)
	}
	keeper, err := pidfd.Open(run.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer keeper.Close()

	code, stdout, stderr := cli("stop", "--grace", "2s", "--admin", path)
	dead, err := keeper.Dead()
	if code != 0 || !strings.Contains(stdout, "stopped") || stderr != "" {
		t.Errorf("exit code %d\nstdout: %s\nstderr: %s", code, stdout, stderr)
	}
	if err != nil || !dead {
		t.Errorf("the keeper after stop: dead %v, %v", dead, err)
	}
	if err := <-ended; err != nil {
		t.Errorf("run: %v", err)
	}
	waited = true
}

// unitThatEnds is a unit whose supervisor stops serving at once when it is asked to.
type unitThatEnds struct {
	admin.Backend
	status admin.SupervisorStatus
	end    func()
}

func (u *unitThatEnds) Status(context.Context) (*admin.Status, error) {
	return &admin.Status{Supervisor: u.status}, nil
}

func (u *unitThatEnds) Stop(context.Context, time.Duration) error {
	go u.end()
	return nil
}

// The keeper usually ends within a millisecond of its listener. This one takes longer.
func TestStopWaitsForASlowKeeper(t *testing.T) {
	for _, tt := range []struct {
		name  string
		waits bool
	}{{"its own keeper", true}, {"an id of another pid namespace", false}} {
		t.Run(tt.name, func(t *testing.T) {
			// The shell stands for the keeper, the process below it for the supervisor.
			sh := exec.Command("sh", "-c", "sleep 60 & echo $!; read x; kill $!; wait")
			stdin, err := sh.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			stdout, err := sh.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := sh.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() { _ = sh.Wait() }()
			defer stdin.Close()
			var child int
			if _, err := fmt.Fscan(stdout, &child); err != nil {
				t.Fatal(err)
			}
			if !tt.waits {
				child = os.Getpid()
			}
			keeper, err := pidfd.Open(sh.Process.Pid)
			if err != nil {
				t.Fatal(err)
			}
			defer keeper.Close()

			path := filepath.Join(t.TempDir(), "a.sock")
			l, err := admin.Listen(path)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			unit := &unitThatEnds{status: admin.SupervisorStatus{PID: child, KeeperPID: sh.Process.Pid}, end: cancel}
			served := make(chan error, 1)
			go func() {
				err := admin.Serve(ctx, l, uint32(os.Getuid()), unit, hclog.NewNullLogger())
				if tt.waits {
					// How long does not matter, only that it is after the socket's end.
					time.AfterFunc(300*time.Millisecond, func() { _ = stdin.Close() })
				}
				served <- err
			}()
			code, out, errs := cli("stop", "--grace", "10s", "--admin", path)
			dead, err := keeper.Dead()
			if code != 0 || err != nil || dead != tt.waits || (errs == "") != tt.waits {
				t.Errorf("exit code %d, keeper dead %v, %v\nstdout: %s\nstderr: %s", code, dead, err, out, errs)
			}
			if err := <-served; err != nil {
				t.Error(err)
			}
		})
	}
}

// A keeper that does not end is a failure, with its pid, and not an endless wait.
func TestStopOfAKeeperThatStays(t *testing.T) {
	self, err := pidfd.Open(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	err = waitKeeper(t.Context(), self, 10*time.Millisecond)
	if err == nil || !strings.Contains(err.Error(), "still runs: waited 10ms") {
		t.Errorf("error %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := waitKeeper(ctx, self, time.Minute); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
}

func TestKernelMissing(t *testing.T) {
	offload := func(s ktls.Status, reason, remedy string) ktls.Check {
		return ktls.Check{Feature: ktls.FeatureOffload, Status: s, Reason: reason, Remedy: remedy}
	}
	for name, tt := range map[string]struct {
		caps           ktls.Capabilities
		ok             bool
		reason, remedy string
	}{
		"there": {caps: ktls.Capabilities{KernelTLS: true}, ok: true},
		"no module": {caps: ktls.Capabilities{Checks: []ktls.Check{
			{Feature: ktls.FeatureModule, Status: ktls.StatusUnsupported, Reason: "no module", Remedy: "load it"}}},
			reason: "no module", remedy: "load it"},
		"no cipher": {caps: ktls.Capabilities{Checks: []ktls.Check{
			{Feature: ktls.FeatureModule, Status: ktls.StatusSupported},
			offload(ktls.StatusSupported, "", ""), offload(ktls.StatusUnknown, "out of descriptors", "")}},
			reason: "out of descriptors", remedy: `see "ktlsvisor doctor"`},
		"nothing known": {reason: "the probe found no version and cipher that work both ways", remedy: `see "ktlsvisor doctor"`},
	} {
		reason, remedy, ok := kernelMissing(&tt.caps)
		if reason != tt.reason || remedy != tt.remedy || ok != tt.ok {
			t.Errorf("%s: %q, %q, %v", name, reason, remedy, ok)
		}
		err := checkOffload("kernel", func() *ktls.Capabilities { return &tt.caps })
		if (err == nil) != tt.ok {
			t.Errorf("%s: --offload kernel: %v", name, err)
		}
	}
}
