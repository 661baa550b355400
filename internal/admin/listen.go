package admin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// EnvPath names the admin socket for all commands when --admin is not given.
const EnvPath = "KTLSVISOR_ADMIN"

// maxPath is what a Unix socket address holds (sun_path, less its final zero).
const maxPath = 107

// Path returns the path of the admin socket: flag, else $KTLSVISOR_ADMIN, else
// $XDG_RUNTIME_DIR/ktlsvisor.sock, else /run/ktlsvisor.sock.
func Path(flag string) string {
	if flag != "" {
		return flag
	}
	if p := os.Getenv(EnvPath); p != "" {
		return p
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "ktlsvisor.sock")
	}
	return "/run/ktlsvisor.sock"
}

// Listen makes the admin socket, whose file has mode 0600 from its first moment.
// The file of a ktlsvisor that is gone is replaced; one that is answered gives an
// error that is ErrInUse. Closing the listener leaves the file: the keeper holds a
// duplicate, and the next supervisor serves on it. RemoveStale tidies up.
func Listen(path string) (*net.UnixListener, error) {
	l, err := listen(path)
	if errors.Is(err, ErrInUse) {
		// Asked without the directory's lock, for an answer may take its time.
		return nil, fmt.Errorf("another ktlsvisor serves on %s%s; use --admin with another path: %w", path, pidText(path), err)
	}
	return l, err
}

func listen(path string) (*net.UnixListener, error) {
	if len(path) > maxPath {
		return nil, fmt.Errorf("admin socket: %s is longer than %d bytes, which a Unix socket's path may not be; use --admin with a shorter one", path, maxPath)
	}
	unlock, err := lockDir(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("admin socket %s: %w", path, err)
	}
	defer unlock()

	if err := removeStale(path); err != nil {
		return nil, err
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var cerr error
		if err := c.Control(func(fd uintptr) { cerr = sys.ChmodSocket(int(fd), 0o600) }); err != nil {
			return err
		}
		return cerr
	}}
	l, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("admin socket: %w; choose another path with --admin", err)
	}
	ul := l.(*net.UnixListener)
	ul.SetUnlinkOnClose(false)
	return ul, nil
}

// RemoveStale removes the socket's file if nothing listens on it any more;
// otherwise it returns an ErrInUse.
func RemoveStale(path string) error {
	unlock, err := lockDir(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("admin socket %s: %w", path, err)
	}
	defer unlock()
	return removeStale(path)
}

// removeStale needs the directory's lock: two that start at once would otherwise
// both see a stale file, and the second would remove the first one's new socket.
func removeStale(path string) error {
	fi, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("admin socket: %w", err)
	case fi.Mode().Type() != os.ModeSocket:
		return fmt.Errorf("admin socket: %s exists and is not a socket; remove it or use --admin with another path", path)
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		_ = c.Close()
	}
	switch {
	case err == nil, errors.Is(err, syscall.EAGAIN):
		return ErrInUse
	case errors.Is(err, syscall.ECONNREFUSED):
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("admin socket: replace a stale one: %w", err)
		}
		return nil
	case errors.Is(err, os.ErrNotExist):
		return nil
	}
	return fmt.Errorf("admin socket %s: %w; use --admin with another path", path, err)
}

// pidText names the supervisor that serves on path, if it says so in time.
func pidText(path string) string {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	st, err := Dial(path).Status(ctx)
	if err != nil || st.Supervisor.PID == 0 {
		return ""
	}
	return fmt.Sprintf(" (pid %d)", st.Supervisor.PID)
}

// lockDir locks a directory against other ktlsvisors that make or remove a socket
// in it. Ours is held for moments; others may lock the directory for ends of
// their own, so the wait is bounded.
func lockDir(dir string) (unlock func(), err error) {
	deadline := time.Now().Add(5 * time.Second)
	for {
		f, err := sys.TryLockDir(dir)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, sys.ErrLocked) || time.Now().After(deadline) {
			return nil, err
		}
		time.Sleep(10 * time.Millisecond)
	}
}
