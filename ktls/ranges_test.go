package ktls

import (
	"slices"
	"strings"
	"testing"
)

func TestKernelRanges(t *testing.T) {
	for release, want := range map[string][]string{
		"7.3.4":         nil,
		"6.14.0":        nil,
		"6.12.117+deb":  {"6.14"},
		"6.1.0-56":      {"6.5", "6.14"},
		"6.0.3":         {"6.1", "6.5", "6.14"},
		"5.10.0":        {"5.11", "6.1", "6.5", "6.14"},
		"4.19.0":        {"5.1", "5.11", "6.1", "6.5", "6.14"},
		"what is that?": nil,
	} {
		c := &Capabilities{Release: release}
		var got []string
		for _, r := range c.Ranges() {
			if r.Applies {
				got = append(got, r.Before)
			}
			if r.Applies != (r.Remedy != "") {
				t.Errorf("%s: %+v", release, r)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s is in the ranges before %v, want %v", release, got, want)
		}
	}
}

// What the table says is what auto does, on the host as in guests.
func TestChoicesAreWhatAutoDoes(t *testing.T) {
	caps := Probe()
	list := caps.Choices()
	if len(list) != len(suites) {
		t.Fatalf("%d choices for %d suites", len(list), len(suites))
	}
	for i, ch := range list {
		ok, reason := supportsKernel(suites[i].version, suites[i].id)
		if (ch.Layer == LayerKernel) != ok || ch.Reason != reason {
			t.Errorf("%+v; auto: kernel %v (%s)", ch, ok, reason)
		}
		if both := ch.Send == StatusSupported && ch.Receive == StatusSupported; both != ok {
			t.Errorf("%+v: send and receive do not say what follows", ch)
		}
	}
	if rows := caps.ChoiceTable(); len(rows) != len(list)+1 || !strings.HasPrefix(rows[1][0], "TLS") {
		t.Errorf("table %v", rows)
	}
}
