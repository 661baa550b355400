package supervise

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// changingKeys is a ledger with a session whose sending key is being changed.
func changingKeys(t *testing.T) (l *ledger, tx, rx, next []byte, before []byte) {
	t.Helper()
	l, _ = newLedger(t, 2)
	if err := l.putFacts(1, &facts{Pool: "p", Facts: []byte("facts"), Base: []byte("base")}); err != nil {
		t.Fatal(err)
	}
	tx, rx, next = bytes.Repeat([]byte{1}, 48), bytes.Repeat([]byte{2}, 48), bytes.Repeat([]byte{3}, 48)
	if err := l.initKeys(1, tx, rx); err != nil {
		t.Fatal(err)
	}
	l.put(1, entry{ID: 7, Phase: slotOwned, Owner: 3})
	before = bytes.Clone(l.mem)
	k := l.keys(1, ktls.Sending)
	if err := l.prepare(1, ktls.Sending, &k, next, 77); err != nil {
		t.Fatal(err)
	}
	return l, tx, rx, next, before
}

// A supervisor that is killed at any byte of a change of keys leaves the old secret, both,
// or the new one; the next supervisor finds the same, and nothing else in the memory.
func TestKeysAtEveryByte(t *testing.T) {
	l, tx, rx, next, before := changingKeys(t)
	room := headerSize + slotSize + keysOff // of slot 1
	piece := piecesOff(2) + pieceSize       // the first one
	const place = 8
	intent := bytes.Clone(l.mem)
	l.complete(1, ktls.Sending, 0)
	done := bytes.Clone(l.mem)

	see := func(t *testing.T, l *ledger, when string) (gen uint32, changing bool) {
		t.Helper()
		k := l.keys(1, ktls.Sending)
		defer k.wipe()
		switch {
		case k.gen == 0 && bytes.Equal(k.current, tx) && k.next == nil:
		case k.gen == 0 && bytes.Equal(k.current, tx) && bytes.Equal(k.next, next) && k.seq == 77:
		case k.gen == 1 && bytes.Equal(k.current, next) && k.next == nil:
		default:
			t.Errorf("%s: %+v", when, k)
		}
		if r := l.keys(1, ktls.Receiving); r.gen != 0 || !bytes.Equal(r.current, rx) || r.next != nil {
			t.Errorf("%s, the other direction: %+v", when, r)
		}
		return k.gen, k.next != nil
	}
	// next is the supervisor that comes then; it may be killed as well.
	successor := func(t *testing.T, l *ledger) (gen uint32, changing bool) {
		t.Helper()
		gen, changing = see(t, l, "as it was left")
		l.sweep()
		g, c := see(t, l, "to the next supervisor")
		if g != gen || c != changing {
			t.Errorf("generation %d, changing %v; the next supervisor: %d, %v", gen, changing, g, c)
		}
		if bytes.Contains(l.mem, tx) != (gen == 0) || bytes.Contains(l.mem, next) != (gen == 1 || changing) {
			t.Errorf("generation %d, changing %v, and another secret is in the ledger", gen, changing)
		}
		if b, err := l.base(1); err != nil || string(b) != "base" {
			t.Errorf("record state of the handshake: %q, %v", b, err)
		}
		// It goes on from there.
		k := l.keys(1, ktls.Sending)
		if !changing {
			if err := l.prepare(1, ktls.Sending, &k, rx, 5); err != nil {
				t.Error(err)
			}
		}
		l.complete(1, ktls.Sending, gen)
		if a := l.keys(1, ktls.Sending); a.gen != gen+1 || a.next != nil || bytes.Contains(l.mem, k.current) {
			t.Errorf("the next change: %+v", a)
		}
		if len(l.pieces.spare) != int(l.pieces.used())-1 {
			t.Errorf("%d pieces of %d are free", len(l.pieces.spare), l.pieces.used()-1)
		}
		return gen, changing
	}
	seen := map[bool]bool{}
	eachTear(t, before, 2, []torn{in(intent, hdrPieces, hdrPieces+4), in(intent, piece+4, piece+pieceSize), in(intent, piece, piece+4), in(intent, room, room+4)},
		func(t *testing.T, l *ledger) {
			gen, changing := successor(t, l)
			if gen != 0 {
				t.Error("a new generation before it was set")
			}
			seen[changing] = true
		})
	if !seen[false] || !seen[true] {
		t.Errorf("intents that were seen: %v", seen)
	}
	gens := map[uint32]bool{}
	eachTear(t, intent, 2, []torn{wiped(room+place, room+place+4), in(done, room+place+4, room+place+keyPlace), in(done, room+place, room+place+4),
		wiped(room, room+4), wiped(piece, piece+pieceSize)},
		func(t *testing.T, l *ledger) {
			gen, changing := successor(t, l)
			if changing == (gen == 1) {
				t.Errorf("generation %d, changing %v", gen, changing)
			}
			gens[gen] = true
		})
	if !gens[0] || !gens[1] {
		t.Errorf("generations that were seen: %v", gens)
	}
	// Taken back.
	eachTear(t, intent, 2, []torn{wiped(room, room+4), wiped(piece, piece+pieceSize)},
		func(t *testing.T, l *ledger) {
			if gen, _ := successor(t, l); gen != 0 {
				t.Errorf("generation %d", gen)
			}
		})
}

