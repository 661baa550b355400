package guest

import (
	"os"
	"testing"
)

func TestParseRelease(t *testing.T) {
	for _, tc := range []struct {
		release      string
		major, minor int
		bad          bool
	}{
		{release: "6.1.0-56-cloud-amd64", major: 6, minor: 1},
		{release: "6.12.117+deb12-cloud-amd64", major: 6, minor: 12},
		{release: "7.3-rc1", major: 7, minor: 3},
		{release: "7.3", major: 7, minor: 3},
		{release: "unknown", bad: true},
		{release: "x.1", bad: true},
		{release: "6.x", bad: true},
	} {
		major, minor, err := ParseRelease(tc.release)
		if (err != nil) != tc.bad || major != tc.major || minor != tc.minor {
			t.Errorf("ParseRelease(%q) = %d, %d, %v", tc.release, major, minor, err)
		}
	}
}

func TestUnprivileged(t *testing.T) {
	if !Unprivileged(t) {
		return
	}
	if os.Geteuid() == 0 {
		t.Error("still root")
	}
	// What the user may not do is the point; /root or init's memory will do.
	if f, err := os.Open("/proc/1/mem"); err == nil {
		_ = f.Close()
		t.Error("an unprivileged process could open the memory of process 1")
	}
}

func TestUnprivilegedSubtest(t *testing.T) {
	t.Run("with a (name)", func(t *testing.T) {
		if Unprivileged(t) && os.Geteuid() == 0 {
			t.Error("still root")
		}
	})
}
