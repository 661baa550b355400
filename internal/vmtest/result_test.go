package vmtest

import (
	"strings"
	"testing"
)

// good is what a guest says in which everything went well.
const good = `kernel 6.12.1-cloud-amd64
begin ktls
|` + marker + `=== RUN   TestA
|` + marker + `=== RUN   TestA/x
|    a_test.go:5: a log line
|` + marker + `--- PASS: TestA/x (0.10s)
|` + marker + `=== NAME  TestA
|` + marker + `--- PASS: TestA (0.20s)
|` + marker + `=== NAME  
|` + marker + `=== RUN   TestB
|a line without an end` + marker + `--- PASS: TestB (0.00s)
|` + marker + `PASS
end ktls 0 1.25
exit 0
`

// skipped is a guest in which one test was skipped for a reason.
func skipped(reason string) string {
	return strings.Replace(good, marker+"--- PASS: TestB", "\n|"+"    b_test.go:7: "+reason+"\n|"+marker+"--- SKIP: TestB", 1)
}

// upTo is what comes before a mark.
func upTo(text, mark string) string {
	before, _, _ := strings.Cut(text, mark)
	return before
}

func judge(t *testing.T, text string, want []string, ended string) *BootResult {
	t.Helper()
	b := &BootResult{Kernel: "6.12"}
	for line := range strings.Lines(text) {
		b.Line(strings.TrimSuffix(line, "\n"))
	}
	b.Finish(want, ended)
	return b
}

func TestFinishJudges(t *testing.T) {
	cases := []struct {
		name    string
		text    string
		want    []string // packages; ktls
		ended   string
		problem string // part of one of the problems; "" for a good boot
		counts  Counts
	}{
		{name: "good", text: good, counts: Counts{Passed: 2}},
		{name: "carriage returns", text: strings.ReplaceAll(good, "\n", "\r\n"), counts: Counts{Passed: 2}},
		{name: "silent", text: "", problem: "without an exit line"},
		{name: "no exit line", text: strings.Replace(good, "exit 0\n", "", 1), problem: "without an exit line", counts: Counts{Passed: 2}},
		{name: "exit 1", text: strings.Replace(good, "exit 0", "exit 1", 1), problem: "exit 1", counts: Counts{Passed: 2}},
		{name: "exit line printed by a test", text: strings.Replace(good, "exit 0", "|exit 0", 1), problem: "without an exit line", counts: Counts{Passed: 2}},
		{name: "two exit lines", text: good + "exit 0\n", problem: "does not fit", counts: Counts{Passed: 2}},
		{name: "panic in mid-test", text: upTo(good, "|a line"), problem: "TestB: unfinished", counts: Counts{Passed: 1, Failed: 1}},
		{name: "timeout", text: good, ended: "stopped after the time limit", problem: "time limit", counts: Counts{Passed: 2}},
		{name: "failed test", text: strings.Replace(strings.Replace(good, "PASS: TestB", "FAIL: TestB", 1), "end ktls 0", "end ktls 1", 1), problem: "TestB: fail", counts: Counts{Passed: 1, Failed: 1}},
		{name: "failed test, yet exit codes 0", text: strings.Replace(good, "PASS: TestB", "FAIL: TestB", 1), problem: "exit code 0 though", counts: Counts{Passed: 1, Failed: 1}},
		{name: "binary died after its tests", text: strings.Replace(good, "end ktls 0", "end ktls 137", 1), problem: "exit code 137", counts: Counts{Passed: 2}},
		{name: "pass line printed by a test", text: strings.Replace(good, marker+"--- PASS: TestB", "--- PASS: TestB", 1), problem: "TestB: unfinished", counts: Counts{Passed: 1, Failed: 1}},
		{name: "package missing", text: good, want: []string{"ktls", "handoff"}, problem: "handoff did not run", counts: Counts{Passed: 2}},
		{name: "garbage", text: good + "garbage\n", problem: "does not fit", counts: Counts{Passed: 2}},
		{name: "end of another package", text: strings.Replace(good, "end ktls", "end pidfd", 1), problem: "does not fit", counts: Counts{Passed: 2}},

		{name: "skip: kernel too old", text: skipped("kernel lacks rekey (needs >= 6.14)"), counts: Counts{Passed: 1, Skipped: 1}},
		{name: "skip: kernel new enough", text: skipped("kernel lacks rekey (needs >= 6.12)"), problem: "but this kernel is 6.12", counts: Counts{Passed: 1, Skipped: 1}},
		{name: "skip: older major", text: skipped("kernel lacks TX (needs >= 4.13)"), problem: "but this kernel is 6.12", counts: Counts{Passed: 1, Skipped: 1}},
		{name: "skip: any other reason", text: skipped("no openssl here"), problem: "TestB was skipped", counts: Counts{Passed: 1, Skipped: 1}},
		{name: "skip: form with more behind", text: skipped("kernel lacks rekey (needs >= 6.14), or so"), problem: "TestB was skipped", counts: Counts{Passed: 1, Skipped: 1}},
		{name: "skip: no reason", text: strings.Replace(good, "PASS: TestA/x", "SKIP: TestA/x", 1), problem: "TestA/x was skipped", counts: Counts{Passed: 1, Skipped: 1}},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			want := tc.want
			if want == nil && tc.text != "" {
				want = []string{"ktls"}
			}
			b := judge(t, tc.text, want, tc.ended)
			all := strings.Join(b.Problems, "\n")
			if tc.problem == "" && all != "" {
				t.Errorf("a good boot has problems:\n%s", all)
			}
			if tc.problem != "" && !strings.Contains(all, tc.problem) {
				t.Errorf("no problem says %q:\n%s", tc.problem, all)
			}
			if got := b.Counts(); got != tc.counts {
				t.Errorf("counted %+v, want %+v", got, tc.counts)
			}
			results := []*BootResult{b}
			if Good(results) != (tc.problem == "") {
				t.Errorf("Good = %v", Good(results))
			}
			if total := Total(results); (total.Failed == 0) != (tc.problem == "") {
				t.Errorf("%d failed in total, with the problems:\n%s", total.Failed, all)
			}
		})
	}
}

// A run without a single test proves nothing.
func TestNothingRunIsNotGood(t *testing.T) {
	if Good(nil) {
		t.Error("no guest at all is good")
	}
	b := judge(t, "kernel 6.12.1\nbegin ktls\nend ktls 0 0.1\nexit 0\n", []string{"ktls"}, "")
	if Good([]*BootResult{b}) {
		t.Error("a guest without tests is good")
	}
}

func TestCountParents(t *testing.T) {
	for _, tc := range []struct {
		name  string
		tests []TestResult
		want  Counts
	}{
		{"a parent is its subtests", []TestResult{{Name: "T", Status: Pass}, {Name: "T/a", Status: Pass}, {Name: "T/b", Status: Pass}}, Counts{Passed: 2}},
		{"a failure is counted once", []TestResult{{Name: "T", Status: Fail}, {Name: "T/a", Status: Pass}, {Name: "T/b", Status: Fail}}, Counts{Passed: 1, Failed: 1}},
		{"a parent that failed by itself", []TestResult{{Name: "T", Status: Fail}, {Name: "T/a", Status: Pass}}, Counts{Passed: 1, Failed: 1}},
		{"a name that only starts alike", []TestResult{{Name: "T", Status: Pass}, {Name: "Tx", Status: Pass}}, Counts{Passed: 2}},
	} {
		if got := Count(tc.tests); got != tc.want {
			t.Errorf("%s: %+v, want %+v", tc.name, got, tc.want)
		}
	}
}
