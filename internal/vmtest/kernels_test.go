package vmtest

import (
	"slices"
	"strings"
	"testing"
)

func TestPick(t *testing.T) {
	const dbg = "linux-image-7.3.4+deb13-cloud-amd64-dbg"
	for _, tc := range []struct {
		name, label, names string
		release, packages  string
		bad                bool
	}{
		{name: "newest by number", label: "6.1", names: "linux-image-6.1.0-9-cloud-amd64 linux-image-6.1.0-56-cloud-amd64 linux-image-6.12.5+deb12-cloud-amd64-unsigned",
			release: "6.1.0-56-cloud-amd64", packages: "linux-image-6.1.0-56-cloud-amd64"},
		{name: "signed before unsigned", label: "6.1", names: "linux-image-6.1.0-56-cloud-amd64-unsigned linux-image-6.1.0-56-cloud-amd64",
			release: "6.1.0-56-cloud-amd64", packages: "linux-image-6.1.0-56-cloud-amd64"},
		{name: "only unsigned", label: "6.12", names: "linux-image-6.12.117+deb12-cloud-amd64-unsigned linux-image-6.12.99+deb12-cloud-amd64-unsigned",
			release: "6.12.117+deb12-cloud-amd64", packages: "linux-image-6.12.117+deb12-cloud-amd64-unsigned"},
		{name: "split", label: "7", names: "linux-image-7.2.12+deb13-cloud-amd64 linux-binary-7.2.12+deb13-cloud-amd64 linux-binary-unsigned-7.2.12+deb13-cloud-amd64 linux-modules-7.2.12+deb13-cloud-amd64",
			release: "7.2.12+deb13-cloud-amd64", packages: "linux-binary-7.2.12+deb13-cloud-amd64 linux-modules-7.2.12+deb13-cloud-amd64"},
		{name: "split, not signed yet", label: "7", names: dbg + " linux-binary-unsigned-7.3.4+deb13-cloud-amd64 linux-modules-7.3.4+deb13-cloud-amd64 linux-binary-7.2.12+deb13-cloud-amd64 linux-modules-7.2.12+deb13-cloud-amd64",
			release: "7.3.4+deb13-cloud-amd64", packages: "linux-binary-unsigned-7.3.4+deb13-cloud-amd64 linux-modules-7.3.4+deb13-cloud-amd64"},
		{name: "split, modules not there yet", label: "7", names: "linux-binary-7.4.1+deb13-cloud-amd64 linux-image-7.4.1+deb13-cloud-amd64 linux-binary-7.2.12+deb13-cloud-amd64 linux-modules-7.2.12+deb13-cloud-amd64",
			release: "7.2.12+deb13-cloud-amd64", packages: "linux-binary-7.2.12+deb13-cloud-amd64 linux-modules-7.2.12+deb13-cloud-amd64"},
		{name: "6.1 is not 6.12", label: "6.1", names: "linux-image-6.12.117+deb12-cloud-amd64-unsigned", bad: true},
		{name: "other machines' kernels", label: "7", names: "linux-image-7.2.12+deb13-amd64 linux-image-7.2.12+deb13-rt-amd64 " + dbg, bad: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			names := strings.Fields(tc.names)
			for range 2 { // apt gives no order
				release, packages, err := pick(tc.label, names)
				if (err != nil) != tc.bad || release != tc.release || strings.Join(packages, " ") != tc.packages {
					t.Errorf("pick(%q, %v) = %q, %q, %v", tc.label, names, release, packages, err)
				}
				slices.Reverse(names)
			}
		})
	}
}

func TestCompareVersions(t *testing.T) {
	ordered := []string{"6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64", "6.12.5+deb12-cloud-amd64", "6.12.117+deb12-cloud-amd64", "7.2.12+deb13-cloud-amd64"}
	for i, a := range ordered {
		for j, b := range ordered {
			got := compareVersions(a, b)
			if (got < 0) != (i < j) || (got > 0) != (i > j) {
				t.Errorf("compareVersions(%q, %q) = %d", a, b, got)
			}
		}
	}
}

func TestDebianMirrors(t *testing.T) {
	for _, tc := range []struct {
		name, list, deb822 string
		archive, security  string
	}{
		{name: "one-line", list: "# deb http://a.example/debian old main\n" +
			"deb [arch=amd64 signed-by=/k.gpg] http://other.example/repo bookworm main\n" +
			"deb http://m.example/debian/ bookworm main contrib # mine\n" +
			"deb-src http://src.example/debian bookworm main\n" +
			"deb http://s.example/debian-security bookworm-security main\n",
			archive: "http://m.example/debian", security: "http://s.example/debian-security"},
		{name: "deb822", deb822: "Types: deb\n# a word\nURIs: http://m.example/d\nSuites: bookworm\n bookworm-updates\nComponents: main\n\n" +
			"Types: deb deb-src\nURIs: http://s.example/sec/\nSuites: bookworm-security\n",
			archive: "http://m.example/d", security: "http://s.example/sec"},
		{name: "disabled and source-only", deb822: "Types: deb\nEnabled: no\nURIs: http://off.example/debian\nSuites: bookworm-updates\n\n" +
			"Types: deb-src\nURIs: http://src.example/debian\nSuites: bookworm-updates\n\nTypes: deb\nURIs: http://m.example/debian\nSuites: bookworm\n",
			archive: "http://m.example/debian"},
		{name: "the one with updates is Debian's", list: "deb http://vendor.example/debian bookworm main\ndeb http://m.example/os bookworm main\ndeb http://m.example/os bookworm-updates main\n",
			archive: "http://m.example/os"},
		{name: "none", list: "deb http://vendor.example/apt any main\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			archive, security := debianMirrors(append(parseOneLine(tc.list), parseDeb822(tc.deb822)...))
			if archive != tc.archive || security != tc.security {
				t.Errorf("got %q, %q; want %q, %q", archive, security, tc.archive, tc.security)
			}
		})
	}
}
