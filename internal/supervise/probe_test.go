package supervise

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/config"
	"github.com/ktlsvisor/ktlsvisor/pidfd"
)

// A program that never says what it can do, ends at once, or lives on when its channel has
// ended, holds up a dry run no longer than it may, and leaves no process behind.
func TestProbeOfAProgramThatIsNoWorker(t *testing.T) {
	u := newUnit(t)
	pid := t.TempDir() + "/pid"
	for name, c := range map[string]struct{ script, want string }{
		"says nothing": {"trap '' PIPE; echo $$ > " + pid + "; exec sleep 1000", "said nothing within ready_timeout"},
		"ends":         {"echo $$ > " + pid + "; exit 3", "look at what it printed"},
	} {
		cfg := config.NewPool()
		cfg.ReadyTimeout = config.Duration(300 * time.Millisecond)
		_, err := u.s.probe(t.Context(), "p", cfg, []string{"/bin/sh", "-c", c.script})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
		b, err := os.ReadFile(pid)
		if err != nil {
			t.Fatal(err)
		}
		n, _ := strconv.Atoi(strings.TrimSpace(string(b)))
		if p, err := os.FindProcess(n); err == nil && p.Signal(syscall.Signal(0)) == nil {
			t.Errorf("%s: process %d is left", name, n)
		}
	}
	if _, err := u.s.probe(t.Context(), "p", config.NewPool(), []string{"/nonexistent"}); err == nil || !errors.Is(err, exec.ErrNotFound) && !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no program: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := u.s.probe(ctx, "p", config.NewPool(), []string{"/bin/sleep", "1000"}); !errors.Is(err, context.Canceled) {
		t.Errorf("nobody waits for it any more: %v", err)
	}
}

// A worker that was started for a dry run, and does not mind the end of its channel, ends
// when its supervisor, here another process of this test, is killed.
func TestProbeEndsWithItsSupervisor(t *testing.T) {
	const env = "KTLSVISOR_TEST_PROBE"
	if file := os.Getenv(env); file != "" {
		_, err := newUnit(t).s.probe(t.Context(), "p", config.NewPool(), []string{"/bin/sh", "-c",
			"trap '' PIPE; echo $$ > " + file + ".new; mv " + file + ".new " + file + "; exec sleep 1000"})
		t.Fatal(err)
	}
	file := t.TempDir() + "/pid"
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), env+"="+file)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill := sync.OnceFunc(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	defer kill()
	pid := 0
	for deadline := time.Now().Add(patience); pid == 0; time.Sleep(time.Millisecond) {
		b, _ := os.ReadFile(file)
		pid, _ = strconv.Atoi(strings.TrimSpace(string(b)))
		if time.Now().After(deadline) {
			t.Fatal("the program does not start")
		}
	}
	p, err := pidfd.Open(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.Close() }()
	kill()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := p.Wait(ctx); err != nil {
		t.Errorf("process %d lives on: %v", pid, errors.Join(err, p.Signal(syscall.SIGKILL)))
	}
}
