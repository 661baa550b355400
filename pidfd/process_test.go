package pidfd

import (
	"context"
	"errors"
	"os"
	"strconv"
	"sync"
	"syscall"
	"testing"
)

func TestChildDies(t *testing.T) {
	countFDs(t)
	h, _ := start(t, "live")
	p := open(t, h.pid())

	if pid, err := p.PID(); err != nil || pid != h.pid() {
		t.Errorf("PID: %d, %v; the child is %d", pid, err, h.pid())
	}
	if err := p.Signal(0); err != nil {
		t.Errorf("signal 0 to a live process: %v", err)
	}
	if dead, err := p.Dead(); dead || err != nil {
		t.Errorf("a live process: Dead %v, %v", dead, err)
	}

	// Several waiters, and one who gives up early without disturbing the others.
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.Wait(gone); !errors.Is(err, context.Canceled) {
		t.Errorf("Wait with a context that has ended: %v", err)
	}
	var waiters sync.WaitGroup
	for range 3 {
		waiters.Go(func() {
			if err := p.Wait(t.Context()); err != nil {
				t.Errorf("Wait: %v", err)
			}
		})
	}
	if err := p.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waiters.Wait()

	// Dead, and not waited for by its parent, which is this process.
	if dead, err := p.Dead(); !dead || err != nil {
		t.Errorf("after Wait: Dead %v, %v", dead, err)
	}
	if err := p.Signal(syscall.SIGTERM); !errors.Is(err, ErrDead) {
		t.Errorf("signal to a zombie: %v", err)
	}
	if pid, err := p.PID(); err != nil || pid != h.pid() {
		t.Errorf("PID of a zombie: %d, %v", pid, err)
	}
	if err := p.Wait(gone); err != nil {
		t.Errorf("Wait for a dead process, context ended: %v", err)
	}

	h.end()
	if pid, err := p.PID(); !errors.Is(err, ErrDead) {
		t.Errorf("PID after the child was waited for: %d, %v", pid, err)
	}
	if err := p.Signal(syscall.SIGKILL); !errors.Is(err, ErrDead) {
		t.Errorf("signal after the child was waited for: %v", err)
	}
	if fd, err := p.GetFD(0); !errors.Is(err, ErrDead) || fd != -1 {
		t.Errorf("GetFD after the child was waited for: %d, %v", fd, err)
	}
	if dead, err := p.Dead(); !dead || err != nil {
		t.Errorf("after the child was waited for: Dead %v, %v", dead, err)
	}
}

func TestProcessThatIsNoChild(t *testing.T) {
	countFDs(t)
	h, line := start(t, "orphan")
	pid, err := strconv.Atoi(line)
	if err != nil {
		t.Fatal(err)
	}
	p := open(t, pid)
	parent := open(t, h.pid())
	if err := parent.Wait(t.Context()); err != nil { // ends by itself
		t.Fatal(err)
	}
	if dead, err := p.Dead(); dead || err != nil {
		t.Fatalf("the orphan: Dead %v, %v", dead, err)
	}
	var ws syscall.WaitStatus
	if _, err := syscall.Wait4(pid, &ws, syscall.WNOHANG, nil); !errors.Is(err, syscall.ECHILD) {
		t.Fatalf("process %d is a child of this one, the test proves nothing: %v", pid, err)
	}
	kill(t, p)
}

func TestDeathIsSeenWithoutASignalOfOurs(t *testing.T) {
	h, _ := start(t, "live")
	p := open(t, h.pid())
	done := p.Done()
	select {
	case <-done:
		t.Fatal("done before the process died")
	default:
	}
	if err := h.stdin.Close(); err != nil {
		t.Fatal(err)
	}
	<-done
}

func TestOpenAfterDeath(t *testing.T) {
	countFDs(t)
	h, _ := start(t, "live")
	first := open(t, h.pid())
	kill(t, first)

	// Still a zombie: it can be opened, and is dead.
	second := open(t, h.pid())
	if err := second.Wait(t.Context()); err != nil {
		t.Errorf("Wait for a zombie: %v", err)
	}
	if err := second.Signal(0); !errors.Is(err, ErrDead) {
		t.Errorf("signal 0 to a zombie: %v", err)
	}
	h.end()
	if p, err := Open(h.pid()); !errors.Is(err, ErrDead) {
		t.Errorf("Open of a pid that is nobody's: %v, %v", p, err)
	}
	for _, pid := range []int{0, -1, -h.pid(), 1 << 30} {
		if _, err := Open(pid); err == nil {
			t.Errorf("Open(%d) succeeded", pid)
		}
	}
}

// A pid that was given to another process is not the process that had it. It runs in
// a pid namespace of its own, where pids can be handed out again at will.
func TestReusedPidIsAnotherProcess(t *testing.T) {
	cmd := helperCommand("reuse")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	if uid := os.Getuid(); uid != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}}
	}
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.ENOSPC) {
		t.Skipf("no new pid namespace for this user: %v", err)
	}
	if err != nil || string(out) != "ok\n" {
		t.Fatalf("said %q: %v", out, err)
	}
}

func checkReusedPid() error {
	first, err := startHelper("live")
	if err != nil {
		return err
	}
	pid := first.pid()
	p, err := Open(pid)
	if err != nil {
		return err
	}
	defer func() { _ = p.Close() }()
	first.end()

	var second *helper
	for range 200 {
		// The next process gets the next free id; a thread of the runtime may take it.
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0); err != nil {
			return err
		}
		if second, err = startHelper("live"); err != nil {
			return err
		}
		if second.pid() == pid {
			break
		}
		second.end()
	}
	defer second.end()
	if second.pid() != pid {
		return errors.New("the pid was never given out again")
	}
	if err := syscall.Kill(pid, 0); err != nil {
		return err
	}
	if err := p.Signal(syscall.SIGKILL); !errors.Is(err, ErrDead) {
		return errors.New("a signal to the first process went to the second one")
	}
	if fd, err := p.GetFD(0); !errors.Is(err, ErrDead) || fd != -1 {
		return errors.New("a descriptor of the second process was taken for one of the first")
	}
	if err := p.Wait(context.Background()); err != nil {
		return err
	}
	if _, err := second.line(); err != nil { // not killed: it says its pid
		return err
	}
	other, err := Open(pid)
	if err != nil {
		return err
	}
	defer func() { _ = other.Close() }()
	return other.Signal(0)
}

func TestCloseEndsWaiters(t *testing.T) {
	countFDs(t)
	h, _ := start(t, "live")
	p := open(t, h.pid())
	result := make(chan error)
	go func() { result <- p.Wait(context.Background()) }()
	p.Done() // the watcher runs, whether or not the waiter got that far
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-result; !errors.Is(err, os.ErrClosed) {
		t.Errorf("Wait during Close: %v", err)
	}
	for name, err := range map[string]error{
		"Close":  p.Close(),
		"Signal": p.Signal(syscall.SIGKILL),
		"Wait":   p.Wait(context.Background()),
		"PID":    second(p.PID()),
		"FD":     second(p.FD()),
		"GetFD":  second(p.GetFD(0)),
		"Dead":   second(p.Dead()),
	} {
		if want := os.ErrClosed; name == "Close" && err != nil || name != "Close" && !errors.Is(err, want) {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
	select {
	case <-p.Done():
		t.Error("Close looks like a death")
	default:
	}
	if err := h.cmd.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("Close did something to the process: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }
