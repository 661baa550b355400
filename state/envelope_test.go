package state

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func mustMarshal(t testing.TB, e Envelope) []byte {
	t.Helper()
	b, err := e.MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// resum puts the right checksum at the end of bytes that were changed on purpose,
// as a hostile writer would.
func resum(b []byte) []byte {
	body := len(b) - sumSize
	return append(bytes.Clone(b[:body]), checksum(b[:body])...)
}

func TestEnvelopeRoundTrip(t *testing.T) {
	for _, e := range []Envelope{
		{Schema: "a", Version: 1, Payload: []byte{}},
		{Schema: "chat/session", Version: 7, Payload: []byte("nick and room")},
		{Schema: strings.Repeat("x", MaxName), Version: math.MaxUint32, Payload: bytes.Repeat([]byte{0xff}, 70_000)},
	} {
		b := mustMarshal(t, e)
		got, err := Parse(b)
		if err != nil {
			t.Fatalf("%s: %v", e.Schema, err)
		}
		if d := cmp.Diff(e, got); d != "" {
			t.Error(d)
		}
		clear(b)
		if !bytes.Equal(got.Payload, e.Payload) {
			t.Error("the parsed payload aliases the input")
		}
	}
	if b := mustMarshal(t, Envelope{Schema: "a", Version: 1}); !bytes.Equal(b, mustMarshal(t, Envelope{Schema: "a", Version: 1, Payload: []byte{}})) {
		t.Error("a nil payload is not encoded like an empty one")
	}
}

func TestLargestEnvelope(t *testing.T) {
	e := Envelope{Schema: strings.Repeat("x", MaxName), Version: math.MaxUint32, Payload: make([]byte, MaxPayload)}
	b := mustMarshal(t, e)
	if len(b) > MaxEncoded {
		t.Fatalf("%d bytes, MaxEncoded says %d", len(b), MaxEncoded)
	}
	if _, err := Parse(b); err != nil {
		t.Fatal(err)
	}
	e.Payload = append(e.Payload, 0)
	if _, err := e.MarshalBinary(); !errors.Is(err, ErrTooLarge) {
		t.Errorf("payload of one byte too many: %v", err)
	}
	if _, err := Parse(make([]byte, MaxEncoded+1)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("input of one byte too many: %v", err)
	}
}

func TestEveryChangedBitIsNoticed(t *testing.T) {
	b := mustMarshal(t, Envelope{Schema: "chat/session", Version: 2, Payload: []byte("hello, world")})
	for i := range b {
		for bit := range 8 {
			c := bytes.Clone(b)
			c[i] ^= 1 << bit
			if _, err := Parse(c); !errors.Is(err, ErrChecksum) && !(i == 0 && errors.Is(err, ErrFormat)) {
				t.Errorf("byte %d bit %d changed: %v", i, bit, err)
			}
		}
	}
	for n := range b {
		if _, err := Parse(b[:n]); !errors.Is(err, ErrChecksum) && !(n == 0 && errors.Is(err, ErrFormat)) {
			t.Errorf("cut to %d bytes: %v", n, err)
		}
	}
}

func TestRefusedEnvelopes(t *testing.T) {
	sum := "\x04\x48" + strings.Repeat("\x00", sumSize)
	for name, in := range map[string]string{
		"text":                     "a4 is not an envelope",
		"another map":              "\xa3\x01\x61a\x02\x01" + sum,
		"five entries":             "\xa5\x01\x61a\x02\x01\x03\x40\x05\x00" + sum,
		"unknown key":              "\xa4\x01\x61a\x02\x01\x05\x40" + sum,
		"key twice":                "\xa4\x01\x61a\x01\x61a\x03\x40" + sum,
		"no payload but null":      "\xa4\x01\x61a\x02\x01\x03\xf6" + sum,
		"payload is text":          "\xa4\x01\x61a\x02\x01\x03\x60" + sum,
		"name is an integer":       "\xa4\x01\x01\x02\x01\x03\x40" + sum,
		"name is not UTF-8":        "\xa4\x01\x61\xff\x02\x01\x03\x40" + sum,
		"name is empty":            "\xa4\x01\x60\x02\x01\x03\x40" + sum,
		"name with a space":        "\xa4\x01\x61 \x02\x01\x03\x40" + sum,
		"name too long":            "\xa4\x01\x78\x41" + strings.Repeat("a", 65) + "\x02\x01\x03\x40" + sum,
		"version 0":                "\xa4\x01\x61a\x02\x00\x03\x40" + sum,
		"version is negative":      "\xa4\x01\x61a\x02\x20\x03\x40" + sum,
		"version above 32 bits":    "\xa4\x01\x61a\x02\x1b\x00\x00\x00\x01\x00\x00\x00\x00\x03\x40" + sum,
		"claims 2^63 payload":      "\xa4\x01\x61a\x02\x01\x03\x5b\x7f\xff\xff\xff\xff\xff\xff\xff" + sum,
		"indefinite length":        "\xa4\x01\x61a\x02\x01\x03\x5f\x41a\xff" + sum,
		"checksum inside payload":  "\xa4\x01\x61a\x02\x01\x04\x40\x03\x4a" + sum,
		"something after the last": "\xa4\x01\x61a\x02\x01\x03\x40" + sum + sum,
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse(resum([]byte(in)))
			if !errors.Is(err, ErrFormat) {
				t.Errorf("got %v, want ErrFormat", err)
			}
		})
	}
	for _, e := range []Envelope{
		{Schema: "", Version: 1},
		{Schema: "Chat", Version: 1},
		{Schema: strings.Repeat("x", MaxName+1), Version: 1},
		{Schema: "chat", Version: 0},
	} {
		if _, err := e.MarshalBinary(); !errors.Is(err, ErrFormat) {
			t.Errorf("MarshalBinary of %q version %d: %v", e.Schema, e.Version, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(mustMarshal(f, Envelope{Schema: "a", Version: 1}))
	f.Add(mustMarshal(f, Envelope{Schema: "chat/session", Version: 300, Payload: []byte("payload")}))
	f.Add([]byte("\xa4\x01\x61a\x02\x01\x03\x5b\x7f\xff\xff\xff\xff\xff\xff\xff"))
	f.Add([]byte{})
	schema := NewSchema[map[string]any]("a", 3)
	schema.Migrate(1, func(b []byte) ([]byte, error) { return b, nil })
	schema.Migrate(2, func(b []byte) ([]byte, error) { return b[1:], nil }) // panics on an empty payload
	f.Fuzz(func(t *testing.T, in []byte) {
		// Nearly every input fails the checksum; the second round gets past it.
		for _, b := range [][]byte{in, resum(append(bytes.Clone(in), "\x04\x4812345678"...))} {
			e, err := Parse(b)
			if err != nil {
				if !errors.Is(err, ErrFormat) && !errors.Is(err, ErrChecksum) && !errors.Is(err, ErrTooLarge) {
					t.Fatalf("untyped error: %v", err)
				}
				continue
			}
			again, err := Parse(mustMarshal(t, e))
			if err != nil {
				t.Fatalf("what was read cannot be written: %v", err)
			}
			if d := cmp.Diff(e, again); d != "" {
				t.Fatal(d)
			}
			e.Schema = "a"
			if v, err := schema.Decode(mustMarshal(t, e)); err == nil {
				_ = fmt.Sprint(v)
			}
		}
	})
}
