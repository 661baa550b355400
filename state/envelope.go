package state

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/fxamacker/cbor/v2"
)

const (
	// MaxPayload is the largest payload of an envelope, in bytes.
	MaxPayload = 16 << 20
	// MaxName is the longest schema name, in bytes.
	MaxName = 64

	// maxOverhead bounds what an envelope adds to its payload: map head 1, four keys
	// 4, name 2+64, version 5, payload head 5, checksum 1+8.
	maxOverhead = 90
	// MaxEncoded is the largest encoded envelope, in bytes.
	MaxEncoded = MaxPayload + maxOverhead
)

// Errors of [Parse] and [Envelope.MarshalBinary], for errors.Is.
var (
	// ErrFormat reports bytes that are no envelope, or an envelope with a schema name
	// or version that is not allowed.
	ErrFormat = errors.New("not a valid state envelope")
	// ErrChecksum reports an envelope that was cut off or changed on its way.
	ErrChecksum = errors.New("state envelope is damaged: its checksum does not match")
	// ErrTooLarge reports a payload above MaxPayload.
	ErrTooLarge = errors.New("state is too large")
)

// Envelope is state on its way between two processes. Its encoding is a CBOR map
// (RFC 8949) of definite length with these entries, the checksum last:
//
//	1: schema name, text string of 1 to 64 bytes out of a-z 0-9 . / -
//	2: version, unsigned integer from 1 to 2^32-1
//	3: payload, byte string of at most 16 MiB
//	4: checksum, byte string of 8 bytes
//
// The checksum is the first 8 bytes of the SHA-256 of every byte before them, the
// map head, the names and the versions included. It detects accidents and bugs, not
// an adversary, who could compute it too. SHA-256 was chosen over CRC-32C because
// the standard library of nearly every language has it, and because 64 bits leave
// nothing to chance over millions of moves; hashing a few KiB costs microseconds.
type Envelope struct {
	Schema  string
	Version uint32
	Payload []byte
}

const sumSize = 8

type wireEnvelope struct {
	Schema  string `cbor:"1,keyasint"`
	Version uint32 `cbor:"2,keyasint"`
	Payload []byte `cbor:"3,keyasint"`
	Sum     []byte `cbor:"4,keyasint"`
}

// sumHead is what stands before the checksum at the end of every envelope: key 4
// and the head of a byte string of 8 bytes.
var sumHead = []byte{0x04, 0x40 | sumSize}

func checksum(b []byte) []byte {
	sum := sha256.Sum256(b)
	return sum[:sumSize]
}

// MarshalBinary returns the encoded envelope. It fails with ErrFormat for a name or
// version that is not allowed, and with ErrTooLarge for a payload above MaxPayload.
func (e Envelope) MarshalBinary() ([]byte, error) {
	if err := e.check(); err != nil {
		return nil, err
	}
	w := wireEnvelope{Schema: e.Schema, Version: e.Version, Payload: e.Payload, Sum: make([]byte, sumSize)}
	if w.Payload == nil {
		w.Payload = []byte{} // nil would become CBOR null, which is no byte string
	}
	b, err := encMode.Marshal(w)
	if err != nil {
		return nil, fmt.Errorf("encode state %q: %w", e.Schema, err)
	}
	body := len(b) - sumSize
	copy(b[body:], checksum(b[:body]))
	return b, nil
}

// Parse reads one envelope, all of b. The result does not alias b. Its errors are
// ErrFormat, ErrChecksum or ErrTooLarge.
func Parse(b []byte) (Envelope, error) {
	if len(b) > MaxEncoded {
		return Envelope{}, fmt.Errorf("%w: %d bytes, the limit is %d", ErrTooLarge, len(b), MaxEncoded)
	}
	// A cut or changed envelope should be reported as such, so the first byte, which
	// tells an envelope from anything else, is looked at before the checksum, and
	// everything else after it.
	if len(b) == 0 || b[0] != 0xa4 {
		return Envelope{}, fmt.Errorf("%w: it does not start with a map of four entries", ErrFormat)
	}
	body := len(b) - sumSize
	if body < len(sumHead) || !bytes.Equal(checksum(b[:body]), b[body:]) {
		return Envelope{}, ErrChecksum
	}
	if !bytes.HasSuffix(b[:body], sumHead) {
		return Envelope{}, fmt.Errorf("%w: the checksum is not its last entry", ErrFormat)
	}
	var w wireEnvelope
	if err := envelopeMode.Unmarshal(b, &w); err != nil {
		return Envelope{}, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	if !bytes.Equal(w.Sum, b[body:]) {
		return Envelope{}, fmt.Errorf("%w: the checksum is not its last entry", ErrFormat)
	}
	if w.Payload == nil {
		return Envelope{}, fmt.Errorf("%w: it has no payload", ErrFormat)
	}
	e := Envelope{Schema: w.Schema, Version: w.Version, Payload: w.Payload}
	if err := e.check(); err != nil {
		return Envelope{}, err
	}
	return e, nil
}

func (e Envelope) check() error {
	if err := checkName(e.Schema); err != nil {
		return fmt.Errorf("%w: %w", ErrFormat, err)
	}
	if e.Version == 0 {
		return fmt.Errorf("%w: schema %q has version 0, versions start at 1", ErrFormat, e.Schema)
	}
	return checkSize(e.Schema, e.Payload)
}

func checkSize(schema string, payload []byte) error {
	if len(payload) > MaxPayload {
		return fmt.Errorf("%w: %q has %d bytes, the limit is %d; keep large data outside of the session",
			ErrTooLarge, schema, len(payload), MaxPayload)
	}
	return nil
}

func checkName(name string) error {
	if name == "" || len(name) > MaxName {
		return fmt.Errorf("a schema name has 1 to %d bytes, this one has %d", MaxName, len(name))
	}
	for i := range len(name) {
		switch c := name[i]; {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '.', c == '/', c == '-':
		default:
			return fmt.Errorf("schema name %q: only a-z, 0-9, '.', '/' and '-' are allowed", name)
		}
	}
	return nil
}

var encMode, envelopeMode, payloadMode = modes()

// modes returns the CBOR modes. Envelopes and payloads differ only in what a
// payload may hold; both refuse what an encoder of ours never writes.
func modes() (cbor.EncMode, cbor.DecMode, cbor.DecMode) {
	eo := cbor.CoreDetEncOptions()
	// The default for time.Time is whole seconds; state must come back as it was.
	eo.Time = cbor.TimeRFC3339Nano
	enc, err := eo.EncMode()
	if err != nil {
		panic(err) // constant options
	}
	do := cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		IndefLength:       cbor.IndefLengthForbidden,
		MaxNestedLevels:   32,
		MaxArrayElements:  1 << 20,
		MaxMapPairs:       1 << 20,
		ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
	}
	envelope, err := do.DecMode()
	if err != nil {
		panic(err)
	}
	// A Go string may hold a line of which only half has arrived, cut in the middle of
	// a rune. It is encoded, so it must be decoded too.
	do.UTF8 = cbor.UTF8DecodeInvalid
	payload, err := do.DecMode()
	if err != nil {
		panic(err)
	}
	return enc, envelope, payload
}
