package guest

import "testing"

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
