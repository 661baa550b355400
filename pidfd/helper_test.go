package pidfd

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"
)

// The test binary is its own child: helperEnv names what it does then.
const helperEnv = "PIDFD_TEST_HELPER"

func TestMain(m *testing.M) {
	switch os.Getenv(helperEnv) {
	case "":
		goleak.VerifyTestMain(m)
	case "live": // says its pid, lives until its stdin ends
		fmt.Println(os.Getpid())
		_, _ = io.Copy(io.Discard, os.Stdin)
	case "orphan": // leaves a child behind that lives until the same stdin ends
		child := helperCommand("live")
		child.Stdin, child.Stdout, child.Stderr = os.Stdin, os.Stdout, os.Stderr
		if err := child.Start(); err != nil {
			die(err)
		}
	case "descriptors":
		offerDescriptors()
	case "reuse":
		if err := checkReusedPid(); err != nil {
			die(err)
		}
		fmt.Println("ok")
	}
}

func die(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func helperCommand(mode string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	// The race detector would otherwise keep a process that ends for another second.
	cmd.Env = append(os.Environ(), helperEnv+"="+mode, "GORACE=atexit_sleep_ms=0")
	return cmd
}

// helper is a running helper process: lines it says, and the stdin it lives on.
type helper struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Reader
}

func (h *helper) pid() int { return h.cmd.Process.Pid }

// line reads one line of the helper's output.
func (h *helper) line() (string, error) {
	s, err := h.out.ReadString('\n')
	return strings.TrimSpace(s), err
}

// end closes stdin, which ends the helper, and waits for it.
func (h *helper) end() {
	_ = h.stdin.Close()
	_ = h.cmd.Wait()
}

func startHelper(mode string) (*helper, error) {
	cmd := helperCommand(mode)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &helper{cmd: cmd, stdin: stdin, out: bufio.NewReader(stdout)}, nil
}

// start runs a helper until the end of the test and returns it after its first line.
func start(t *testing.T, mode string) (*helper, string) {
	t.Helper()
	h, err := startHelper(mode)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.end)
	line, err := h.line()
	if err != nil {
		t.Fatalf("helper %s said nothing: %v", mode, err)
	}
	return h, line
}

// countFDs fails the test when it ends with more descriptors than it began with.
func countFDs(t *testing.T) {
	t.Helper()
	before := openFDs(t)
	t.Cleanup(func() {
		if after := openFDs(t); len(after) > len(before) {
			t.Errorf("descriptors leaked: %d before, %d after: %v", len(before), len(after), after)
		}
	})
}

func openFDs(t *testing.T) (open []string) {
	t.Helper()
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range dir {
		to, err := os.Readlink("/proc/self/fd/" + e.Name())
		// The poller's own descriptors come with its first use and stay.
		if err != nil || to == "anon_inode:[eventpoll]" || to == "anon_inode:[eventfd]" {
			continue
		}
		open = append(open, e.Name()+"="+to)
	}
	return open
}

func open(t *testing.T, pid int) *Process {
	t.Helper()
	p, err := Open(pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// kill ends a process, which is then dead and, if it is a child, not waited for yet.
func kill(t *testing.T, p *Process) {
	t.Helper()
	if err := p.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
}