// Whatever stands in the place of keys and behind their numbers is refused, not followed.
func TestForeignKeys(t *testing.T) {
	l, tx, _, next, _ := changingKeys(t)
	room := l.roomForKeys(1)
	good := bytes.Clone(l.mem)
	is := func(when string, current, next []byte) {
		t.Helper()
		if k := l.keys(1, ktls.Sending); !bytes.Equal(k.current, current) || !bytes.Equal(k.next, next) {
			t.Errorf("%s: %+v", when, k)
		}
		copy(l.mem, good)
	}
	is("untouched", tx, next)
	other, err := l.keepRecord(8, l.piece(1)[pieceHeader:pieceHeader+nextHeader+48])
	if err != nil {
		t.Fatal(err)
	}
	good = bytes.Clone(l.mem)
	for name, n := range map[string]uint32{"none": 0, "another session's": other, "never filled": 3, "outside": 1 << 31, "all ones": 1<<32 - 1} {
		binary.LittleEndian.PutUint32(nextOf(room, ktls.Sending), n)
		is("a piece that is "+name, tx, nil)
		binary.LittleEndian.PutUint32(nextOf(room, ktls.Sending), n)
		l.sweep()
		if got := binary.LittleEndian.Uint32(nextOf(room, ktls.Sending)); got != 0 {
			t.Errorf("a piece that is %s: the next supervisor leaves %d", name, got)
		}
		is("a piece that is "+name+", swept", tx, nil)
	}
	binary.LittleEndian.PutUint32(nextOf(room, ktls.Receiving), 1)
	if k := l.keys(1, ktls.Receiving); k.next != nil {
		t.Error("the next sending key is the next receiving key")
	}
	copy(l.mem, good)
	for i := range pieceHeader + nextHeader + 48 {
		l.piece(1)[i] ^= 0x21
		is("a piece that is damaged", tx, nil)
	}
	for gen, want := range map[uint32][]byte{0: nil, 2: nil} { // what is no successor of the present one
		b, _ := l.record(1, 7)
		l.release(1)
		binary.LittleEndian.PutUint32(b[1:], gen)
		n, err := l.fillPiece(7, b, func() {})
		if err != nil {
			t.Fatal(err)
		}
		binary.LittleEndian.PutUint32(nextOf(room, ktls.Sending), n)
		is("generations that do not follow each other", want, nil)
	}
	for i := range keyPlace {
		keyOf(room, ktls.Receiving)[i] ^= 0x21
		if k := l.keys(1, ktls.Receiving); k.current != nil {
			t.Errorf("byte %d of a key damaged: %+v", i, k)
		}
		copy(l.mem, good)
	}
}

// Facts may take the room of keys where there are none, and then are not taken for keys.
func TestFactsAreNoKeys(t *testing.T) {
	l, _ := newLedger(t, 1)
	secret := bytes.Repeat([]byte{9}, 32)
	forged := make([]byte, keyPlace)
	encodeKey(forged, 5, secret)
	// A client chooses its SNI.
	f := facts{Pool: "p", Facts: bytes.Repeat(forged, 6)}
	if err := l.putFacts(0, &f); err != nil {
		t.Fatal(err)
	}
	l.put(0, entry{ID: 7, Phase: slotOwned, Software: true})
	for _, d := range []ktls.Direction{ktls.Sending, ktls.Receiving} {
		if k := l.keys(0, d); k.current != nil || k.next != nil || l.changing(0, d) {
			t.Errorf("%s: %+v", d, k)
		}
	}
	if err := l.initKeys(0, secret, secret); err == nil {
		t.Error("keys were written over facts")
	}
	l.complete(0, ktls.Sending, 5)
	l.abort(0, ktls.Sending)
	l.sweep()
	if got, err := l.facts(0, nil); err != nil || !bytes.Equal(got.Facts, f.Facts) {
		t.Errorf("the facts are others: %v", err)
	}
	f.Base = []byte("base")
	if err := l.putFacts(0, &f); err == nil {
		t.Error("facts were written over the room of keys")
	}
}

// What a session that never got an entry left behind is gone when the next supervisor has
// looked, and so is what was left while a slot was freed.
func TestKeysOfNoSession(t *testing.T) {
	l, tx, _, next, _ := changingKeys(t)
	kept := bytes.Clone(l.mem)
	l.free(1)
	freed := bytes.Clone(l.slot(1)[:factsOff])
	if bytes.Contains(l.mem, tx) || bytes.Contains(l.mem, next) {
		t.Error("a freed slot keeps secrets")
	}
	copy(l.mem, kept)
	copy(l.slot(1), freed) // killed before the wiping
	after := ledgerOn(bytes.Clone(l.mem), 2)
	after.sweep()
	if bytes.Contains(after.mem, tx) || bytes.Contains(after.mem, next) {
		t.Error("killed before the wiping, and the next supervisor leaves secrets")
	}
	l, _ = newLedger(t, 2)
	if err := l.initKeys(1, tx, next); err != nil {
		t.Fatal(err)
	}
	after = ledgerOn(bytes.Clone(l.mem), 2)
	after.sweep()
	if bytes.Contains(after.mem, tx) || bytes.Contains(after.mem, next) {
		t.Error("killed before the first entry, and the next supervisor leaves secrets")
	}
}
