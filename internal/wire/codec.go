package wire

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/fxamacker/cbor/v2"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// ErrProtocol is wrapped by every error that a message from the other side
// caused; the channel it came from is not to be trusted any further.
var ErrProtocol = errors.New("control channel protocol error")

var (
	encMode = mustEnc(cbor.EncOptions{Sort: cbor.SortNone, IndefLength: cbor.IndefLengthForbidden})
	decMode = mustDec(cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		IndefLength:       cbor.IndefLengthForbidden,
		MaxNestedLevels:   8,
		MaxArrayElements:  1024,
		MaxMapPairs:       64,
		TagsMd:            cbor.TagsForbidden,
		UTF8:              cbor.UTF8RejectInvalid,
		ExtraReturnErrors: cbor.ExtraDecErrorNone, // unknown keys of a later version are skipped
	})
)

func mustEnc(o cbor.EncOptions) cbor.EncMode {
	m, err := o.EncMode()
	if err != nil {
		panic(err) // constant options; fails in every test or never
	}
	return m
}

func mustDec(o cbor.DecOptions) cbor.DecMode {
	m, err := o.DecMode()
	if err != nil {
		panic(err) // constant options; fails in every test or never
	}
	return m
}

// Encode encodes one message for Channel.Send. It fails when the message breaks a
// limit of this package.
func Encode(m *Message) ([]byte, error) {
	b, err := encMode.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("%s: encode: %w", m.Type, err)
	}
	if len(b) > sys.MaxPacket {
		return nil, fmt.Errorf("%s: message of %d bytes, the limit is %d", m.Type, len(b), sys.MaxPacket)
	}
	return b, nil
}

// Decode decodes and checks one message; every error wraps ErrProtocol.
func Decode(b []byte) (*Message, error) {
	if len(b) > sys.MaxPacket {
		return nil, fmt.Errorf("%w: message of %d bytes, the limit is %d", ErrProtocol, len(b), sys.MaxPacket)
	}
	m := decodeMessage(b)
	if m == nil {
		m = new(Message)
		if err := decMode.Unmarshal(b, m); err != nil {
			return nil, fmt.Errorf("%w: message of %d bytes is not valid CBOR of this protocol: %w", ErrProtocol, len(b), err)
		}
	}
	if err := m.check(); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrProtocol, m.Type, err)
	}
	return m, nil
}

// decodeFirst decodes the message at the start of b, nil when there is none.
func decodeFirst(b []byte) *Message {
	m := new(Message)
	rest, err := decMode.UnmarshalFirst(b, m)
	if err != nil || len(rest) == len(b) || m.check() != nil {
		return nil
	}
	return m
}

// check holds a message against the limits. Numbers that name things (ids,
// epochs) are checked by whoever knows the things.
func (m *Message) check() error {
	if _, ok := typeNames[m.Type]; !ok {
		return fmt.Errorf("unknown message type %d", m.Type)
	}
	for _, n := range []int{len(m.Items), len(m.Blobs), len(m.Refs), len(m.Refused), len(m.Closed), len(m.Held), len(m.Rekeys)} {
		if n > MaxItems {
			return fmt.Errorf("%d entries, the limit is %d", n, MaxItems)
		}
	}
	if len(m.Group) > MaxGroup || len(m.Text) > MaxText {
		return errors.New("a text is too long")
	}
	for i := range m.Items {
		it := &m.Items[i]
		switch {
		case it.ID == 0:
			return errors.New("session id 0")
		case len(it.Group) > MaxGroup:
			return errors.New("a group's name is too long")
		case it.WithSocket && m.Type != TypeParked:
			return errors.New("a socket comes back in PARKED only")
		case it.Cargo.Size() > MaxInline:
			return fmt.Errorf("cargo of %d bytes in the message, the limit is %d", it.Cargo.Size(), MaxInline)
		case it.Large && it.Cargo.Size() > 0:
			return errors.New("cargo both in the message and in a memory file")
		}
	}
	for i := range m.Blobs {
		b := &m.Blobs[i]
		if b.Group == "" || len(b.Group) > MaxGroup || len(b.Data) > MaxInline || b.Large && len(b.Data) > 0 {
			return errors.New("malformed group state")
		}
	}
	for i := range m.Refused {
		if len(m.Refused[i].Why) > MaxText {
			return errors.New("a text is too long")
		}
	}
	for i := range m.Closed {
		if len(m.Closed[i].Text) > MaxText || m.Closed[i].Reason == 0 || m.Closed[i].Reason > reasonMax {
			return errors.New("malformed end of a session")
		}
	}
	for i := range m.Held {
		h := &m.Held[i]
		if len(h.Group) > MaxGroup || h.Phase == 0 || h.Phase > PhaseClosed {
			return errors.New("malformed inventory")
		}
	}
	for i := range m.Rekeys {
		r := &m.Rekeys[i]
		if r.ID == 0 || len(r.Failed) > MaxText || len(r.Record) > MaxHandshakeRecord {
			return errors.New("malformed change of keys")
		}
	}
	return m.checkBody()
}

func (m *Message) checkBody() error {
	switch m.Type {
	case TypeHello:
		if m.Hello == nil {
			return errors.New("no body")
		}
		if len(m.Hello.Schemas) > MaxSchemas || len(m.Hello.Name) > MaxText {
			return errors.New("too many schemas, or a name too long")
		}
		for i := range m.Hello.Schemas {
			s := &m.Hello.Schemas[i]
			if s.Name == "" || len(s.Name) > MaxGroup || len(s.Restores) > 256 {
				return errors.New("malformed schema")
			}
		}
	case TypeWelcome:
		if m.Welcome == nil {
			return errors.New("no body")
		}
		if m.Welcome.Arena > MaxArena {
			return fmt.Errorf("arena of %d bytes, the limit is %d", m.Welcome.Arena, MaxArena)
		}
	case TypeCheckpoint:
		if len(m.Refs) != 1 || m.Group == "" || len(m.Blobs) != 1 || m.Blobs[0].Group != m.Group {
			return errors.New("malformed state of a group")
		}
	case TypeGroup, TypeGrouped:
		if len(m.Refs) != 1 {
			return errors.New("names no session")
		}
	default:
	}
	return nil
}

// Clip makes s fit the protocol's rules for texts: valid UTF-8, at most MaxText
// bytes, cut at a rune's boundary.
func Clip(s string) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) <= MaxText {
		return s
	}
	s = s[:MaxText]
	for len(s) > 0 && !utf8.ValidString(s) {
		s = s[:len(s)-1]
	}
	return s
}
