package wire

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/fxamacker/cbor/v2"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

var update = flag.Bool("update", false, "write the golden files anew")

// samples has one message of every type, with every field it uses.
func samples() []*Message {
	r := Ref{ID: 7, Epoch: NewEpoch(2, 9)}
	refs := []Ref{r, {ID: 1<<64 - 1, Epoch: NewEpoch(2, 10)}}
	item := Item{Ref: r, Cargo: Cargo{Facts: []byte("facts"), Record: []byte("record"), App: []byte("app")}, Group: "lobby", Flags: FlagRestored | FlagInterrupted}
	large := Item{Ref: r, Large: true}
	blobs := []Blob{{Group: "lobby", Data: []byte("state")}, {Group: "attic", Large: true}}
	return []*Message{
		{Type: TypeHello, Hello: &Hello{Min: 1, Max: 1, PID: 4711, Name: "chat 2.1", Schemas: []Schema{{Name: "chat/member", Writes: 2, Restores: []uint32{1, 2}}}}},
		{Type: TypeWelcome, Welcome: &Welcome{Version: 1, Worker: 3, Pool: "chat", Generation: 5, FreezeTimeout: 5000}},
		{Type: TypeReady},
		{Type: TypeAdopt, Items: []Item{item, large}, Blobs: blobs, Group: "lobby", Last: true},
		{Type: TypeAdopted, Refs: refs},
		{Type: TypeRefused, Refused: []Refused{{Ref: r, Why: "full"}}},
		{Type: TypeFreeze, Refs: refs, Group: "lobby", Last: true},
		{Type: TypeParked, Items: []Item{item, large}, Blobs: blobs, Group: "lobby", Last: true},
		{Type: TypeThaw, Refs: refs},
		{Type: TypeResume, Refs: refs, Group: "lobby", Last: true},
		{Type: TypeRelease, Refs: refs},
		{Type: TypeAbort, Refs: refs},
		{Type: TypeClosed, Closed: []Closed{{Ref: r, Reason: ReasonPeer, Text: "EOF"}}},
		{Type: TypeClosedAck, Refs: refs},
		{Type: TypeClose, Refs: refs},
		{Type: TypeInventory, Nonce: 1 << 40},
		{Type: TypeInventoryReply, Nonce: 1 << 40, Last: true, Held: []Held{
			{Ref: r, Phase: PhaseParked, Attempt: NewEpoch(2, 11), Group: "lobby"}, {Ref: r, Phase: PhaseClosed, Reason: ReasonLayer}}},
		{Type: TypeGroup, Refs: refs[:1], Group: "lobby"},
		{Type: TypeGrouped, Refs: refs[:1], Group: "lobby", Text: "full"},
		{Type: TypeStop, Millis: 10_000, Drain: true, Text: "upgrade"},
		{Type: TypePing, Nonce: 5},
		{Type: TypePong, Nonce: 5, Text: "no database"},
		{Type: TypePong, Nonce: 6, Exposed: 3},
		{Type: TypeKeyUpdate, Rekeys: []Rekey{{Ref: r, Count: 3, Request: true}}},
		{Type: TypeRekeyed, Rekeys: []Rekey{{Ref: r, Count: 3}, {Ref: r, Count: 4, Failed: "no such key"}}},
		{Type: TypeWantUpdate, Rekeys: []Rekey{{Ref: r, Request: true}}},
		{Type: TypePause, Rekeys: []Rekey{{Ref: r}}},
		{Type: TypePaused, Rekeys: []Rekey{{Ref: r}, {Ref: r, Failed: "closed"}}},
		{Type: TypeSend, Rekeys: []Rekey{{Ref: r, Record: []byte{24, 0, 0, 1, 0}}}},
		{Type: TypeSent, Rekeys: []Rekey{{Ref: r}, {Ref: r, Failed: "no room"}}},
		{Type: TypeContinue, Rekeys: []Rekey{{Ref: r}}},
		{Type: TypeUpdate, Rekeys: []Rekey{{Ref: r, Request: true}}},
		{Type: TypeBegin},
		{Type: TypeSettled},
		{Type: TypeKeys, Items: []Item{{Ref: r, Cargo: Cargo{Record: []byte("secrets")}}}},
		{Type: TypeHello, Hello: &Hello{Min: 1, Max: 1, PID: 4711, Able: AbleMarks | AbleSockets}},
		{Type: TypeWelcome, Welcome: &Welcome{Version: 1, Worker: 3, Pool: "chat", Keeper: 4710}},
		{Type: TypeParked, Items: []Item{{Ref: r, WithSocket: true}}},
		{Type: TypeMarks},
		{Type: TypeHello, Hello: &Hello{Min: 1, Max: 1, PID: 4711, Rekey: true, Able: AbleMarks | AbleArena}},
		{Type: TypeWelcome, Welcome: &Welcome{Version: 1, Worker: 3, Pool: "chat", Generation: 5, FreezeTimeout: 5000, Arena: 256 << 20}},
		{Type: TypeWelcome, Welcome: &Welcome{Version: 1, Worker: 3, Pool: "chat", Generation: 5, FreezeTimeout: 5000, Groups: true}},
		{Type: TypeCheckpoint, Nonce: 4, Group: "room", Refs: []Ref{r}, Blobs: []Blob{{Group: "room", Data: []byte("state")}}},
		{Type: TypeCheckpointed, Nonce: 4},
		{Type: TypeCheckpointed, Nonce: 5, Text: "no"},
	}
}

