package supervise

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/fxamacker/cbor/v2"
)

// A supervisor that is killed at any store of a session's life leaves a ledger in which
// the record state that the newest entry names is whole, and nothing else: the next one
// finds no other, and gives away every other piece.
func TestPiecesAtEveryStore(t *testing.T) {
	for _, software := range []bool{true, false} {
		t.Run(fmt.Sprintf("software=%v", software), func(t *testing.T) {
			l, _ := newLedger(t, 2)
			e := entry{ID: 7, Software: software, Phase: slotParked}
			held := map[uint32]string{} // by piece, as it was written
			keep := func(what string) uint32 {
				n, err := l.keepRecord(e.ID, []byte(what))
				if err != nil {
					t.Fatal(err)
				}
				held[n] = what
				return n
			}
			secrets := []string{"of the handshake", "of the first owner", "of the second owner", "of nobody"}
			look := func(when string) {
				t.Helper()
				after, fd := newLedger(t, 2)
				copy(after.mem, l.mem)
				next, err := openLedger(fd)
				if err != nil {
					t.Fatal(err)
				}
				defer next.close()
				got, ok, _ := next.get(0)
				next.sweep()
				named := map[string]bool{}
				pieces := 0
				if n := got.Kept; ok && n != 0 {
					r, err := next.record(n, got.ID)
					if err != nil || string(r) != held[n] {
						t.Errorf("%s: the entry names %q: %v", when, r, err)
					}
					named[string(r)], pieces = true, 1
				}
				if ok && got.Phase != slotFree && !software { // the session has its base for life
					r, err := next.base(0)
					if err != nil || string(r) != secrets[0] {
						t.Errorf("%s: base %q: %v", when, r, err)
					}
					named[string(r)] = true
				}
				for _, s := range secrets {
					if bytes.Contains(next.mem, []byte(s)) != named[s] {
						t.Errorf("%s: record state %q, named %v", when, s, named[s])
					}
				}
				for range pieceCount(2) - 1 - pieces {
					if n, err := next.keepRecord(9, []byte("other")); err != nil || n == 0 || n == got.Kept {
						t.Fatalf("%s: piece %d, %v", when, n, err)
					}
				}
				if _, err := next.keepRecord(9, []byte("other")); err == nil {
					t.Errorf("%s: there are more pieces than there is memory for", when)
				}
			}
			if software {
				e.Kept = keep(secrets[0])
			} else if err := l.putFacts(0, &facts{Pool: "p", Base: []byte(secrets[0])}); err != nil {
				t.Fatal(err)
			}
			look("before the first entry")
			l.put(0, e)
			look("accepted")
			for i, s := range secrets[1:3] {
				e.Phase, e.Kept = slotOwned, 0
				l.put(0, e)
				look(fmt.Sprint("owned by ", i))
				if software && bytes.Contains(l.mem, []byte(secrets[i])) {
					t.Errorf("owner %d may go on, and the record state it was given is in the ledger", i)
				}
				e.Phase, e.Kept = slotParked, keep(s)
				look(fmt.Sprint("half parked by ", i))
				l.put(0, e)
				look(fmt.Sprint("parked by ", i))
			}
			e.Kept = keep(secrets[3]) // parked anew, without an owner between
			look("half parked anew")
			l.put(0, e)
			look("parked anew")
			l.end(0, endLost)
			look("ended")
			for _, s := range secrets {
				if bytes.Contains(l.mem, []byte(s)) {
					t.Errorf("ended, and record state %q is in the ledger", s)
				}
			}
		})
	}
}

