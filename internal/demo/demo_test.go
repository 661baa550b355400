package demo

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ktlsvisor/ktlsvisor/internal/load"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// program is the ktlsvisor to show: a guest has one, a host builds it.
func program(t *testing.T) string {
	t.Helper()
	if guest.InGuest() {
		path, err := exec.LookPath("ktlsvisor")
		if err != nil {
			t.Fatal(err)
		}
		return path
	}
	path := filepath.Join(t.TempDir(), "ktlsvisor")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", path, "github.com/ktlsvisor/ktlsvisor/cmd/ktlsvisor").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return path
}

// kernelSessions is small, because a guest's processor is emulated.
const kernelSessions = 20

// With kernel TLS the demo leaves nothing out, and a worker's kill -9 costs no
// connection either.
func TestDemoInTheKernel(t *testing.T) {
	guest.NeedKernelTLS(t)
	var steps strings.Builder
	rep, err := Run(t.Context(), Options{Program: program(t), Sessions: kernelSessions, Offload: "kernel", Steps: &steps})
	if err != nil {
		t.Fatalf("%v\n%s", err, steps.String())
	}
	var table strings.Builder
	rep.Print(&table)
	t.Logf("\n%s", table.String())
	if !rep.OK || rep.Layer != "kernel" {
		t.Errorf("ok %v, layer %s", rep.OK, rep.Layer)
	}
	last := rep.Steps[len(rep.Steps)-1]
	if last.Name != "kill -9 a worker" || last.After != kernelSessions || len(last.OldPIDs) != 1 || len(last.NewPIDs) != 1 {
		t.Errorf("the last step: %+v", last)
	}
}

// A ktlsvisor that does not come up is an error that shows its log, and soon.
func TestHostBrokenProgram(t *testing.T) {
	program := filepath.Join(t.TempDir(), "broken")
	if err := os.WriteFile(program, []byte("#!/bin/sh\necho no such thing\nexit 3\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	_, err := Run(t.Context(), Options{Program: program, Sessions: 1})
	if err == nil || !strings.Contains(err.Error(), "ended by itself: ktlsvisor run: exit status 3") || !strings.Contains(err.Error(), "no such thing") {
		t.Errorf("error: %v", err)
	}
}

func TestDemoNeedsFiles(t *testing.T) {
	_, err := Run(t.Context(), Options{Program: "/nonexistent", Sessions: 1 << 30})
	if err == nil || !strings.Contains(err.Error(), "ulimit -Hn") {
		t.Errorf("a billion sessions: %v", err)
	}
}

func TestConclusion(t *testing.T) {
	good := load.Report{Sessions: 3, Alive: 3}
	change := func(f func(*load.Report)) *load.Report {
		r := good
		f(&r)
		return &r
	}
	for _, tt := range []struct {
		name  string
		fleet *load.Report
		ok    bool
		says  string
	}{
		{"good", &good, true, "3 of 3 connections are still open. 0 lost, 0 wrong bytes."},
		{"interrupted", change(func(r *load.Report) { r.Interrupted = 1 }), true, "1 connections had data in the worker that was killed"},
		{"lost", change(func(r *load.Report) { r.Alive, r.Lost, r.LostReasons = 2, 1, map[string]int{"EOF": 1} }), false, "1 × EOF"},
		{"wrong", change(func(r *load.Report) { r.WrongBytes = 7 }), false, "7 wrong bytes"},
		{"unclean", change(func(r *load.Report) { r.Unclean = 1 }), false, "1 × ended without close_notify"},
		{"nothing connected", nil, false, "0 of 3"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := Report{Sessions: 3, fleet: tt.fleet}
			r.conclude()
			var b strings.Builder
			r.Print(&b)
			if r.OK != tt.ok || !strings.Contains(b.String(), tt.says) {
				t.Errorf("ok %v, want %v; it says %q, want %q in it", r.OK, tt.ok, b.String(), tt.says)
			}
		})
	}
}

// A unit that says a lot is remembered by its last lines only.
func TestTail(t *testing.T) {
	var log tail
	for range 3 * tailLines {
		_, _ = log.Write([]byte("old "))
		_, _ = log.Write([]byte("line\nha"))
		_, _ = log.Write([]byte("lf\n"))
	}
	got := strings.Split(log.String(), "\n")
	if len(got) != tailLines || got[len(got)-1] != "half" || got[len(got)-2] != "old line" {
		t.Errorf("%d lines, the last %q", len(got), got[len(got)-1])
	}
}

// ^C while it starts: what was started is ended.
func TestHostInterrupted(t *testing.T) {
	dir := t.TempDir()
	pidFile := filepath.Join(dir, "pid")
	program := filepath.Join(dir, "slow")
	if err := os.WriteFile(program, []byte("#!/bin/sh\necho $$ >"+pidFile+"\nexec sleep 1000\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() {
		_, err := Run(ctx, Options{Program: program, Sessions: 1})
		done <- err
	}()
	pid := 0
	for deadline := time.Now().Add(10 * time.Second); pid == 0; time.Sleep(poll) {
		b, _ := os.ReadFile(pidFile)
		pid, _ = strconv.Atoi(strings.TrimSpace(string(b)))
		if time.Now().After(deadline) {
			t.Fatal("the program does not start")
		}
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("error: %v", err)
	}
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("process %d is still there: %v", pid, err)
	}
}
