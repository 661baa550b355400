package supervise

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

// Sessions that join, change and leave groups: what the ledger says is what was put there,
// also to the next supervisor, a name stands once, and those of no session are gone.
func TestNamesOfGroups(t *testing.T) {
	const slots = 6
	l, _ := newLedger(t, slots)
	rnd := rand.New(rand.NewPCG(1, 2))
	var want [slots]string
	for step := range 3000 {
		i := rnd.IntN(slots)
		switch rnd.IntN(8) {
		case 0:
			l.end(i, endLost)
			want[i] = ""
		case 1: // a supervisor takes over
			l = ledgerOn(l.mem, slots)
			l.sweep()
		default:
			want[i] = ""
			if n := rnd.IntN(9); n > 0 {
				want[i] = fmt.Sprintf("room-%d", n)
			}
			l.put(i, entry{ID: uint64(i + 1), Phase: slotOwned, Group: want[i]})
		}
		for j := range want {
			if e, ok, damaged := l.get(j); damaged || ok && e.Group != want[j] || !ok && want[j] != "" {
				t.Fatalf("step %d: slot %d is in %q, want %q (damaged %v)", step, j, e.Group, want[j], damaged)
			}
		}
		for n := range 9 {
			name, there := fmt.Sprintf("room-%d", n), 0
			for _, w := range want {
				if w == name {
					there = 1
				}
			}
			if got := bytes.Count(l.mem, []byte(name)); got != there {
				t.Fatalf("step %d: %s stands %d times, want %d", step, name, got, there)
			}
		}
	}
}

// There is a place for the name of every session's own group while it goes to another.
func TestNamesOfAllSessions(t *testing.T) {
	const slots = 4
	l, _ := newLedger(t, slots)
	for round := range 3 {
		for i := range slots {
			name := fmt.Sprintf("%060d", 100*round+i)
			l.put(i, entry{ID: uint64(i + 1), Phase: slotOwned, Group: name})
			if e, ok, _ := l.get(i); !ok || e.Group != name {
				t.Fatalf("round %d: %+v, %v", round, e, ok)
			}
		}
	}
}

// A name that is damaged, or another's by now, is nobody's: a session is not in a group
// that it never joined.
func TestForeignName(t *testing.T) {
	l, _ := newLedger(t, 1)
	long := strings.Repeat("ä", 32)
	l.put(0, entry{ID: 7, Phase: slotOwned, Group: long})
	b := l.names.at(1)
	for i := range b {
		b[i] ^= 0x21
		if e, ok, damaged := l.get(0); ok || !damaged {
			t.Fatalf("byte %d changed: %+v", i, e)
		}
		b[i] ^= 0x21
	}
	if e, ok, _ := l.get(0); !ok || e.Group != long {
		t.Fatalf("%+v", e)
	}
	for _, r := range []nameRef{{n: 1}, {n: 2, check: 1}, {n: 3}, {n: 1<<24 - 1}, {check: 1}} {
		if name, ok := l.names.read(r); ok {
			t.Errorf("%+v: %q", r, name)
		}
	}
	// The newest entry is damaged, and the one before it names a group that is gone.
	l.put(0, entry{ID: 7, Phase: slotOwned, Group: "second"})
	l.put(0, entry{ID: 7, Phase: slotOwned, Group: "third"})
	l.put(0, entry{ID: 7, Phase: slotOwned, Group: "fourth"}) // where "second" was
	_, _, older := l.entries(0)
	newest := l.slot(0)[:entrySize]
	if &older[0] == &newest[0] {
		newest = l.slot(0)[entrySize : 2*entrySize]
	}
	newest[30] ^= 1
	if e, ok, damaged := l.get(0); ok || !damaged {
		t.Errorf("%+v", e)
	}
	// An entry that is given up leaves what it named to be used again.
	kept, err := l.keepRecord(7, []byte("state"))
	if err != nil {
		t.Fatal(err)
	}
	newest[30] ^= 1
	l.put(0, entry{ID: 7, Phase: slotParked, Group: "fifth", Kept: kept})
	n, _, _ := l.entries(0)
	l.names.at(n.name.n)[nameHeader] ^= 1
	l.sweep()
	l.end(0, endLost)
	seen := map[uint32]bool{}
	for range pieceCount(1) - 1 {
		n, err := l.keepRecord(8, []byte("other"))
		if err != nil || seen[n] {
			t.Fatalf("piece %d is given away twice, %v", n, err)
		}
		seen[n] = true
	}
}

// A supervisor killed at any byte of a session's way from one group to another leaves it in
// the first or in the second.
func TestJoinAtEveryByte(t *testing.T) {
	const slots = 2
	l, _ := newLedger(t, slots)
	l.put(1, entry{ID: 8, Phase: slotOwned, Group: "of others"})
	l.put(0, entry{ID: 7, Phase: slotOwned, Group: "first"})
	l.put(0, entry{ID: 7, Phase: slotOwned, Group: "first"})
	before := bytes.Clone(l.mem)
	l.put(0, entry{ID: 7, Phase: slotOwned, Group: "second"})
	after := bytes.Clone(l.mem)
	n, _, older := l.entries(0)
	dst := headerSize
	if &older[0] == &l.slot(0)[0] {
		dst += entrySize
	}
	name := namesOff(slots) + int(n.name.n)*nameSize
	old := namesOff(slots) + 2*nameSize
	if !bytes.Contains(before[old:old+nameSize], []byte("first")) {
		t.Fatal("the first name stands elsewhere")
	}
	groups := map[string]bool{}
	eachTear(t, before, slots, []torn{in(after, hdrNames, hdrNames+4), in(after, name+4, name+nameSize), in(after, name, name+4),
		wiped(dst, dst+4), in(after, dst+4, dst+entrySize), in(after, dst, dst+4), wiped(old, old+nameSize)},
		func(t *testing.T, l *ledger) {
			l.sweep()
			e, ok, _ := l.get(0)
			if !ok || e.ID != 7 || e.Group != "first" && e.Group != "second" {
				t.Fatalf("%+v, %v", e, ok)
			}
			groups[e.Group] = true
			if o, ok, _ := l.get(1); !ok || o.Group != "of others" {
				t.Fatalf("the other session: %+v", o)
			}
			for _, g := range []string{"first", "second"} {
				if bytes.Contains(l.mem, []byte(g)) != (e.Group == g) {
					t.Errorf("it is in %q, and %q is in the ledger or not", e.Group, g)
				}
			}
		})
	if len(groups) != 2 {
		t.Errorf("groups that were seen: %v", groups)
	}
}