// The encoding is what workers of other programs and releases rely on: it may grow,
// the golden lines may not change.
func TestGolden(t *testing.T) {
	var b strings.Builder
	seen := map[Type]bool{}
	for _, m := range samples() {
		seen[m.Type] = true
		enc, err := Encode(m)
		if err != nil {
			t.Fatal(err)
		}
		diag, err := cbor.Diagnose(enc)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "%s\n  %s\n  %s\n", m.Type, diag, hex.EncodeToString(enc))
		got, err := Decode(enc)
		if err != nil {
			t.Errorf("%s: %v", m.Type, err)
		} else if !reflect.DeepEqual(got, m) {
			t.Errorf("%s came back as %+v, want %+v", m.Type, got, m)
		}
	}
	for typ, name := range typeNames {
		if !seen[typ] {
			t.Errorf("no sample of %s", name)
		}
	}
	file := filepath.Join("testdata", "messages.golden")
	if *update {
		if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(want) {
		t.Errorf("the encoding changed; got\n%s", b.String())
	}
}

// raw encodes what Encode would not.
func raw(t *testing.T, v any) []byte {
	t.Helper()
	b, err := cbor.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestDecodeRefuses(t *testing.T) {
	type m map[int]any
	ref := m{1: 7, 2: 9}
	long := strings.Repeat("x", MaxText+1)
	many := make([]any, MaxItems+1)
	for i := range many {
		many[i] = ref
	}
	for name, v := range map[string]any{
		"no map":                       []int{1},
		"no type":                      m{},
		"unknown type":                 m{0: 200},
		"type out of range":            m{0: 300},
		"text for a number":            m{0: "FREEZE"},
		"too many refs":                m{0: 7, 5: many},
		"too many items":               m{0: 8, 3: many},
		"HELLO without body":           m{0: 1},
		"HELLO with a long name":       m{0: 1, 1: m{4: long}},
		"HELLO with too many schemas":  m{0: 1, 1: m{5: make([]m, MaxSchemas+1)}},
		"schema without name":          m{0: 1, 1: m{5: []m{{1: ""}}}},
		"schema with too many":         m{0: 1, 1: m{5: []m{{1: "x", 3: make([]int, 257)}}}},
		"WELCOME without body":         m{0: 2},
		"session id 0":                 m{0: 8, 3: []m{{1: 0, 2: 1}}},
		"negative id":                  m{0: 7, 5: []m{{1: -1, 2: 1}}},
		"id too large":                 m{0: 7, 5: []m{{1: 1e30, 2: 1}}},
		"long group":                   m{0: 7, 11: long[:MaxGroup+1]},
		"item with a long group":       m{0: 8, 3: []m{{1: 1, 4: long[:MaxGroup+1]}}},
		"long text":                    m{0: 20, 12: long},
		"cargo too large for a packet": m{0: 8, 3: []m{{1: 1, 3: m{3: make([]byte, MaxInline+1)}}}},
		"cargo in two places":          m{0: 8, 3: []m{{1: 1, 6: true, 3: m{3: []byte("x")}}}},
		"blob without group":           m{0: 8, 4: []m{{2: []byte("x")}}},
		"blob too large":               m{0: 8, 4: []m{{1: "g", 2: make([]byte, MaxInline+1)}}},
		"blob in two places":           m{0: 8, 4: []m{{1: "g", 2: []byte("x"), 3: true}}},
		"reason 0":                     m{0: 13, 7: []m{{1: 1, 2: 1}}},
		"unknown reason":               m{0: 13, 7: []m{{1: 1, 2: 1, 3: uint8(reasonMax) + 1}}},
		"long reason":                  m{0: 13, 7: []m{{1: 1, 2: 1, 3: 1, 4: long}}},
		"long refusal":                 m{0: 6, 6: []m{{1: 1, 2: 1, 3: long}}},
		"phase 0":                      m{0: 17, 8: []m{{1: 1, 2: 1}}},
		"unknown phase":                m{0: 17, 8: []m{{1: 1, 2: 1, 3: 6}}},
		"GROUP of nobody":              m{0: 18, 11: "x"},
		"GROUP of two":                 m{0: 18, 11: "x", 5: []m{ref, ref}},
		"a tag":                        m{0: 3, 12: cbor.Tag{Number: 0, Content: "2020-01-01T00:00:00Z"}},
	} {
		b := raw(t, v)
		if got, err := Decode(b); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %+v, error %v; want ErrProtocol", name, got, err)
		}
	}
	ok := raw(t, m{0: 3})
	for name, b := range map[string][]byte{
		"nothing":             {},
		"cut off":             ok[:len(ok)-1],
		"something after it":  append(bytes.Clone(ok), 0),
		"a key twice":         {0xa2, 0, 3, 0, 3},
		"indefinite length":   {0xbf, 0, 3, 0xff},
		"text not UTF-8":      {0xa2, 0, 20, 12, 0x61, 0xff},
		"larger than packets": raw(t, m{0: 3, 63: make([]byte, sys.MaxPacket)}), // of a key that would be skipped
		"nested":              append(append([]byte{0xa2, 0, 3, 0x18, 99}, bytes.Repeat([]byte{0x81}, 20)...), 0),
	} {
		if got, err := Decode(b); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %+v, error %v; want ErrProtocol", name, got, err)
		}
	}
}

