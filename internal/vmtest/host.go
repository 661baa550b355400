package vmtest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// HostOptions are a run of the tests on this machine.
type HostOptions struct {
	Root  string
	Race  bool
	Say   func(format string, args ...any)
	Extra []string // arguments of go test, before ./...
}

// HostResult is what `go test` reported on this machine.
type HostResult struct {
	Packages []*PackageResult
	Failed   []string // packages that did not build, or failed without a failed test
}

// event is one line of `go test -json` (go doc test2json).
type event struct {
	Action      string
	Package     string
	ImportPath  string
	Test        string
	Elapsed     float64
	Output      string
	FailedBuild string
}

// RunHost runs all tests of the module on this machine. Its error is about what
// kept go test from running; failed tests are in the result.
func RunHost(ctx context.Context, o HostOptions) (*HostResult, error) {
	// No cached results: some tests build and start programs, which the go command
	// does not know about when it looks whether anything changed.
	args := []string{"test", "-json", "-count=1", "-timeout=10m"}
	if o.Race {
		args = append(args, "-race")
	}
	args = append(append(args, o.Extra...), "./...")
	o.Say("host: go %s", strings.Join(args, " "))
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = o.Root
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("go test: %w", err)
	}
	h := &hostLog{say: o.Say, packages: map[string]*hostPackage{}, builds: map[string][]string{}}
	readErr := h.read(out)
	if readErr != nil {
		// Nobody reads any more; go test would block.
		_ = cmd.Process.Kill()
	}
	waitErr := cmd.Wait()
	r := h.finish()
	switch exit := (*exec.ExitError)(nil); {
	case ctx.Err() != nil:
		return r, ctx.Err()
	case readErr != nil:
		return r, fmt.Errorf("go test: reading its results: %w", readErr)
	case errors.As(waitErr, &exit):
		if c := r.Counts(); c.Failed == 0 {
			r.Failed = append(r.Failed, fmt.Sprintf("go test ended with %v, though nothing failed", exit))
		}
	case waitErr != nil:
		return r, fmt.Errorf("go test: %w", waitErr)
	}
	return r, nil
}

// Counts counts the tests; a package that failed as a whole is one failure.
func (r *HostResult) Counts() Counts {
	var sum Counts
	for _, p := range r.Packages {
		sum.Add(Count(p.Tests))
	}
	sum.Failed += len(r.Failed)
	return sum
}

// Failures lists what failed, one line each.
func (r *HostResult) Failures() []string {
	list := slices.Clone(r.Failed)
	for _, p := range r.Packages {
		for _, t := range p.Tests {
			if t.Status == Fail || t.Status == Unfinished {
				list = append(list, fmt.Sprintf("%s %s: %s", p.Package, t.Name, t.Status))
			}
		}
	}
	return list
}

// hostLog collects the events of one go test.
type hostLog struct {
	say      func(format string, args ...any)
	packages map[string]*hostPackage
	order    []string
	builds   map[string][]string // what the compiler said, by import path
	failed   []string
}

type hostPackage struct {
	result PackageResult
	index  map[string]int
	output map[string][]string // by test; "" is the package's own
}

func (h *hostLog) read(r io.Reader) error {
	br := bufio.NewReader(r)
	for {
		line, err := br.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if jerr := json.Unmarshal(line, &e); jerr != nil {
				// The go command itself speaks up in plain text now and then.
				h.say("host: %s", strings.TrimSpace(string(line)))
			} else {
				h.event(e)
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (h *hostLog) event(e event) {
	switch e.Action {
	case "build-output":
		h.builds[e.ImportPath] = append(h.builds[e.ImportPath], e.Output)
		return
	case "build-fail":
		return
	}
	p := h.packages[e.Package]
	if p == nil {
		p = &hostPackage{result: PackageResult{Package: shortName(e.Package)}, index: map[string]int{}, output: map[string][]string{}}
		h.packages[e.Package] = p
		h.order = append(h.order, e.Package)
	}
	switch {
	case e.Action == "output":
		if len(p.output[e.Test]) < 2000 {
			p.output[e.Test] = append(p.output[e.Test], e.Output)
		}
	case e.Test == "":
		h.packageEnd(p, e)
	default:
		p.event(e)
	}
}

func (p *hostPackage) event(e event) {
	i, ok := p.index[e.Test]
	if !ok {
		i = len(p.result.Tests)
		p.index[e.Test] = i
		p.result.Tests = append(p.result.Tests, TestResult{Name: e.Test, Status: Unfinished})
	}
	t := &p.result.Tests[i]
	switch e.Action {
	case "pass", "fail", "skip":
		t.Status, t.Seconds = Status(e.Action), e.Elapsed
	}
	if e.Action == "skip" {
		t.Reason = hostReason(p.output[e.Test])
	}
	if e.Action == "pass" {
		delete(p.output, e.Test) // only what failed is shown
	}
}

// hostReason is what a skipped test said last before the line that says so.
func hostReason(output []string) string {
	var said []string
	for _, line := range output {
		line = strings.TrimRight(line, "\n")
		if !strings.HasPrefix(line, "=== ") && !endLine.MatchString(line) {
			said = append(said, line)
		}
	}
	return reason(said)
}

func (h *hostLog) packageEnd(p *hostPackage, e event) {
	switch e.Action {
	case "pass":
		p.result.Seconds = e.Elapsed
		c := Count(p.result.Tests)
		h.say("host: %-28s ok (%.1f s, %d passed, %d skipped)", p.result.Package, e.Elapsed, c.Passed, c.Skipped)
	case "fail":
		p.result.Seconds, p.result.Code = e.Elapsed, 1
		h.say("host: %-28s FAILED (%.1f s)", p.result.Package, e.Elapsed)
		if e.FailedBuild != "" {
			h.print(h.builds[e.FailedBuild])
		}
		for _, t := range p.result.Tests {
			if t.Status == Fail || t.Status == Unfinished {
				h.print(p.output[t.Name])
			}
		}
		if c := Count(p.result.Tests); c.Failed == 0 {
			h.print(p.output[""])
			h.failed = append(h.failed, p.result.Package+" failed as a whole")
		}
	}
}

func (h *hostLog) print(lines []string) {
	for _, l := range lines {
		h.say("    %s", strings.TrimRight(l, "\n"))
	}
}

func (h *hostLog) finish() *HostResult {
	r := &HostResult{Failed: h.failed}
	for _, name := range h.order {
		p := h.packages[name]
		if len(p.result.Tests) > 0 {
			r.Packages = append(r.Packages, &p.result)
		}
	}
	return r
}

// shortName is a package's path below the module.
func shortName(importPath string) string {
	if _, rel, ok := strings.Cut(importPath, "ktlsvisor/ktlsvisor/"); ok {
		return rel
	}
	return importPath
}

// NowhereRun lists the tests that were skipped on this machine and passed in no
// guest either: nothing vouches for them.
func NowhereRun(h *HostResult, guests []*BootResult) []string {
	passed := map[string]bool{}
	for _, b := range guests {
		for _, p := range b.Packages {
			for _, t := range p.Tests {
				if t.Status == Pass {
					passed[p.Package+" "+t.Name] = true
				}
			}
		}
	}
	var nowhere []string
	for _, p := range h.Packages {
		for _, t := range p.Tests {
			if t.Status == Skip && !passed[p.Package+" "+t.Name] {
				nowhere = append(nowhere, fmt.Sprintf("%s %s: %s", p.Package, t.Name, t.Reason))
			}
		}
	}
	slices.Sort(nowhere)
	return nowhere
}
