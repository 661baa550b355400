package vmtest

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// Status of one test.
type Status string

// A test that printed that it started and nothing more is unfinished, which is a
// failure: its binary panicked, or ran out of time.
const (
	Pass       Status = "pass"
	Fail       Status = "fail"
	Skip       Status = "skip"
	Unfinished Status = "unfinished"
)

// TestResult is one test or subtest.
type TestResult struct {
	Name    string  `json:"name"`
	Status  Status  `json:"status"`
	Seconds float64 `json:"seconds"`
	Reason  string  `json:"reason,omitempty"` // of a skip
}

// PackageResult is one test binary's run.
type PackageResult struct {
	Package string       `json:"package"`
	Code    int          `json:"code"` // -1 when it did not end
	Seconds float64      `json:"seconds"`
	Tests   []TestResult `json:"tests"`
	Output  []string     `json:"-"`
}

// BootResult is what one guest reported. It is good only if Problems is empty,
// which Finish decides.
type BootResult struct {
	Kernel   string          `json:"kernel"`  // what was asked for
	Release  string          `json:"release"` // what booted
	Packages []PackageResult `json:"packages"`
	Notes    []string        `json:"notes,omitempty"`
	Problems []string        `json:"problems,omitempty"`
	Seconds  float64         `json:"seconds"`

	exited  bool
	code    int
	current *testLog
	program bool // ran no tests, but a Program
}

// Line takes one line from the guest's result port.
func (b *BootResult) Line(line string) {
	line = strings.TrimSuffix(line, "\r")
	if out, ok := strings.CutPrefix(line, "|"); ok {
		if b.current != nil {
			b.current.line(out)
		}
		return
	}
	word, rest, _ := strings.Cut(line, " ")
	switch word {
	case "kernel":
		b.Release = rest
	case "note":
		b.Notes = append(b.Notes, rest)
	case "begin":
		b.end(-1, 0)
		b.current = &testLog{result: PackageResult{Package: rest}}
	case "end":
		f := strings.Fields(rest)
		if len(f) != 3 || b.current == nil || f[0] != b.current.result.Package {
			b.problem("the guest wrote a line that does not fit: %q", line)
			return
		}
		code, err1 := strconv.Atoi(f[1])
		seconds, err2 := strconv.ParseFloat(f[2], 64)
		if err1 != nil || err2 != nil {
			b.problem("the guest wrote a line that does not fit: %q", line)
			return
		}
		b.end(code, seconds)
	case "exit":
		code, err := strconv.Atoi(rest)
		if err != nil || b.exited {
			b.problem("the guest wrote a line that does not fit: %q", line)
			return
		}
		b.exited, b.code = true, code
	case "":
	default:
		b.problem("the guest wrote a line that does not fit: %q", line)
	}
}

func (b *BootResult) end(code int, seconds float64) {
	if b.current == nil {
		return
	}
	r := b.current.finish()
	r.Code, r.Seconds = code, seconds
	b.Packages = append(b.Packages, r)
	b.current = nil
}

func (b *BootResult) problem(format string, args ...any) {
	b.Problems = append(b.Problems, fmt.Sprintf(format, args...))
}

// Finish judges the boot once its guest is gone. want lists the packages that were
// to run; ended says how the guest ended when it was not by itself ("" if it was).
func (b *BootResult) Finish(want []string, ended string) {
	b.end(-1, 0)
	if ended != "" {
		b.problem("%s", ended)
	}
	switch {
	case !b.exited:
		b.problem("the guest ended without an exit line: it panicked or was stopped (its console has more)")
	case b.code != 0:
		b.problem("the guest reported exit %d", b.code)
	}
	ran := map[string]bool{}
	tests := 0
	for i := range b.Packages {
		p := &b.Packages[i]
		ran[p.Package] = true
		tests += len(p.Tests)
		b.judge(p)
	}
	for _, pkg := range want {
		if !ran[pkg] {
			b.problem("%s did not run", pkg)
		}
	}
	if tests == 0 && !b.program {
		b.problem("no test ran")
	}
}

func (b *BootResult) judge(p *PackageResult) {
	bad := 0
	for _, t := range p.Tests {
		switch t.Status {
		case Pass:
		case Skip:
			if why := lyingSkip(t.Reason, b.Release); why != "" {
				b.problem("%s: %s was skipped in the guest: %s (%s)", p.Package, t.Name, t.Reason, why)
			}
		default:
			bad++
			b.problem("%s: %s: %s", p.Package, t.Name, t.Status)
		}
	}
	switch {
	case p.Code == -1:
		b.problem("%s did not end", p.Package)
	case p.Code != 0 && b.program:
		b.problem("%s: exit code %d", p.Package, p.Code)
	case p.Code != 0 && bad == 0:
		b.problem("%s: exit code %d though no test failed: see its output", p.Package, p.Code)
	case p.Code == 0 && bad > 0:
		b.problem("%s: exit code 0 though %d tests failed", p.Package, bad)
	}
}

// honestSkip is the only form of a skip that a guest may report; package guest
// writes it.
var honestSkip = regexp.MustCompile(`kernel lacks .+ \(needs >= (\d+)\.(\d+)\)$`)

// lyingSkip says what is wrong with a skip's reason on a kernel, "" if nothing is.
func lyingSkip(reason, release string) string {
	m := honestSkip.FindStringSubmatch(reason)
	if m == nil {
		return "only a kernel that is too old is a reason there"
	}
	major, minor, err := guest.ParseRelease(release)
	if err != nil {
		return err.Error()
	}
	needMajor, err1 := strconv.Atoi(m[1])
	needMinor, err2 := strconv.Atoi(m[2])
	if err1 != nil || err2 != nil {
		return "that is no version"
	}
	if major > needMajor || major == needMajor && minor >= needMinor {
		return fmt.Sprintf("but this kernel is %d.%d", major, minor)
	}
	return ""
}

// Counts are of tests without subtests, and of those whose own part failed.
type Counts struct {
	Passed  int `json:"passed"`
	Failed  int `json:"failed"`
	Skipped int `json:"skipped"`
}

// Add adds other to c.
func (c *Counts) Add(other Counts) {
	c.Passed += other.Passed
	c.Failed += other.Failed
	c.Skipped += other.Skipped
}

// Count counts a package's tests. A parent counts only when it failed and none of
// its subtests did.
func Count(tests []TestResult) Counts {
	var c Counts
	for _, t := range tests {
		parent, below := false, false
		for _, o := range tests {
			if strings.HasPrefix(o.Name, t.Name+"/") {
				parent = true
				below = below || o.Status == Fail || o.Status == Unfinished
			}
		}
		failed := t.Status == Fail || t.Status == Unfinished
		switch {
		case parent && (!failed || below):
		case failed:
			c.Failed++
		case t.Status == Skip:
			c.Skipped++
		default:
			c.Passed++
		}
	}
	return c
}
