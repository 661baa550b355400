package admin

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

func TestPath(t *testing.T) {
	for _, tt := range []struct{ flag, env, xdg, want string }{
		{"/f", "/e", "/x", "/f"},
		{"", "/e", "/x", "/e"},
		{"", "", "/x", "/x/ktlsvisor.sock"},
		{"", "", "", "/run/ktlsvisor.sock"},
	} {
		t.Setenv(EnvPath, tt.env)
		t.Setenv("XDG_RUNTIME_DIR", tt.xdg)
		if got := Path(tt.flag); got != tt.want {
			t.Errorf("Path(%q) with %q and %q = %s, want %s", tt.flag, tt.env, tt.xdg, got, tt.want)
		}
	}
}

func TestListenMode(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, want 0600", fi.Mode().Perm())
	}
}

func TestListenReplacesStale(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close() // leaves the file
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("the file should outlive the listener: %v", err)
	}
	l, err = Listen(path)
	if err != nil {
		t.Fatalf("a stale socket in the way: %v", err)
	}
	_ = l.Close()
}

func TestListenRefuses(t *testing.T) {
	served, _, _ := serve(t, &fakeBackend{})
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		path, says string
		is         error
	}{
		"served":       {served, "another ktlsvisor serves on " + served + " (pid 4711); use --admin", ErrInUse},
		"a file":       {file, "is not a socket", nil},
		"no directory": {"/nonexistent/x.sock", "/nonexistent", os.ErrNotExist},
		"too long":     {"/" + strings.Repeat("x", 120), "longer than 107 bytes", nil},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Listen(tt.path)
			if err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Fatalf("Listen = %v, want %q in it", err, tt.says)
			}
			if tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("%v is not %v", err, tt.is)
			}
		})
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Errorf("the file in the way: %q, %v", b, err)
	}
}

// Of many that start at once over a stale file exactly one wins, and its socket
// stays.
func TestListenRace(t *testing.T) {
	for round := range 20 {
		path := filepath.Join(t.TempDir(), fmt.Sprint(round))
		stale, err := Listen(path)
		if err != nil {
			t.Fatal(err)
		}
		_ = stale.Close()
		var mu sync.Mutex
		var won []*net.UnixListener
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				l, err := listen(path)
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					won = append(won, l)
				} else if !errors.Is(err, ErrInUse) {
					t.Errorf("a loser's error: %v", err)
				}
			})
		}
		wg.Wait()
		if len(won) != 1 {
			t.Fatalf("%d listeners on one path", len(won))
		}
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatalf("the winner's socket: %v", err)
		}
		_ = c.Close()
		_ = won[0].Close()
	}
}
