package bench

import (
	"strings"
	"testing"
)

// A short turn: everything that a benchmark of moves needs works, with sessions at rest
// and with handlers, and nothing is lost.
func TestMove(t *testing.T) {
	for _, rest := range []bool{true, false} {
		o := MoveOptions{Layer: "software", Sessions: 200, Workers: 1, Rest: rest, Turns: 2, Dir: shortDir(t), Say: t.Logf}
		m, err := MeasureMove(o)
		if err != nil {
			t.Fatal(err)
		}
		if m.Rate <= 0 || m.RawRate <= 0 || m.StallMax <= 0 || len(m.CPU) != 4 {
			t.Errorf("%+v", m)
		}
		if text := movesText([]Move{m}); !strings.Contains(text, "| 200 | software layer") {
			t.Errorf("the report says nothing of it:\n%s", text)
		}
	}
}

// A program that upgrades itself is measured as well: every client has its echo from the
// last of its processes.
func TestSelfMove(t *testing.T) {
	o := MoveOptions{Layer: "software", Sessions: 100, Self: true, Rest: true, Turns: 2, Say: t.Logf}
	m, err := MeasureMove(o)
	if err != nil {
		t.Fatal(err)
	}
	if m.Rate <= 0 || m.RawRate <= 0 || len(m.CPU) != 2 {
		t.Errorf("%+v", m)
	}
	if text := movesText([]Move{m}); !strings.Contains(text, "| 100 | a program that upgrades itself") {
		t.Errorf("the report says nothing of it:\n%s", text)
	}
}
