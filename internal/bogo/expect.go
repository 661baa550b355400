package bogo

import (
	"bufio"
	_ "embed"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
)

// Reason is why a test of the runner is not passed.
type Reason string

// The reasons, all of them. docs/conformance.md has the long form of each.
const (
	// Passed is the reason of a test that is passed.
	Passed Reason = "pass"

	// Ours, on purpose.
	NotAEAD       Reason = "not-aead"      // a suite without AEAD or without ECDHE is not offered
	Resumption12  Reason = "resumption12"  // sessions of TLS 1.2 are not resumed
	Renegotiation Reason = "renegotiation" // renegotiation is refused with a warning, and the session lives
	AlertLevel    Reason = "alert-level"   // in TLS 1.3 the level of an alert means nothing, so a warning ends the session
	MovedTickets  Reason = "moved-tickets" // a session that moved stores no tickets
	KernelEmpty   Reason = "kernel-empty"  // the kernel skips empty records itself, without a limit
	KernelWrites  Reason = "kernel-writes" // the kernel seals when it sends

	// The handshake's, which is crypto/tls's.
	NoFeature Reason = "no-feature" // what the test is about is not in crypto/tls, or has no public API
	Handshake Reason = "handshake"  // crypto/tls decides otherwise, before there is a session
)

// Reasons lists them all, with a sentence for each.
var Reasons = map[Reason]string{
	Passed:        "passed",
	NotAEAD:       "the suite is not offered: it has no AEAD, or no ECDHE",
	Resumption12:  "sessions of TLS 1.2 are not resumed, because crypto/tls does not reveal their keys",
	Renegotiation: "renegotiation is refused with a warning and the session lives on; the test wants it to happen, or to end the session",
	AlertLevel:    "TLS 1.3 says that an error alert is one whatever its level (RFC 8446 section 6): the session ends without an answer; the test wants one",
	MovedTickets:  "tickets are stored by the process of the handshake only",
	KernelEmpty:   "the kernel skips empty records itself and does not count them",
	KernelWrites:  "the kernel seals when it sends, so nothing sealed can be left unsent; the test wants such a record in front of the answer to a KeyUpdate",
	NoFeature:     "crypto/tls does not have it, or no public API for it",
	Handshake:     "crypto/tls decides otherwise before there is a session",
}

// Expectation is what is expected of one test in each layer.
type Expectation struct {
	Family   string // "01" to "19", see docs/conformance.md
	Role     string // the shim's: "client" or "server"
	Test     string
	Software Reason
	Kernel   Reason
}

// in is the expectation of a layer, by its name.
func (e *Expectation) in(layer string) Reason {
	if layer == "kernel" {
		return e.Kernel
	}
	return e.Software
}

//go:embed expectations.txt
var expectationsFile string

//go:embed config.json
var configFile []byte

// mirrorPrefix begins the names of tests for clients that a modified runner runs
// with the shim as the server.
const mirrorPrefix = "MirrorServer-"

// Expectations reads the list that is part of this package.
func Expectations() ([]Expectation, error) {
	return readExpectations(strings.NewReader(expectationsFile))
}

// readExpectations reads lines of: family, role, test, software, and kernel where
// it differs. # begins a comment.
func readExpectations(r io.Reader) ([]Expectation, error) {
	var list []Expectation
	names := map[string]bool{}
	in := bufio.NewScanner(r)
	for n := 1; in.Scan(); n++ {
		line, _, _ := strings.Cut(in.Text(), "#")
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if len(f) == 4 {
			f = append(f, f[3])
		}
		if len(f) != 5 {
			return nil, fmt.Errorf("expectations, line %d: %d words; family, role, test, software and kernel are expected", n, len(f))
		}
		e := Expectation{f[0], f[1], f[2], Reason(f[3]), Reason(f[4])}
		switch {
		case e.Role != "client" && e.Role != "server":
			return nil, fmt.Errorf("expectations, line %d: role %q", n, e.Role)
		case Reasons[e.Software] == "" || Reasons[e.Kernel] == "":
			return nil, fmt.Errorf("expectations, line %d: unknown reason in %q", n, line)
		case names[e.Test]:
			return nil, fmt.Errorf("expectations, line %d: %s is there twice", n, e.Test)
		}
		names[e.Test] = true
		list = append(list, e)
	}
	return list, in.Err()
}