// What is damaged or another session's is no record state.
func TestForeignPiece(t *testing.T) {
	l, _ := newLedger(t, 1)
	n, err := l.keepRecord(7, []byte("state"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		n  uint32
		id uint64
	}{{n, 8}, {0, 7}, {0, 0}, {n + 1, 7}, {1 << 23, 7}} {
		if r, err := l.record(c.n, c.id); err == nil {
			t.Errorf("piece %d of session %d: %q", c.n, c.id, r)
		}
	}
	for i := range pieceHeader + 5 {
		l.piece(n)[i] ^= 0x21
		if r, err := l.record(n, 7); err == nil {
			t.Errorf("byte %d changed: %q", i, r)
		}
		l.piece(n)[i] ^= 0x21
	}
	if r, err := l.record(n, 7); err != nil || string(r) != "state" {
		t.Errorf("%q, %v", r, err)
	}
}

// Numbers of pieces come back from an entry as they are, up to the most there can be.
func TestEntryNamesPieces(t *testing.T) {
	b := make([]byte, entrySize)
	want := stored{entry{Seq: 1<<64 - 1, ID: 1<<64 - 2, Epoch: 1<<64 - 3, Owner: 1<<64 - 4, Accepted: -5, Moves: 1<<32 - 6, Phase: 15, Software: true, Blamed: true,
		Flags: 255, Kept: 0xfedcba, RXBase: 1<<32 - 1, Owes: 255, Crashes: 254}, nameRef{n: 0xabcdef, check: 0x1234}}
	encodeEntry(b, want)
	if e := decodeEntry(b); e != want {
		t.Errorf("%+v", e)
	}
	if pieceCount(1<<20) > 1<<24 || nameCount(1<<20) > 1<<24 { // config's limit of max_sessions
		t.Error("more pieces than an entry can name")
	}
}

// The usual facts of a session fit its slot, and what is left out of them comes back.
func TestUsualFactsFitASlot(t *testing.T) {
	l, _ := newLedger(t, 1)
	want := facts{Pool: "a-name-of-a-pool", Peer: "[2001:db8:1:2:3:4:5:6]:65535", SNI: "a-rather-long-name.of-a-host.example.org", ALPN: "mqtt",
		Version: 0x304, Suite: 0x1301, Reason: "kernel TLS is not possible: the module tls is not loaded and cannot be"}
	var err error
	want.Facts, err = cbor.Marshal(map[int]any{1: 1, 2: make([]byte, 16), 3: want.Version, 4: want.Suite, 6: 2, 7: want.Reason, 8: want.SNI, 9: want.ALPN,
		11: 4588, 20: "[2001:db8:1:2:3:4:5:7]:65535", 21: want.Peer})
	if err != nil {
		t.Fatal(err)
	}
	software := want
	for name, big := range map[string][]byte{"in the slot": nil, "with the keeper": want.Facts, "kernel layer": nil} {
		if want = software; name == "kernel layer" {
			want.Reason, want.Base = "", bytes.Repeat([]byte{7}, 40) // as long as what ktls writes
			want.Facts, err = cbor.Marshal(map[int]any{1: 1, 2: make([]byte, 16), 3: want.Version, 4: want.Suite, 6: 1, 8: want.SNI, 9: want.ALPN,
				11: 4588, 20: "[2001:db8:1:2:3:4:5:7]:65535", 21: want.Peer})
			if err != nil {
				t.Fatal(err)
			}
		}
		put := l.putFacts
		if big != nil {
			put = l.putBigFacts
		}
		if err := put(0, &want); err != nil {
			t.Fatalf("%s: %d bytes: %v", name, len(want.Facts), err)
		}
		got, err := l.facts(0, big)
		if err != nil {
			t.Fatal(err)
		}
		if big == nil && !bytes.Equal(got.Facts, want.Facts) {
			t.Error("the facts are others")
		}
		if b, err := l.base(0); !bytes.Equal(b, want.Base) || (err == nil) != (len(want.Base) > 0) {
			t.Errorf("%s: record state of the handshake %x, %v", name, b, err)
		}
		got.Facts, got.Overflow = want.Facts, false
		if fmt.Sprint(*got) != fmt.Sprint(want) {
			t.Errorf("%s: %+v, want %+v", name, got, want)
		}
	}
}
