package supervise

import "testing"

// store is one write to the ledger's memory.
type torn struct {
	off  int
	data []byte
}

// eachTear plays writes to mem one byte at a time, and has look see what a supervisor that
// was killed there leaves: before the first byte and after every one that changes something.
func eachTear(t *testing.T, mem []byte, slots int, writes []torn, look func(t *testing.T, l *ledger)) {
	t.Helper()
	now := append([]byte(nil), mem...)
	show := func() {
		t.Helper()
		look(t, ledgerOn(append([]byte(nil), now...), slots))
	}
	show()
	for _, w := range writes {
		for i, c := range w.data {
			if now[w.off+i] == c {
				continue
			}
			now[w.off+i] = c
			show()
			if t.Failed() {
				t.Fatalf("killed after byte %d at %d", i, w.off)
			}
		}
	}
}

// in is the write that brings a part of the memory to what it is in after.
func in(after []byte, from, to int) torn { return torn{from, after[from:to]} }

// wiped is a part of the memory that is cleared.
func wiped(from, to int) torn { return torn{from, make([]byte, to-from)} }
