package supervise

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

func newLedger(t *testing.T, slots int) (*ledger, int) {
	t.Helper()
	l, fd, err := createLedger(slots)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.close(); sys.CloseAll([]int{fd}) })
	return l, fd
}

var sample = entry{ID: 7, Epoch: wire.NewEpoch(3, 9), Owner: 4, Accepted: 12345, Moves: 2, Phase: slotOwned, Software: true, Flags: wire.FlagRestored, Group: "room/ä"}

// What one supervisor wrote, the next one reads, also through its own mapping.
func TestLedgerOutlivesItsWriter(t *testing.T) {
	l, fd := newLedger(t, 8)
	e := sample
	var err error
	if e.Kept, err = l.keepRecord(sample.ID, []byte("rec")); err != nil {
		t.Fatal(err)
	}
	l.put(5, e)
	if err := l.putFacts(5, &facts{Pool: "p", Facts: []byte("facts"), Peer: "192.0.2.1:1"}); err != nil {
		t.Fatal(err)
	}
	l.count(cntMoved, 3)
	l.end(4, uint64(wire.ReasonPeer))
	next, err := openLedger(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer next.close()
	got, ok, damaged := next.get(5)
	want := e
	want.Seq = got.Seq
	if !ok || damaged || got != want {
		t.Errorf("entry %+v (ok %v, damaged %v), want %+v", got, ok, damaged, want)
	}
	f, err := next.facts(5, nil)
	if err != nil || f.Pool != "p" || string(f.Facts) != "facts" {
		t.Errorf("facts %+v, %v", f, err)
	}
	r, err := next.record(got.Kept, got.ID)
	if err != nil || string(r) != "rec" {
		t.Errorf("record %+v, %v", r, err)
	}
	if next.used() != 6 {
		t.Errorf("used %d slots, want 6", next.used())
	}
	if c := next.counters(); c.Moved != 3 || c.ClosedByPeer != 1 {
		t.Errorf("counters %+v", c)
	}
}

// A supervisor killed at any byte of a commit leaves the old owner or the new one
// on record, never a mixture and never nobody.
func TestCommitIsAtomicAtEveryByte(t *testing.T) {
	l, _ := newLedger(t, 1)
	l.put(0, sample)
	before, memBefore := bytes.Clone(l.slot(0)), bytes.Clone(l.mem)
	after := sample
	after.Owner, after.Epoch, after.Group = 99, wire.NewEpoch(3, 10), "elsewhere"
	l.put(0, after)
	full, memAfter := bytes.Clone(l.slot(0)), bytes.Clone(l.mem)
	// Which entry was written, and the order of the stores: checksum destroyed, body,
	// checksum last.
	off := 0
	if bytes.Equal(before[:entrySize], full[:entrySize]) {
		off = entrySize
	}
	for n := 0; n <= entrySize-4; n++ {
		copy(l.mem, memBefore)
		s := l.slot(0)[off : off+entrySize]
		clear(s[:4])
		copy(s[4:4+n], full[off+4:off+4+n])
		e, ok, _ := l.get(0)
		if !ok || e.Owner != sample.Owner || e.Group != sample.Group {
			t.Fatalf("killed after %d bytes: %+v, %v; the old owner should be on record", n, e, ok)
		}
	}
	copy(l.mem, memAfter)
	if e, ok, _ := l.get(0); !ok || e.Owner != 99 || e.Group != "elsewhere" {
		t.Fatalf("after the commit: %+v, %v", e, ok)
	}
}

// Alternating commits always give the newest.
func TestLedgerNewestEntryWins(t *testing.T) {
	l, _ := newLedger(t, 1)
	for i := uint64(1); i <= 9; i++ {
		e := sample
		e.Owner = i
		l.put(0, e)
		if got, ok, _ := l.get(0); !ok || got.Owner != i {
			t.Fatalf("commit %d: %+v, %v", i, got, ok)
		}
	}
}

func TestDamagedSlotIsNoticed(t *testing.T) {
	l, _ := newLedger(t, 2)
	if _, ok, damaged := l.get(0); ok || damaged {
		t.Error("a slot never used is neither there nor damaged")
	}
	l.put(0, sample)
	l.put(0, sample)
	for _, off := range []int{20, entrySize + 20} {
		l.slot(0)[off] ^= 1
	}
	if _, ok, damaged := l.get(0); ok || !damaged {
		t.Errorf("ok %v, damaged %v; both entries were changed", ok, damaged)
	}
}

func TestLedgerRefusesWhatDoesNotFit(t *testing.T) {
	l, _ := newLedger(t, 1)
	if err := l.putFacts(0, &facts{Facts: make([]byte, factsSize)}); !errors.Is(err, errTooLarge) {
		t.Errorf("facts: %v", err)
	}
	if _, err := l.keepRecord(1, make([]byte, pieceSize)); !errors.Is(err, errTooLarge) {
		t.Errorf("record: %v", err)
	}
	if err := l.putFacts(0, &facts{Base: make([]byte, factsSize-keysSize)}); !errors.Is(err, errTooLarge) {
		t.Errorf("record of the handshake: %v", err)
	}
}

func TestLedgerRefusesForeignMemory(t *testing.T) {
	fd, err := sys.SharedMemfd("test", headerSize)
	if err != nil {
		t.Fatal(err)
	}
	defer sys.CloseAll([]int{fd})
	if _, err := openLedger(fd); err == nil || !strings.Contains(err.Error(), "none of ours") {
		t.Errorf("got %v", err)
	}
	l, fd2 := newLedger(t, 1)
	l.mem[hdrVersion]++
	if _, err := openLedger(fd2); err == nil || !strings.Contains(err.Error(), "version") {
		t.Errorf("got %v", err)
	}
}
