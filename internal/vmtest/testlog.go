package vmtest

import (
	"regexp"
	"strconv"
	"strings"
)

// testLog reads the output of a test binary run with -test.v=test2json, in which
// every line of the testing package itself starts with marker, so that nothing a
// test prints can be taken for one.
type testLog struct {
	result PackageResult
	index  map[string]int      // test -> place in result.Tests
	said   map[string][]string // test -> what it logged, the latest lines
	now    string              // whose output comes
}

const marker = "\x16"

var (
	startLine = regexp.MustCompile(`^=== (RUN|CONT|NAME|PAUSE) +(.*)$`)
	endLine   = regexp.MustCompile(`^ *--- (PASS|FAIL|SKIP): (.+) \(([0-9.]+)s\)$`)
	place     = regexp.MustCompile(`^ *[A-Za-z0-9_]+\.go:[0-9]+: `)
)

func (l *testLog) line(text string) {
	// A test that ended its output in mid-line has the marker further on.
	for i, part := range strings.Split(text, marker) {
		if i == 0 {
			if part != "" {
				l.output(part)
			}
			continue
		}
		if !strings.HasPrefix(part, "=== NAME") { // says only whose output comes next
			l.result.Output = append(l.result.Output, part)
		}
		l.frame(part)
	}
}

func (l *testLog) output(text string) {
	l.result.Output = append(l.result.Output, text)
	if l.said == nil {
		l.said = map[string][]string{}
	}
	l.said[l.now] = append(l.said[l.now], text)
	if said := l.said[l.now]; len(said) > 20 {
		l.said[l.now] = said[len(said)-20:]
	}
}

func (l *testLog) frame(text string) {
	if m := startLine.FindStringSubmatch(text); m != nil {
		l.now = m[2]
		if m[1] == "RUN" {
			l.test(m[2])
		}
		return
	}
	m := endLine.FindStringSubmatch(text)
	if m == nil {
		return
	}
	t := l.test(m[2])
	t.Status = map[string]Status{"PASS": Pass, "FAIL": Fail, "SKIP": Skip}[m[1]]
	// The pattern admits more than numbers ("1.2.3"), which the testing package
	// does not write; the duration is for people only.
	t.Seconds, _ = strconv.ParseFloat(m[3], 64)
	if t.Status == Skip {
		t.Reason = reason(l.said[m[2]])
	}
	l.now = ""
}

// test finds or makes the result of a test, unfinished until told otherwise.
func (l *testLog) test(name string) *TestResult {
	if l.index == nil {
		l.index = map[string]int{}
	}
	i, ok := l.index[name]
	if !ok {
		i = len(l.result.Tests)
		l.index[name] = i
		l.result.Tests = append(l.result.Tests, TestResult{Name: name, Status: Unfinished})
	}
	return &l.result.Tests[i]
}

func (l *testLog) finish() PackageResult { return l.result }

// reason is what a skipped test logged last.
func reason(said []string) string {
	if len(said) == 0 {
		return "no reason given"
	}
	last := said[len(said)-1]
	return strings.TrimSpace(place.ReplaceAllString(last, ""))
}
