package state

import (
	"errors"
	"flag"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var update = flag.Bool("update", false, "write golden files that do not exist yet; existing ones are never changed")

// A schema in the three versions a program could have gone through.
type (
	sessionV1 struct {
		Nick string `cbor:"1,keyasint"`
		Room string `cbor:"2,keyasint"`
	}
	sessionV2 struct {
		Nick  string   `cbor:"1,keyasint"`
		Rooms []string `cbor:"3,keyasint"`
		Half  string   `cbor:"4,keyasint"`
	}
	sessionV3 struct {
		Nick  string    `cbor:"1,keyasint"`
		Rooms []string  `cbor:"3,keyasint"`
		Half  []byte    `cbor:"5,keyasint"`
		Since time.Time `cbor:"6,keyasint"`
	}
)

var joined = time.Date(2026, 2, 3, 4, 5, 6, 789, time.UTC)

func schemaV1() *Schema[sessionV1] { return NewSchema[sessionV1]("chat/session", 1) }

func oneToTwo(b []byte) ([]byte, error) {
	old, err := decodeCBOR[sessionV1](b)
	if err != nil {
		return nil, err
	}
	if old.Room == "" {
		return nil, errors.New("no room")
	}
	return encodeCBOR(sessionV2{Nick: old.Nick, Rooms: []string{old.Room}})
}

func schemaV2() *Schema[sessionV2] {
	s := NewSchema[sessionV2]("chat/session", 2)
	s.Migrate(1, oneToTwo)
	return s
}

func schemaV3() *Schema[sessionV3] {
	s := NewSchema[sessionV3]("chat/session", 3)
	s.Migrate(1, oneToTwo)
	s.Migrate(2, func(b []byte) ([]byte, error) {
		old, err := decodeCBOR[sessionV2](b)
		if err != nil {
			return nil, err
		}
		return encodeCBOR(sessionV3{Nick: old.Nick, Rooms: old.Rooms, Half: []byte(old.Half), Since: joined})
	})
	return s
}

func encode[T any](t *testing.T, s *Schema[T], v T) []byte {
	t.Helper()
	b, err := s.Encode(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// golden returns what was once written, so that every later version of this package
// is held to it.
func golden(t *testing.T, name string, fresh []byte) []byte {
	t.Helper()
	path := filepath.Join("testdata", name)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && *update {
		if err := os.WriteFile(path, fresh, 0o644); err != nil {
			t.Fatal(err)
		}
		return fresh
	}
	if err != nil {
		t.Fatalf("%v (go test -update writes missing golden files)", err)
	}
	if d := cmp.Diff(b, fresh); d != "" {
		t.Errorf("%s: this program writes something else than it once did (-then +now):\n%s", path, d)
	}
	return b
}

func TestOldEncodingsAreRestoredForEver(t *testing.T) {
	half := "half a r\xc3" // cut in the middle of a rune
	files := map[string][]byte{
		"session-v1.cbor": encode(t, schemaV1(), sessionV1{Nick: "ada", Room: "lobby"}),
		"session-v2.cbor": encode(t, schemaV2(), sessionV2{Nick: "ada", Rooms: []string{"lobby", "go"}, Half: half}),
		"session-v3.cbor": encode(t, schemaV3(), sessionV3{Nick: "ada", Rooms: []string{"lobby"}, Half: []byte(half), Since: joined}),
	}
	want := map[string]sessionV3{
		"session-v1.cbor": {Nick: "ada", Rooms: []string{"lobby"}, Half: []byte{}, Since: joined},
		"session-v2.cbor": {Nick: "ada", Rooms: []string{"lobby", "go"}, Half: []byte(half), Since: joined},
		"session-v3.cbor": {Nick: "ada", Rooms: []string{"lobby"}, Half: []byte(half), Since: joined},
	}
	for name, fresh := range files {
		t.Run(name, func(t *testing.T) {
			got, err := schemaV3().Decode(golden(t, name, fresh))
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(want[name], got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestVersionsThatCannotBeRestored(t *testing.T) {
	noFirstStep := NewSchema[sessionV3]("chat/session", 3)
	noFirstStep.Migrate(2, func(b []byte) ([]byte, error) { return b, nil })

	for _, tt := range []struct {
		name   string
		decode func() error
		want   *VersionError
		says   string
	}{
		{"a newer program wrote it", func() error {
			_, err := schemaV2().Decode(encode(t, schemaV3(), sessionV3{}))
			return err
		}, &VersionError{"chat/session", 3, []uint32{1, 2}},
			`state "chat/session" has version 3, this program restores versions 1, 2: it was written by a newer program; run a program that restores version 3`},
		{"a step is missing", func() error {
			_, err := noFirstStep.Decode(encode(t, schemaV1(), sessionV1{}))
			return err
		}, &VersionError{"chat/session", 1, []uint32{2, 3}},
			`state "chat/session" has version 1, this program restores versions 2, 3: a migration from that version is missing in this program; run a program that restores version 1`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got *VersionError
			if err := tt.decode(); !errors.As(err, &got) {
				t.Fatalf("got %v, want a *VersionError", err)
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Error(d)
			}
			if got.Error() != tt.says {
				t.Errorf("got  %s\nwant %s", got.Error(), tt.says)
			}
		})
	}
}

func TestDecodeErrors(t *testing.T) {
	panics := NewSchema[sessionV2]("chat/session", 2)
	panics.Migrate(1, func(b []byte) ([]byte, error) { return b[len(b):][1:], nil })
	grows := NewSchema[sessionV2]("chat/session", 2)
	grows.Migrate(1, func([]byte) ([]byte, error) { return make([]byte, MaxPayload+1), nil })
	type lessFields struct {
		Nick string `cbor:"1,keyasint"`
	}

	v1 := encode(t, schemaV1(), sessionV1{Nick: "ada", Room: "lobby"})
	raw := func(payload string) []byte {
		return mustMarshal(t, Envelope{Schema: "chat/session", Version: 1, Payload: []byte(payload)})
	}
	decode := func(f func([]byte) error, b []byte) error { return f(b) }
	d1 := func(b []byte) error { _, err := schemaV1().Decode(b); return err }
	d2 := func(b []byte) error { _, err := schemaV2().Decode(b); return err }

	for _, tt := range []struct {
		name string
		err  error
		is   error
		says string
	}{
		{"damaged", decode(d1, v1[:len(v1)-1]), ErrChecksum, `decode state "chat/session"`},
		{"another schema", decode(d1, mustMarshal(t, Envelope{Schema: "mail/session", Version: 1})), ErrSchema, `expected "chat/session", got "mail/session"`},
		{"migration fails", decode(d2, encode(t, schemaV1(), sessionV1{})), nil, "from version 1 to 2: no room"},
		{"migration panics", func() error { _, err := panics.Decode(v1); return err }(), nil, "from version 1 to 2: the migration panicked"},
		{"migration grows", func() error { _, err := grows.Decode(v1); return err }(), ErrTooLarge, "from version 1 to 2"},
		{"field that the reader does not know", func() error {
			_, err := NewSchema[lessFields]("chat/session", 1).Decode(v1)
			return err
		}(), nil, `decode state "chat/session" version 1`},
		{"empty payload", decode(d1, raw("")), nil, `decode state "chat/session" version 1`},
		{"payload of another type", decode(d1, raw("\x82\x01\x02")), nil, `decode state "chat/session" version 1`},
		{"bytes after the payload", decode(d1, raw("\xa0\x00")), nil, `decode state "chat/session" version 1`},
		{"array of 2^60 elements", decode(d1, raw("\xa1\x01\x9b\x10\x00\x00\x00\x00\x00\x00\x00")), nil, `decode state "chat/session" version 1`},
		{"deep nesting", decode(d1, raw("\xa1\x01"+strings.Repeat("\x81", 10_000)+"\x00")), nil, `decode state "chat/session" version 1`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.err == nil {
				t.Fatal("decoded without an error")
			}
			if tt.is != nil && !errors.Is(tt.err, tt.is) {
				t.Errorf("got %v, want %v", tt.err, tt.is)
			}
			if !strings.Contains(tt.err.Error(), tt.says) {
				t.Errorf("got %q, want it to say %q", tt.err, tt.says)
			}
		})
	}
}

func TestEncodeRefusesWhatDecodeWouldRefuse(t *testing.T) {
	if _, err := NewSchema[[]byte]("a", 1).Encode(make([]byte, MaxPayload)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("16 MiB and its head: %v", err)
	}
	if _, err := NewSchema[[]bool]("a", 1).Encode(make([]bool, 1<<20+1)); err == nil {
		t.Error("2^20+1 elements were encoded")
	}
	if _, err := NewSchema[[]bool]("a", 1).Encode(make([]bool, 1<<20)); err != nil {
		t.Errorf("2^20 elements: %v", err)
	}
	type nested struct{ Inner *nested }
	deep := &nested{}
	for range 40 {
		deep = &nested{Inner: deep}
	}
	if _, err := NewSchema[*nested]("a", 1).Encode(deep); err == nil {
		t.Error("41 levels were encoded")
	}
	if _, err := NewSchema[chan int]("a", 1).Encode(make(chan int)); err == nil {
		t.Error("a channel was encoded")
	}
}

func TestValuesComeBackAsTheyWere(t *testing.T) {
	type all struct {
		S    string
		Time time.Time
		F    float64
		Nil  []int
		None []int
		Map  map[string]int64
		P    *int
		Any  any
	}
	n := -5
	in := all{S: "\xff\xfe", Time: joined, F: math.Inf(-1), None: []int{}, Map: map[string]int64{"": math.MinInt64}, P: &n, Any: "x"}
	s := NewSchema[all]("all", 1)
	got, err := s.Decode(encode(t, s, in))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(in, got); d != "" {
		t.Error(d)
	}
}

func TestCustomCodec(t *testing.T) {
	s := NewSchema("text", 1, WithCodec(
		func(v string) ([]byte, error) { return []byte("text:" + v), nil },
		func(b []byte) (string, error) {
			v, ok := strings.CutPrefix(string(b), "text:")
			if !ok {
				return "", errors.New("no text")
			}
			return v, nil
		}))
	if got, err := s.Decode(encode(t, s, "ada")); err != nil || got != "ada" {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := s.Decode(mustMarshal(t, Envelope{Schema: "text", Version: 1})); err == nil {
		t.Error("the codec's error is lost")
	}
}

func TestMistakesInTheProgramPanic(t *testing.T) {
	step := func(b []byte) ([]byte, error) { return b, nil }
	for name, f := range map[string]func(){
		"bad name":         func() { NewSchema[int]("Chat", 1) },
		"version 0":        func() { NewSchema[int]("chat", 0) },
		"half a codec":     func() { NewSchema("chat", 1, WithCodec[int](nil, nil)) },
		"step to nowhere":  func() { schemaV2().Migrate(2, step) },
		"step from 0":      func() { schemaV2().Migrate(0, step) },
		"the same twice":   func() { schemaV2().Migrate(1, step) },
		"no function":      func() { NewSchema[int]("chat", 2).Migrate(1, nil) },
		"step from future": func() { schemaV2().Migrate(9, step) },
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("no panic")
				}
			}()
			f()
		})
	}
}

func TestCompatible(t *testing.T) {
	v1, v2, v3 := schemaV1().Info(), schemaV2().Info(), schemaV3().Info()
	room := Info{Name: "chat/room", Writes: 4, Restores: []uint32{2, 3, 4}}
	infos := func(i ...Info) []Info { return i }
	const end = "; build the new generation with the migrations that are missing, or drain the old one instead of moving its sessions"
	for _, tt := range []struct {
		name         string
		older, newer []Info
		want         string // "" for compatible
	}{
		{"same", infos(v2, room), infos(room, v2), ""},
		{"forward", infos(v1), infos(v3), ""},
		{"nothing written", nil, infos(v1), ""},
		{"new schema in the new one", infos(v1), infos(v1, room), ""},
		{"restores in two entries", infos(v1), infos(Info{Name: v1.Name, Writes: 9}, v1), ""},
		{"back", infos(v3), infos(v2),
			`the new generation cannot restore what the old one writes: schema "chat/session" has version 3, it restores versions 1, 2` + end},
		{"two problems", infos(v3, room), infos(v1),
			`the new generation cannot restore what the old one writes: schema "chat/room" (version 4) is unknown to it; schema "chat/session" has version 3, it restores version 1` + end},
		{"ranges, unordered and repeated", infos(Info{Name: "a", Writes: 9}), infos(Info{Name: "a", Writes: 7, Restores: []uint32{7, 6, 5, 1, 1, 3}}),
			`the new generation cannot restore what the old one writes: schema "a" has version 9, it restores versions 1, 3, 5 to 7` + end},
		{"version 0", infos(Info{Name: "a"}), infos(Info{Name: "a", Restores: []uint32{0}}),
			`the new generation cannot restore what the old one writes: schema "a" has version 0, it restores version 0` + end},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := Compatible(tt.older, tt.newer)
			if tt.want == "" {
				if err != nil {
					t.Errorf("refused: %v", err)
				}
				return
			}
			var inc *IncompatibleError
			if !errors.As(err, &inc) {
				t.Fatalf("got %v, want an *IncompatibleError", err)
			}
			if err.Error() != tt.want {
				t.Errorf("got  %s\nwant %s", err, tt.want)
			}
		})
	}
}

// What Info promises is what Decode does, for every version, with gaps in the steps.
func TestInfoTellsWhatDecodeRestores(t *testing.T) {
	gap := NewSchema[sessionV2]("chat/session", 6)
	for _, from := range []uint32{1, 2, 4, 5} {
		gap.Migrate(from, func(b []byte) ([]byte, error) { return b, nil })
	}
	info := gap.Info()
	if d := cmp.Diff(Info{Name: "chat/session", Writes: 6, Restores: []uint32{4, 5, 6}}, info); d != "" {
		t.Error(d)
	}
	var can []uint32
	for v := uint32(1); v < 9; v++ {
		b := mustMarshal(t, Envelope{Schema: "chat/session", Version: v, Payload: []byte{0xa0}})
		if _, err := gap.Decode(b); err == nil {
			can = append(can, v)
		}
	}
	if d := cmp.Diff(info.Restores, can, cmpopts.EquateEmpty()); d != "" {
		t.Error(d)
	}
}
