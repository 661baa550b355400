// Command init is process 1 of a test guest. It prepares the machine, runs the
// test binaries that the host put into the initramfs, reports on the second
// serial port (package spec has the format) and powers off.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/spec"
)

// runnerArg makes this program the second process, which runs the tests. Process 1
// itself does nothing but collect orphans: were it to use os/exec too, the two
// would take each other's children.
const runnerArg = "run-tests"

func main() {
	if os.Getpid() != 1 {
		if len(os.Args) == 2 && os.Args[1] == runnerArg {
			os.Exit(run())
		}
		fmt.Fprintln(os.Stderr, "this is the init of a test guest; start it with: go run ./internal/vmtest/cmd/vmtest")
		os.Exit(2)
	}
	code, err := boot()
	if err != nil {
		fmt.Fprintln(os.Stderr, "init:", err)
	}
	if err := report(code); err != nil {
		fmt.Fprintln(os.Stderr, "init:", err)
	}
	fmt.Fprintln(os.Stderr, "init: power off:", sys.PowerOff())
	// Leaving process 1 is a kernel panic, which ends the guest as well.
}

// boot mounts file systems, starts the runner and collects every process that
// ends, until the runner does.
func boot() (code int, err error) {
	for _, m := range []struct{ fstype, target, options string }{
		{"proc", "/proc", ""},
		{"sysfs", "/sys", ""},
		{"devtmpfs", "/dev", ""},
		{"devpts", "/dev/pts", ""},
		{"tmpfs", "/dev/shm", ""},
		{"tmpfs", "/tmp", "mode=1777"},
		{"tmpfs", "/run", "mode=755"},
		{"cgroup2", "/sys/fs/cgroup", ""},
	} {
		if err := sys.MkdirMount(m.fstype, m.target, m.options); err != nil {
			return 90, err
		}
	}
	// What devtmpfs leaves out and programs expect.
	for name, target := range map[string]string{"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"} {
		if err := os.Symlink(target, filepath.Join("/dev", name)); err != nil {
			return 90, err
		}
	}
	p, err := os.StartProcess("/init", []string{"/init", runnerArg}, &os.ProcAttr{
		Env:   []string{"PATH=/bin", "HOME=/tmp", "TMPDIR=/tmp", "GOTRACEBACK=all", "KTLSVISOR_GUEST=1"},
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
	})
	if err != nil {
		return 91, err
	}
	for {
		pid, code, err := sys.ReapChild()
		if err != nil {
			return 92, fmt.Errorf("wait: %w", err)
		}
		if pid == p.Pid {
			return code, nil
		}
	}
}

// report writes the line without which the host takes the boot for a failure.
func report(code int) error {
	port, err := openPort()
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintf(port, "exit %d\n", code); err != nil {
		return err
	}
	return drain(port)
}

func openPort() (*os.File, error) {
	port, err := os.OpenFile(spec.Port, os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	rc, err := port.SyscallConn()
	if err != nil {
		return nil, err
	}
	var rawErr error
	if err := rc.Control(func(fd uintptr) { rawErr = sys.RawTerminal(int(fd)) }); err != nil {
		return nil, err
	}
	return port, rawErr
}

func drain(port *os.File) error {
	rc, err := port.SyscallConn()
	if err != nil {
		return err
	}
	var drainErr error
	if err := rc.Control(func(fd uintptr) { drainErr = sys.DrainTerminal(int(fd)) }); err != nil {
		return err
	}
	return drainErr
}

// loadModules loads modules in the given order. One that does not load is
// reported and left to the tests that need it.
func loadModules(paths []string, note func(string)) {
	for _, p := range paths {
		if err := loadModule(p); err != nil {
			note(fmt.Sprintf("module %s: %v", filepath.Base(p), err))
		}
	}
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	// The file is on the initramfs: nothing here can block, so Fd does no harm.
	return sys.LoadModule(int(f.Fd()), !strings.HasSuffix(path, ".ko"))
}
