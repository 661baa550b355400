package bench

import (
	"os"
	"os/exec"
	"regexp"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// TestKernelLayer measures the kernel layer, and is how `make bench` gets its figures
// out of a guest. Without that it sees that everything can be measured.
func TestKernelLayer(t *testing.T) {
	guest.NeedKernelTLS(t)
	full := os.Getenv(envGuest) != ""
	only, err := regexp.Compile(os.Getenv(envGuestRun))
	if err != nil {
		t.Fatal(err)
	}
	scale := Tiny
	if full {
		scale = Emulated
	}
	for _, c := range KernelCases() {
		if !only.MatchString(c.ID) {
			continue
		}
		r, err := c.Measure(scale)
		if err != nil {
			t.Fatal(err)
		}
		tell(t, Report{Results: []Comparison{r}})
	}
	if !full || only.MatchString("idle-kernel") {
		few, many := 10, 20
		if full {
			few, many = 1000, 10000
		}
		i, err := MeasureIdle(IdleOptions{Program: program(t, "ktlsvisor"), Worker: program(t, "echo"), Layer: "kernel",
			Few: few, Many: many, Dir: shortDir(t), Say: t.Logf, Patience: 4 * time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		tell(t, Report{Idle: []Idle{i}})
	}
}

// TestKernelMoves measures moves of sessions of the kernel layer, likewise.
func TestKernelMoves(t *testing.T) {
	guest.NeedKernelTLS(t)
	full := os.Getenv(envGuest) != ""
	only, err := regexp.Compile(os.Getenv(envGuestRun))
	if err != nil {
		t.Fatal(err)
	}
	// To go from one process to another, and to another processor, takes a
	// good part of a millisecond in an emulated machine: much longer than anything that is measured.
	if err := sys.PatientScheduling(20 * time.Millisecond); err != nil {
		t.Fatal(err)
	}
	t.Setenv("GOMAXPROCS", "1")
	// TCP's probes of sessions that were opened together come together; what does not fit
	// here is lost, and after some of them the session.
	if err := os.WriteFile("/proc/sys/net/core/netdev_max_backlog", []byte("100000"), 0); err != nil {
		t.Fatal(err)
	}
	for _, m := range GuestMoves() {
		if !full {
			m.Sessions, m.Turns = min(m.Sessions, 200), 1
		}
		if full && !only.MatchString(m.ID()) {
			continue
		}
		roomFor(t, m.Sessions)
		m.Dir, m.Say = shortDir(t), t.Logf
		m.Say("%s", m.ID())
		r, err := MeasureMove(m)
		if err != nil {
			t.Fatal(err)
		}
		tell(t, Report{Moves: []Move{r}})
		if !full {
			break
		}
	}
}

// roomFor lets this process and its children have so many descriptors.
func roomFor(t *testing.T, sessions int) {
	t.Helper()
	want := uint64(sessions + 4096)
	if have, err := sys.HardRlimitNofile(); err != nil || have >= want {
		return
	}
	if err := sys.SetRlimitNofile(os.Getpid(), want); err != nil {
		t.Fatal(err)
	}
}

func tell(t *testing.T, r Report) {
	t.Helper()
	line, err := guestLine(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Log(line)
}

func program(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// shortDir is for a Unix socket, whose name has a limit.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kvb")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}
