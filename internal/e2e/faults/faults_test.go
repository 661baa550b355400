package faults

import (
	"bytes"
	"strings"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
)

// What is printed for a case is what runs it again.
func TestCasesAreReadAsTheyAreWritten(t *testing.T) {
	steps := []Step{{"supervisor", "before-send-ADOPT", 8}, {"old", "recv-RELEASE", 2}, {"new", "before-import", 1}, {"keeper", "before-recv", 9}}
	list := Cases(Upgrade, steps, true)
	if len(list) < 20 {
		t.Fatalf("only %d cases of %d steps", len(list), len(steps))
	}
	for _, c := range list {
		got, err := ParseCase(c.String())
		if err != nil || got != c {
			t.Errorf("%v became %v: %v", c, got, err)
		}
	}
	for _, text := range []string{"", "upgrade: new", "downgrade", "upgrade: new recv-ADOPT 0 kill", "upgrade: new recv-ADOPT x kill", "upgrade: a b 1 kill more"} {
		if c, err := ParseCase(text); err == nil {
			t.Errorf("%q was read as %v", text, c)
		}
	}
}

// The judge does not let pass what must not be.
func TestJudge(t *testing.T) {
	all := uint64(clients)
	for name, c := range map[string]struct {
		text string
		seen Seen
		unit admin.Counters
		exit int
		want string // part of what is wrong; "" for nothing
	}{
		"all live":                   {"upgrade: old recv-FREEZE 1 stop", Seen{}, admin.Counters{Accepted: all, ClosedByPeer: all}, 0, ""},
		"interrupted by a kill":      {"upgrade: old recv-FREEZE 1 kill", Seen{Interrupted: 1}, admin.Counters{Accepted: all, ClosedByPeer: all, Interrupted: 4}, 0, ""},
		"interrupted, not counted":   {"upgrade: old recv-FREEZE 1 kill", Seen{Interrupted: 2}, admin.Counters{Accepted: all, ClosedByPeer: all, Interrupted: 1}, 0, "miss bytes"},
		"interrupted without a kill": {"upgrade: supervisor before-ledger 1 kill", Seen{}, admin.Counters{Accepted: all, ClosedByPeer: all, Interrupted: 1}, 1, "no worker died"},
		"a wrong byte":               {"upgrade", Seen{WrongBytes: 1}, admin.Counters{Accepted: all, ClosedByPeer: all}, 0, "wrong bytes"},
		"lost":                       {"upgrade: new recv-ADOPT 1 kill", Seen{Lost: 1}, admin.Counters{Accepted: all, ClosedByPeer: all - 1, Lost: 1}, 3, "1 lost"},
		"lost in silence":            {"upgrade: new recv-ADOPT 1 kill", Seen{Lost: 1}, admin.Counters{Accepted: all, ClosedByPeer: all}, 0, "the unit counts 0"},
		"counted twice":              {"adoption: supervisor before-ledger 1 kill", Seen{}, admin.Counters{Accepted: all, ClosedByPeer: all, ClosedByOwner: 1}, -1, "ended"},
		"exit code 3 for nothing":    {"upgrade", Seen{}, admin.Counters{Accepted: all, ClosedByPeer: all}, 3, "exit code 3"},
		"nobody knows":               {"upgrade: old recv-FREEZE 1 stop", Seen{}, admin.Counters{Accepted: all, ClosedByPeer: all - 1, ClosedUnknown: 1}, 0, "nobody knows"},
	} {
		k, err := ParseCase(c.text)
		if err != nil {
			t.Fatal(err)
		}
		r := &run{Options: Options{Layer: "software"}, c: k, crowd: &crowd{}, res: &Result{Case: k, Reached: true, Seen: c.seen, Counters: c.unit, Exit: c.exit}}
		r.judge()
		if got := strings.Join(r.res.Wrong, "; "); c.want == "" && got != "" || !strings.Contains(got, c.want) {
			t.Errorf("%s: the judge says %q, want %q", name, got, c.want)
		}
	}
}

// A case that is wrong is named in the table, and nowhere else.
func TestTableNamesWhatIsWrong(t *testing.T) {
	good, _ := ParseCase("upgrade: old recv-FREEZE 1 stop")
	bad, _ := ParseCase("upgrade: old recv-FREEZE 1 kill")
	var b bytes.Buffer
	Markdown(&b, []Section{{Layer: "software", Where: "here", Results: []*Result{
		{Case: good, Reached: true}, {Case: bad, Reached: true, Wrong: []string{"2 lost"}}}}})
	for _, want := range []string{"| old | recv-FREEZE | stop | kill |", "- `upgrade: old recv-FREEZE 1 kill`: 2 lost", "2 cases: 1 unnoticed, 1 WRONG"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in:\n%s", want, b.String())
		}
	}
}
