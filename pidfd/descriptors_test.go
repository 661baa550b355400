package pidfd

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// offerDescriptors is the helper whose descriptors are taken: the read end of a pipe
// with "from a pipe" in it, and one end of a socketpair of which it holds both.
func offerDescriptors() {
	r, w, err := os.Pipe()
	if err != nil {
		die(err)
	}
	if _, err := w.WriteString("from a pipe"); err != nil {
		die(err)
	}
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		die(err)
	}
	if _, err := syscall.Write(pair[0], []byte("from a socket")); err != nil {
		die(err)
	}
	fmt.Println(r.Fd(), pair[1])
	_, _ = io.Copy(io.Discard, os.Stdin)
}

func TestGetFD(t *testing.T) {
	countFDs(t)
	h, line := start(t, "descriptors")
	p := open(t, h.pid())
	var pipe, socket int
	if _, err := fmt.Sscan(line, &pipe, &socket); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		fd   int
		want string
	}{{pipe, "from a pipe"}, {socket, "from a socket"}} {
		fd, err := p.GetFD(tt.fd)
		if err != nil {
			t.Fatal(err)
		}
		if flags, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd)); err != nil || !cloexec(flags) {
			t.Errorf("descriptor for %q is not close-on-exec: %v\n%s", tt.want, err, flags)
		}
		buf := make([]byte, 64)
		n, err := syscall.Read(fd, buf)
		if err != nil || string(buf[:n]) != tt.want {
			t.Errorf("read %q, %v; want %q", buf[:n], err, tt.want)
		}
		if err := sys.Close(fd); err != nil {
			t.Error(err)
		}
	}
	fd, err := p.GetFD(9999)
	if !errors.Is(err, syscall.EBADF) || fd != -1 {
		t.Errorf("a descriptor that is not there: %d, %v", fd, err)
	}
	if want := fmt.Sprintf("take descriptor 9999 of process %d: it has no such descriptor", h.pid()); err != nil && !strings.HasPrefix(err.Error(), want) {
		t.Errorf("got %q, want %q", err, want)
	}
	kill(t, p)
	if fd, err := p.GetFD(pipe); !errors.Is(err, ErrDead) || fd != -1 {
		t.Errorf("a descriptor of a zombie: %d, %v", fd, err)
	}
}

// cloexec looks for O_CLOEXEC in the octal "flags:" line of fdinfo.
func cloexec(fdinfo []byte) bool {
	for line := range strings.Lines(string(fdinfo)) {
		var flags int
		if _, err := fmt.Sscanf(line, "flags: %o", &flags); err == nil {
			return flags&syscall.O_CLOEXEC != 0
		}
	}
	return false
}

func TestGetFDWithoutRights(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to look at another user's process without rights over it")
	}
	// This process gives up its own rights for the calls: it becomes the one that asks.
	h, _ := start(t, "live")
	p := open(t, h.pid())
	err := asNobody(t, func() error {
		_, err := p.GetFD(0)
		return err
	})
	if !errors.Is(err, syscall.EPERM) || !strings.Contains(err.Error(), "ptrace rights") {
		t.Errorf("GetFD of a process of root: %v", err)
	}
	err = asNobody(t, func() error { return p.Signal(syscall.SIGTERM) })
	if !errors.Is(err, syscall.EPERM) || !strings.Contains(err.Error(), "another user") {
		t.Errorf("Signal to a process of root: %v", err)
	}
	if dead, err := p.Dead(); dead || err != nil {
		t.Errorf("the process: dead %v, %v", dead, err)
	}
}

// asNobody runs fn with the effective and real user id 65534 and back.
func asNobody(t *testing.T, fn func() error) error {
	t.Helper()
	if err := syscall.Setresuid(65534, 65534, 0); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := syscall.Setresuid(0, 0, 0); err != nil {
			t.Fatal(err)
		}
	}()
	return fn()
}