// Outcome is what the runner said of one test.
type Outcome struct {
	Test   string
	Actual string // PASS, FAIL or SKIP (a flag that the shim does not know)
	Error  string
}

// Verdict compares outcomes with expectations.
type Verdict struct {
	Rows       []Row     // by family and role
	Unexpected []string  // one line each; empty when all is well
	Unlisted   []Outcome // of tests that the list does not have
	NotRun     []string  // of the list, but unknown to this runner
}

// Row is one line of the table.
type Row struct {
	Family, Role         string
	Passed               int
	Listed               map[Reason]int
	Unexpected, Unlisted int
}

// judge is the verdict on a run in a layer. moves says that the sessions moved.
func judge(list []Expectation, outcomes []Outcome, layer string, moves bool) *Verdict {
	v := &Verdict{}
	byTest := map[string]*Expectation{}
	for i := range list {
		byTest[list[i].Test] = &list[i]
	}
	rows := map[string]*Row{}
	ran := map[string]bool{}
	for _, o := range outcomes {
		ran[o.Test] = true
		e, role := byTest[o.Test], ""
		if base, ok := strings.CutPrefix(o.Test, mirrorPrefix); ok && e == nil {
			e, role = byTest[base], "mirrored"
		}
		if e == nil {
			v.Unlisted = append(v.Unlisted, o)
			continue
		}
		if role == "" {
			role = e.Role
		}
		key := e.Family + " " + role
		row := rows[key]
		if row == nil {
			row = &Row{Family: e.Family, Role: role, Listed: map[Reason]int{}}
			rows[key] = row
		}
		want := e.in(layer)
		if moves && want == Passed && o.Actual != "PASS" && movesCost[o.Test] {
			want = MovedTickets
		}
		switch {
		case o.Actual == "PASS" && want == Passed:
			row.Passed++
		case o.Actual != "PASS" && want != Passed:
			row.Listed[want]++
		case o.Actual == "PASS":
			row.Unexpected++
			v.Unexpected = append(v.Unexpected, fmt.Sprintf("%s: passed, though listed as %s", o.Test, want))
		default:
			row.Unexpected++
			v.Unexpected = append(v.Unexpected, fmt.Sprintf("%s: %s\n%s", o.Test, o.Actual, indent(o.Error)))
		}
	}
	for _, e := range list {
		if !ran[e.Test] {
			v.NotRun = append(v.NotRun, e.Test)
		}
	}
	for _, row := range rows {
		v.Rows = append(v.Rows, *row)
	}
	slices.SortFunc(v.Rows, func(a, b Row) int { return strings.Compare(a.Family+a.Role, b.Family+b.Role) })
	slices.Sort(v.Unexpected)
	return v
}

// movesCost are the tests that resume a TLS 1.3 session in the client role.
var movesCost = map[string]bool{
	"ExportKeyingMaterial-TLS-TLS13":         true,
	"TLS13-HonorServerSessionTicketLifetime": true,
	"TLS13-TestBadTicketAge-Client":          true,
	"TLS13-TestValidTicketAge-Client":        true,
}

func indent(s string) string {
	return "    " + strings.ReplaceAll(strings.TrimSpace(s), "\n", "\n    ")
}

// Table writes the counts.
func (v *Verdict) Table(w io.Writer) {
	var pass, listed, unexpected int
	fmt.Fprintf(w, "%-6s %-8s %6s %6s %10s  %s\n", "family", "role", "passed", "listed", "unexpected", "why")
	for _, r := range v.Rows {
		n := 0
		var why []string
		for _, reason := range slices.Sorted(maps.Keys(r.Listed)) {
			n += r.Listed[reason]
			why = append(why, fmt.Sprintf("%s %d", reason, r.Listed[reason]))
		}
		fmt.Fprintf(w, "%-6s %-8s %6d %6d %10d  %s\n", r.Family, r.Role, r.Passed, n, r.Unexpected, strings.Join(why, ", "))
		pass, listed, unexpected = pass+r.Passed, listed+n, unexpected+r.Unexpected
	}
	fmt.Fprintf(w, "%-6s %-8s %6d %6d %10d\n", "all", "", pass, listed, unexpected)
}
