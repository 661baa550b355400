package vmtest

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Kernel is a kernel that can be booted.
type Kernel struct {
	Label   string `json:"label"`   // "6.1": what the user asks for
	Release string `json:"release"` // "6.1.0-56-cloud-amd64"
	Image   string `json:"image"`   // the bootable file
	Modules string `json:"modules"` // the folder with modules.dep
}

// release is a Debian release's suites that hold a line of kernels.
type release struct {
	name     string
	archive  []string // suites of the main archive
	security []string // suites of the security archive
	newer    bool     // the machine's keyring may be too old for it
}

// The kernels come from two places: 6.1 and 6.12 are those of Debian 12, newer
// ones reach the next release's backports first.
var (
	stable    = release{name: "bookworm", archive: []string{"bookworm"}, security: []string{"bookworm-security"}}
	backports = release{name: "trixie-backports", archive: []string{"trixie-backports"}, newer: true}
)

// DefaultKernels are the lines that are tested unless the user says otherwise:
// the oldest supported, the long-term one, and the newest, which can change keys.
var DefaultKernels = []string{"6.1", "6.12", "7"}

// releaseOf tells where to look for a line of kernels, "6.12" or "7".
func releaseOf(label string) release {
	if label == "6.1" || label == "6.12" {
		return stable
	}
	return backports
}

// labelPattern is what a line of kernels may be called.
var labelPattern = regexp.MustCompile(`^[0-9]+(\.[0-9]+)?$`)

// pick chooses, among package names, the newest kernel of a line that is complete:
// its release, and the packages to unpack. Up to 7.1 one package
// (linux-image-RELEASE, or the unsigned one where only that is built) has image
// and modules; later they are split into linux-binary and linux-modules.
func pick(label string, names []string) (rel string, packages []string, err error) {
	kernel := regexp.MustCompile(`^(linux-(?:image|binary-unsigned|binary)-)(` + regexp.QuoteMeta(label) + `\.[0-9][0-9A-Za-z.+~-]*-cloud-amd64)(-unsigned)?$`)
	known := map[string]bool{}
	for _, n := range names {
		known[n] = true
	}
	found := map[string][]string{}
	for _, n := range names {
		m := kernel.FindStringSubmatch(n)
		if m == nil {
			continue
		}
		prefix, rel := m[1], m[2]
		modules := "linux-modules-" + rel
		switch {
		case prefix == "linux-image-" && known["linux-binary-"+rel]:
			// Split: this one has nothing in it.
		case m[3] != "" && known[strings.TrimSuffix(n, m[3])]:
			// The signed one is what people boot.
		case prefix == "linux-image-":
			found[rel] = []string{n}
		case !known[modules]:
		case prefix == "linux-binary-unsigned-" && known["linux-binary-"+rel]:
			// The signed one is what people boot.
		default:
			found[rel] = []string{n, modules}
		}
	}
	for r := range found {
		if rel == "" || compareVersions(r, rel) > 0 {
			rel = r
		}
	}
	if rel == "" {
		return "", nil, fmt.Errorf("no package of a kernel %s for cloud machines", label)
	}
	return rel, found[rel], nil
}

// compareVersions orders kernel releases: numbers by value, the rest as text.
func compareVersions(a, b string) int {
	return slices.CompareFunc(chunks(a), chunks(b), func(x, y string) int {
		if isNumber(x) && isNumber(y) {
			x, y = strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")
			if c := cmp.Compare(len(x), len(y)); c != 0 {
				return c
			}
		}
		return cmp.Compare(x, y)
	})
}

func isNumber(s string) bool { return s != "" && s[0] >= '0' && s[0] <= '9' }

var chunkPattern = regexp.MustCompile(`[0-9]+|[^0-9]+`)

func chunks(s string) []string { return chunkPattern.FindAllString(s, -1) }
