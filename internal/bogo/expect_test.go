package bogo

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// The list is whole, and everything in it that is not passed has one of the reasons.
func TestExpectations(t *testing.T) {
	list, err := Expectations()
	if err != nil {
		t.Fatal(err)
	}
	count := map[string]int{}
	used := map[Reason]bool{MovedTickets: true} // not in the list: only where sessions move
	for _, e := range list {
		count[e.Role]++
		used[e.Software], used[e.Kernel] = true, true
	}
	if count["client"] != 303 || count["server"] != 134 {
		t.Errorf("%d tests of clients and %d of servers, 303 and 134 are expected", count["client"], count["server"])
	}
	for r := range Reasons {
		if !used[r] {
			t.Errorf("no test has the reason %s", r)
		}
	}
}

// On the host, because a guest has no docs.
func TestHostReasonsAreDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/conformance.md")
	if err != nil {
		t.Fatal(err)
	}
	for r := range Reasons {
		if r != Passed && !bytes.Contains(doc, []byte("`"+string(r)+"`")) {
			t.Errorf("docs/conformance.md does not explain the reason %s", r)
		}
	}
}

func TestExpectationsMustBeWellFormed(t *testing.T) {
	const good = "01 client A pass\n"
	for _, bad := range []string{
		"01 client A\n", "01 client A pass pass pass\n", "01 both A pass\n",
		"01 client A because\n", "01 client A pass because\n", good + good,
	} {
		if list, err := readExpectations(strings.NewReader(bad)); err == nil {
			t.Errorf("%q was read as %v", bad, list)
		}
	}
	list, err := readExpectations(strings.NewReader("# a comment\n\n" + good + "02 server B not-aead handshake # why\n"))
	if err != nil || len(list) != 2 || list[0].Kernel != Passed || list[1].in("software") != NotAEAD || list[1].in("kernel") != Handshake {
		t.Errorf("%v, %v", list, err)
	}
}

// alertText is the part of a text that ktls makes itself, as far as the first number.
var alertText = regexp.MustCompile(`^session ended with alert \w+: (.*?)( \d|$)`)

// Every error of ours that the runner is told to look for is one that ktls can say,
// so that a changed text does not turn into a test that fails for no reason.
func TestErrorMapIsCurrent(t *testing.T) {
	var config struct {
		DisabledTests map[string]string
		ErrorMap      map[string][]string
		AllCurves     []int
	}
	dec := json.NewDecoder(bytes.NewReader(configFile))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&config); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("../../ktls/*.go")
	if err != nil {
		t.Fatal(err)
	}
	var source strings.Builder
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && !strings.HasSuffix(f, "_test.go") {
			source.Write(b)
		}
	}
	for theirs, ours := range config.ErrorMap {
		if len(ours) == 0 {
			t.Errorf("%s stands for nothing", theirs)
		}
		for _, text := range ours {
			if len(text) < 10 {
				t.Errorf("%s: %q would match anything", theirs, text)
			}
			m := alertText.FindStringSubmatch(text)
			if m != nil && source.Len() > 0 && !strings.Contains(source.String(), m[1]) {
				t.Errorf("%s: ktls does not say %q", theirs, m[1])
			}
		}
	}
	for pattern, why := range config.DisabledTests {
		if why == "" {
			t.Errorf("%s is disabled without a reason", pattern)
		}
	}
}

func TestJudge(t *testing.T) {
	list := []Expectation{
		{"01", "client", "Good", Passed, Passed},
		{"01", "client", "Known", NotAEAD, Passed},
		{"01", "server", "Lost", Passed, Passed},
		{"02", "client", "ExportKeyingMaterial-TLS-TLS13", Passed, Passed},
	}
	pass := func(names ...string) (o []Outcome) {
		for _, n := range names {
			o = append(o, Outcome{Test: n, Actual: "PASS"})
		}
		return o
	}
	fail := func(n string) Outcome { return Outcome{n, "FAIL", "why"} }
	for _, tc := range []struct {
		name     string
		outcomes []Outcome
		layer    string
		moves    bool
		want     string // names of unexpected ones
	}{
		{"as listed", append(pass("Good", "Lost"), fail("Known")), "software", false, ""},
		{"a failure", append(pass("Lost"), fail("Good"), fail("Known")), "software", false, "Good"},
		{"skipped", []Outcome{{"Good", "SKIP", ""}}, "software", false, "Good"},
		{"passed though listed", pass("Known"), "software", false, "Known"},
		{"listed for the other layer", []Outcome{fail("Known")}, "kernel", false, "Known"},
		{"mirrored", append(pass("MirrorServer-Good"), fail("MirrorServer-Known")), "software", false, ""},
		{"mirrored, a failure", []Outcome{fail("MirrorServer-Good")}, "software", false, "MirrorServer-Good"},
		{"tickets", []Outcome{fail("ExportKeyingMaterial-TLS-TLS13")}, "software", false, "ExportKeyingMaterial-TLS-TLS13"},
		{"tickets of sessions that move", []Outcome{fail("ExportKeyingMaterial-TLS-TLS13")}, "software", true, ""},
		{"not in the list", []Outcome{fail("Stranger")}, "software", false, ""},
	} {
		v := judge(list, tc.outcomes, tc.layer, tc.moves)
		var names []string
		for _, line := range v.Unexpected {
			name, _, _ := strings.Cut(line, ":")
			names = append(names, name)
		}
		if got := strings.Join(names, " "); got != tc.want {
			t.Errorf("%s: unexpected: %q, want %q", tc.name, got, tc.want)
		}
	}
	v := judge(list, append(pass("Good"), fail("Stranger")), "software", false)
	if len(v.Unlisted) != 1 || len(v.NotRun) != 3 {
		t.Errorf("unlisted %v, not run %v", v.Unlisted, v.NotRun)
	}
	var out strings.Builder
	v.Table(&out)
	if !regexp.MustCompile(`(?m)^01 +client +1 +0 +0 `).MatchString(out.String()) {
		t.Errorf("table:\n%s", out.String())
	}
}

func TestDrive(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	d := Drive{Runner: exe, Shim: exe, Layer: "software", Move: true, Tests: "Stranger;BadStranger", Idle: time.Second, Workers: 1}
	t.Setenv(roleVar, roleRunner)
	v, err := d.Run(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(v.Unlisted) != 2 || v.Unlisted[0].Actual != "FAIL" || v.Unlisted[1].Actual != "PASS" ||
		v.Unlisted[0].Error != "-ktls-mode;software;-ktls-move" {
		t.Errorf("%+v", v.Unlisted)
	}
	// The whole list, with what a modified runner would make of it.
	d.Tests = ""
	if v, err = d.Run(ctx); err != nil || len(v.NotRun) > 0 || len(v.Unlisted) > 0 {
		t.Errorf("%v: not run %v, not in the list %v", err, v.NotRun, v.Unlisted)
	}
	d.Layer = "hardware"
	if _, err := d.Run(ctx); err == nil {
		t.Error("a layer that is none was accepted")
	}
	d.Layer = "kernel"
	t.Setenv(roleVar, roleSilent)
	if _, err := d.Run(ctx); err == nil || !strings.Contains(err.Error(), "no tests here") {
		t.Errorf("a runner that died: %v", err)
	}
}