func TestFromFD(t *testing.T) {
	countFDs(t)
	h, _ := start(t, "live")
	p := open(t, h.pid())
	fd, err := p.FD()
	if err != nil {
		t.Fatal(err)
	}
	q, err := FromFD(fd)
	if err != nil {
		t.Fatal(err)
	}
	if pid, err := q.PID(); err != nil || pid != h.pid() {
		t.Errorf("PID through the duplicate: %d, %v", pid, err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	kill(t, q) // the duplicate does not depend on the first
	h.end()
	// Dead and waited for, and still a pidfd that can be handed on.
	fd, err = q.FD()
	if err != nil {
		t.Fatal(err)
	}
	last, err := FromFD(fd)
	if err != nil {
		t.Fatal(err)
	}
	if err := last.Wait(t.Context()); err != nil {
		t.Error(err)
	}
	for _, c := range []io.Closer{q, last} {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}

	// Anything else is refused, and closed.
	file, err := syscall.Open("/dev/null", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := FromFD(file); err == nil || !strings.Contains(err.Error(), "not a pidfd") {
		t.Errorf("FromFD of /dev/null: %v", err)
	}
	if _, err := FromFD(-1); !errors.Is(err, syscall.EBADF) {
		t.Errorf("FromFD(-1): %v", err)
	}
	if _, err := FromFD(9999); err == nil {
		t.Error("FromFD of a number that is not open")
	}
}

// The pidfd that os/exec gives shares its open file description with os.Process, whose
// Wait would leave a zombie behind if that became non-blocking.
func TestFromFDLeavesTheOwnersFlagsAlone(t *testing.T) {
	for _, closeFirst := range []bool{false, true} {
		fd := -1
		cmd := helperCommand("live")
		cmd.Stderr = os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{PidFD: &fd}
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if fd < 0 {
			_ = stdin.Close()
			_ = cmd.Wait()
			t.Skip("this kernel gives no pidfd with a new process")
		}
		p, err := FromFD(fd)
		if err != nil {
			t.Fatal(err)
		}
		waited := make(chan error, 1)
		go func() { waited <- cmd.Wait() }()
		done := p.Done()
		select {
		case <-done:
			t.Error("a live process counts as dead")
		default:
		}
		if closeFirst {
			if err := p.Close(); err != nil {
				t.Error(err)
			}
		}
		if err := stdin.Close(); err != nil {
			t.Error(err)
		}
		if err := <-waited; err != nil {
			t.Errorf("closed first: %v: Wait of the owner: %v", closeFirst, err)
		}
		if !closeFirst {
			<-done
		}
		var ws syscall.WaitStatus
		if _, err := syscall.Wait4(cmd.Process.Pid, &ws, syscall.WNOHANG, nil); !errors.Is(err, syscall.ECHILD) {
			t.Errorf("closed first: %v: the child was not waited for: %v", closeFirst, err)
		}
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}
}

// A pidfd from a process that made it without PIDFD_NONBLOCK is waited for in the
// poller like one of ours, stays as it is, and leaves nothing open.
func TestFromFDMadeBlocking(t *testing.T) {
	h, _ := start(t, "live")
	p := open(t, h.pid())
	fd, err := p.FD()
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.SetNonblock(fd, false); err != nil {
		t.Fatal(err)
	}
	all := func() int {
		dir, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(dir)
	}
	q, err := FromFD(fd)
	if err != nil {
		t.Fatal(err)
	}
	if nonblock, err := sys.IsNonblock(fd); err != nil || nonblock {
		t.Errorf("non-blocking: %v, %v", nonblock, err)
	}
	kill(t, q)
	h.end() // dead and waited for: still good for another one
	before := all()
	again, err := q.FD()
	if err != nil {
		t.Fatal(err)
	}
	last, err := FromFD(again)
	if err != nil {
		t.Fatal(err)
	}
	if err := last.Wait(t.Context()); err != nil {
		t.Error(err)
	}
	for _, c := range []io.Closer{q, last} {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	// q's pidfd and its epoll instance were open before.
	if after := all(); after != before-2 {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}