// What a later version adds is skipped.
func TestUnknownKeys(t *testing.T) {
	b := raw(t, map[int]any{0: 7, 5: []any{map[int]any{1: 7, 2: 9, 77: "new"}}, 63: map[int]int{1: 2}})
	m, err := Decode(b)
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Refs) != 1 || m.Refs[0] != (Ref{ID: 7, Epoch: 9}) {
		t.Errorf("%+v", m)
	}
}

func TestClip(t *testing.T) {
	for in, want := range map[string]int{
		"short":                        5,
		strings.Repeat("x", 600):       MaxText,
		strings.Repeat("ä", 300):       MaxText,
		"x" + strings.Repeat("ä", 300): MaxText - 1,
		"bad \xff byte":                len("bad \uFFFD byte"),
	} {
		got := Clip(in)
		if len(got) != want || !utf8.ValidString(got) {
			t.Errorf("%.20q clipped to %d bytes (%.20q), want %d", in, len(got), got, want)
		}
	}
}

// Batches of the largest items and names fit into messages.
func TestBatchesFit(t *testing.T) {
	for _, size := range []int{0, 1, 700, 1500, MaxInline - 1, MaxInline, MaxInline + 1} {
		items := make([]Item, 500)
		for i := range items {
			items[i] = Item{Ref: Ref{ID: 1<<64 - 1 - uint64(i), Epoch: 1<<64 - 1}, Group: strings.Repeat("g", MaxGroup), Flags: 3,
				Cargo: Cargo{Facts: make([]byte, size/3), Record: make([]byte, size/3), App: make([]byte, size-2*(size/3))}}
		}
		next := 0
		for _, part := range BatchItems(items) {
			if len(part) == 0 || len(part) > MaxItems || 2*len(part)+1 > sys.MaxFDs {
				t.Fatalf("%d items in a batch", len(part))
			}
			m := &Message{Type: TypeAdopt, Group: strings.Repeat("g", MaxGroup), Last: true,
				Blobs: []Blob{{Group: strings.Repeat("g", MaxGroup), Data: make([]byte, MaxInline)}}}
			for _, it := range part {
				if it.ID != 1<<64-1-uint64(next) {
					t.Fatalf("item %d is %d", next, it.ID)
				}
				next++
				if it.Cargo.Size() > MaxInline {
					it.Cargo, it.Large = Cargo{}, true
				}
				m.Items = append(m.Items, it)
			}
			b, err := Encode(m)
			if err != nil {
				t.Fatalf("cargo of %d bytes: %v", size, err)
			}
			if _, err := Decode(b); err != nil {
				t.Fatalf("cargo of %d bytes: %v", size, err)
			}
		}
		if next != len(items) {
			t.Errorf("%d items in batches, want %d", next, len(items))
		}
	}
	n := 0
	for _, part := range BatchRefs(make([]Ref, 3*MaxItems+1)) {
		n += len(part)
		if len(part) > MaxItems {
			t.Errorf("%d refs in a batch", len(part))
		}
	}
	if n != 3*MaxItems+1 {
		t.Errorf("%d refs in batches", n)
	}
}

// Whatever Decode takes, Encode can say again, and it means the same.
func FuzzDecode(f *testing.F) {
	for _, m := range samples() {
		b, err := Encode(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := Decode(b)
		if err != nil {
			if !errors.Is(err, ErrProtocol) || m != nil {
				t.Fatalf("%v, message %v", err, m)
			}
			return
		}
		again, err := Encode(m)
		if err != nil {
			if len(b) < sys.MaxPacket/4 {
				t.Fatal(err)
			}
			return // CBOR has shorter forms than ours for some texts; at the limit that shows
		}
		m2, err := Decode(again)
		if err != nil {
			t.Fatalf("%v\n%x\n%x", err, b, again)
		}
		third, err := Encode(m2)
		if err != nil || !bytes.Equal(again, third) {
			t.Fatalf("not stable: %v\n%x\n%x", err, again, third)
		}
		if first := decodeFirst(append(bytes.Clone(b), 0xff, 0xff)); first == nil || first.Type != m.Type {
			t.Fatal("decodeFirst does not find it")
		}
	})
}
