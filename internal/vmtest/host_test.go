package vmtest

import (
	"fmt"
	"strings"
	"testing"
)

const hostEvents = `{"Action":"start","Package":"github.com/ktlsvisor/ktlsvisor/ktls"}
{"Action":"run","Package":"github.com/ktlsvisor/ktlsvisor/ktls","Test":"TestA"}
{"Action":"output","Package":"github.com/ktlsvisor/ktlsvisor/ktls","Test":"TestA","Output":"=== RUN   TestA\n"}
{"Action":"pass","Package":"github.com/ktlsvisor/ktlsvisor/ktls","Test":"TestA","Elapsed":0.5}
{"Action":"run","Package":"github.com/ktlsvisor/ktlsvisor/ktls","Test":"TestB"}
{"Action":"output","Package":"github.com/ktlsvisor/ktlsvisor/ktls","Test":"TestB","Output":"    b_test.go:3: no kernel TLS here\n"}
{"Action":"output","Package":"github.com/ktlsvisor/ktlsvisor/ktls","Test":"TestB","Output":"--- SKIP: TestB (0.00s)\n"}
{"Action":"skip","Package":"github.com/ktlsvisor/ktlsvisor/ktls","Test":"TestB","Elapsed":0}
{"Action":"run","Package":"github.com/ktlsvisor/ktlsvisor/ktls","Test":"TestC"}
{"Action":"output","Package":"github.com/ktlsvisor/ktlsvisor/ktls","Test":"TestC","Output":"    c_test.go:3: wrong\n"}
{"Action":"fail","Package":"github.com/ktlsvisor/ktlsvisor/ktls","Test":"TestC","Elapsed":0}
{"Action":"fail","Package":"github.com/ktlsvisor/ktlsvisor/ktls","Elapsed":0.6}
{"ImportPath":"github.com/ktlsvisor/ktlsvisor/pidfd [test]","Action":"build-output","Output":"x.go:1: undefined: y\n"}
{"ImportPath":"github.com/ktlsvisor/ktlsvisor/pidfd [test]","Action":"build-fail"}
{"Action":"start","Package":"github.com/ktlsvisor/ktlsvisor/pidfd"}
{"Action":"fail","Package":"github.com/ktlsvisor/ktlsvisor/pidfd","Elapsed":0,"FailedBuild":"github.com/ktlsvisor/ktlsvisor/pidfd [test]"}
{"Action":"run","Package":"github.com/ktlsvisor/ktlsvisor/state","Test":"TestD"}
`

func TestHostEvents(t *testing.T) {
	var said strings.Builder
	h := &hostLog{packages: map[string]*hostPackage{}, builds: map[string][]string{},
		say: func(format string, args ...any) { fmt.Fprintf(&said, format+"\n", args...) }}
	if err := h.read(strings.NewReader(hostEvents)); err != nil {
		t.Fatal(err)
	}
	r := h.finish()
	// TestC, the package that did not build, and TestD, which has no end.
	if got, want := r.Counts(), (Counts{Passed: 1, Failed: 3, Skipped: 1}); got != want {
		t.Errorf("counted %+v, want %+v", got, want)
	}
	failures := strings.Join(r.Failures(), "; ")
	if want := "pidfd failed as a whole; ktls TestC: fail; state TestD: unfinished"; failures != want {
		t.Errorf("failures %q, want %q", failures, want)
	}
	for _, want := range []string{"c_test.go:3: wrong", "undefined: y", "ktls  ", "pidfd  "} {
		if !strings.Contains(said.String(), want) {
			t.Errorf("nothing says %q:\n%s", want, said.String())
		}
	}
	if got := r.Packages[0].Tests[1].Reason; got != "no kernel TLS here" {
		t.Errorf("reason of the skip: %q", got)
	}
}

func TestNowhereRun(t *testing.T) {
	h := &HostResult{Packages: []*PackageResult{{Package: "ktls", Tests: []TestResult{
		{Name: "TestA", Status: Skip, Reason: "no kernel TLS"},
		{Name: "TestB", Status: Skip, Reason: "no openssl"},
		{Name: "TestC", Status: Skip, Reason: "no rekey"},
		{Name: "TestD", Status: Pass},
	}}}}
	guests := []*BootResult{{Packages: []PackageResult{
		{Package: "ktls", Tests: []TestResult{{Name: "TestA", Status: Pass}, {Name: "TestC", Status: Skip}}},
		{Package: "handoff", Tests: []TestResult{{Name: "TestB", Status: Pass}}},
	}}}
	got := strings.Join(NowhereRun(h, guests), "; ")
	if want := "ktls TestB: no openssl; ktls TestC: no rekey"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
