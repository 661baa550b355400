// Package guest is for tests that depend on the kernel they run on. On a
// developer's machine they may skip; in a guest started by `make vmtest` a skip
// is a failure, unless it says in the one accepted form that the kernel is too
// old, which the runner checks against the version that booted.
package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// InGuest reports whether this process runs in a guest of `make vmtest`.
func InGuest() bool { return os.Getenv("KTLSVISOR_GUEST") == "1" }

// NeedKernelTLS skips t on a machine whose kernel has no TLS. In a guest it fails
// instead: that is where kernel TLS is tested, so its absence there is an error
// of the guest.
func NeedKernelTLS(t testing.TB) {
	t.Helper()
	err := kernelTLS()
	switch {
	case err == nil:
	case InGuest():
		t.Fatalf("this guest has no kernel TLS (is tls.ko in it?): %v", err)
	default:
		t.Skipf("no kernel TLS on this machine (%v); try `modprobe tls`, or run this test in a guest with `make vmtest`", err)
	}
}

// NeedKernel skips t on a kernel older than major.minor, which is where feature
// came. The text of the skip is what the runner in internal/vmtest accepts.
func NeedKernel(t testing.TB, major, minor int, feature string) {
	t.Helper()
	release := sys.KernelRelease()
	gotMajor, gotMinor, err := ParseRelease(release)
	if err != nil {
		t.Fatal(err)
	}
	if gotMajor < major || gotMajor == major && gotMinor < minor {
		t.Skipf("kernel lacks %s (needs >= %d.%d)", feature, major, minor)
	}
}

// ParseRelease returns the first two numbers of a kernel release such as
// "6.12.57+deb12-cloud-amd64".
func ParseRelease(release string) (major, minor int, err error) {
	first, rest, ok := strings.Cut(release, ".")
	if !ok {
		return 0, 0, fmt.Errorf("kernel release %q has no minor number", release)
	}
	second := rest
	if i := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		second = rest[:i]
	}
	major, err = strconv.Atoi(first)
	if err != nil {
		return 0, 0, fmt.Errorf("kernel release %q: %w", release, err)
	}
	minor, err = strconv.Atoi(second)
	if err != nil {
		return 0, 0, fmt.Errorf("kernel release %q: %w", release, err)
	}
	return major, minor, nil
}

// kernelTLS attaches the TLS protocol to a connection over loopback, which is the
// only sure sign that the kernel has it (ENOENT: not built, or not loaded).
func kernelTLS() (err error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // an MPTCP socket refuses TLS: EOPNOTSUPP
	ln, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ln.Close()) }()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	rc, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err
	}
	var attachErr error
	if err := rc.Control(func(fd uintptr) {
		attachErr = syscall.SetsockoptString(int(fd), syscall.IPPROTO_TCP, 31 /* TCP_ULP */, "tls")
	}); err != nil {
		return err
	}
	if attachErr != nil {
		return fmt.Errorf("TCP_ULP: %w", attachErr)
	}
	return nil
}
