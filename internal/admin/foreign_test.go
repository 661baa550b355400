package admin

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/testlog"
)

// foreignEnv makes the test binary a client of another uid; see TestMain.
const foreignEnv = "KTLSVISOR_TEST_FOREIGN_CLIENT"

func foreignMain(path string) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_, err := Dial(path).Status(ctx)
	fmt.Printf("forbidden=%v error=%v\n", errors.Is(err, ErrForbidden), err)
}

const foreignUID = 65534

func runForeign(t *testing.T, path string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("starting a process of another uid needs root")
	}
	// The test binary lies in a directory that others may not enter; an open
	// descriptor of it can be executed all the same.
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	cmd := exec.Command("/proc/self/fd/3")
	cmd.Args[0] = os.Args[0]
	cmd.ExtraFiles = []*os.File{self}
	cmd.Dir = "/"
	cmd.Env = []string{foreignEnv + "=" + path}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: foreignUID, Gid: foreignUID}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

func openDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "ktlsvisor-admin")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// The file's mode keeps other users out.
func TestForeignUIDCannotConnect(t *testing.T) {
	path := filepath.Join(openDir(t), "a.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, l, &fakeBackend{}, &testlog.Buffer{})
	out := runForeign(t, path)
	if !strings.Contains(out, "forbidden=true") || !strings.Contains(out, "belongs to another user") {
		t.Errorf("the foreign client says: %s", out)
	}
}

// Where the mode does not (someone changed it), the peer's uid does.
func TestForeignUIDIsRefused(t *testing.T) {
	path := filepath.Join(openDir(t), "a.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	log := &testlog.Buffer{}
	asked := false
	serveOn(t, l, &fakeBackend{status: func() (*Status, error) { asked = true; return &Status{}, nil }}, log)
	out := runForeign(t, path)
	if !strings.Contains(out, "forbidden=true") || !strings.Contains(out, "uid 65534 may not use this admin socket") {
		t.Errorf("the foreign client says: %s", out)
	}
	if asked {
		t.Error("the backend was asked for a stranger")
	}
	if n := strings.Count(log.String(), "another user's process: uid=65534"); n != 1 {
		t.Errorf("%d log lines about it:\n%s", n, log)
	}
}
