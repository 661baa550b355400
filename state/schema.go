package state

import (
	"errors"
	"fmt"
	"slices"
)

// ErrSchema reports an envelope of another schema than the one it was decoded as.
var ErrSchema = errors.New("state of another schema")

// VersionError reports state of a version that this program cannot restore: newer
// than what it knows, or so old that a migration is missing.
type VersionError struct {
	Schema     string
	Have       uint32   // the version found in the envelope
	CanRestore []uint32 // ascending
}

func (e *VersionError) Error() string {
	why := "a migration from that version is missing in this program"
	if len(e.CanRestore) > 0 && e.Have > e.CanRestore[len(e.CanRestore)-1] {
		why = "it was written by a newer program"
	}
	return fmt.Sprintf("state %q has version %d, this program restores %s: %s; run a program that restores version %d",
		e.Schema, e.Have, versions(e.CanRestore), why, e.Have)
}

// Schema encodes and decodes state of type T under a name and a version. Raise the
// version with every change to what T encodes to, and register with
// [Schema.Migrate] how the previous version becomes the new one.
//
// NewSchema and Migrate belong into package initialisation: after that a Schema may
// be used by any number of goroutines at once.
type Schema[T any] struct {
	name    string
	version uint32
	encode  func(T) ([]byte, error)
	decode  func([]byte) (T, error)
	steps   map[uint32]func([]byte) ([]byte, error)
}

// Option changes how a [Schema] works.
type Option[T any] func(*Schema[T])

// WithCodec replaces the CBOR codec. decode gets bytes of the current version only,
// and must not keep them nor panic, whatever they are.
func WithCodec[T any](encode func(T) ([]byte, error), decode func([]byte) (T, error)) Option[T] {
	return func(s *Schema[T]) { s.encode, s.decode = encode, decode }
}

// NewSchema returns a schema that writes the given version. The name is 1 to 64
// bytes out of a-z, 0-9, '.', '/' and '-'; versions start at 1. It panics on
// anything else, which is a mistake in the program.
//
// By default T is encoded as CBOR; give its fields integer keys, `cbor:"1,keyasint"`,
// so that they can be renamed. A field that the reader's T does not know is an
// error, not dropped: without a new version nobody would notice the loss. Strings
// and times come back exactly as they were. An encoding may have 2^20 elements in an
// array or map and 32 levels of nesting; Encode refuses what Decode would refuse.
func NewSchema[T any](name string, version uint32, opts ...Option[T]) *Schema[T] {
	if err := checkName(name); err != nil {
		panic("state.NewSchema: " + err.Error())
	}
	if version == 0 {
		panic(fmt.Sprintf("state.NewSchema(%q): versions start at 1", name))
	}
	s := &Schema[T]{
		name:    name,
		version: version,
		encode:  encodeCBOR[T],
		decode:  decodeCBOR[T],
		steps:   make(map[uint32]func([]byte) ([]byte, error)),
	}
	for _, o := range opts {
		o(s)
	}
	if s.encode == nil || s.decode == nil {
		panic(fmt.Sprintf("state.NewSchema(%q): a codec needs both directions", name))
	}
	return s
}

// Migrate registers how a payload of version from becomes one of version from+1. fn
// must not keep or change its argument, and decides on the payload alone; an error
// (or a panic, which Decode turns into an error) leaves the session where it was.
// Migrate panics when there is such a step already or when from is not below the
// version the schema writes: both are mistakes in the program.
func (s *Schema[T]) Migrate(from uint32, fn func(payload []byte) ([]byte, error)) {
	switch {
	case fn == nil:
		panic(fmt.Sprintf("state: schema %q: migration from version %d is nil", s.name, from))
	case from == 0 || from >= s.version:
		panic(fmt.Sprintf("state: schema %q writes version %d: a migration from version %d leads nowhere", s.name, s.version, from))
	case s.steps[from] != nil:
		panic(fmt.Sprintf("state: schema %q: two migrations from version %d", s.name, from))
	}
	s.steps[from] = fn
}

// Encode returns v in an encoded envelope.
func (s *Schema[T]) Encode(v T) ([]byte, error) {
	payload, err := s.encode(v)
	if err != nil {
		return nil, fmt.Errorf("encode state %q version %d: %w", s.name, s.version, err)
	}
	return Envelope{Schema: s.name, Version: s.version, Payload: payload}.MarshalBinary()
}

// Decode reads an encoded envelope of this schema, written by this version or an
// older one, and brings it up to date. Its errors are those of [Parse], ErrSchema,
// a *VersionError, or that of a migration or the codec.
func (s *Schema[T]) Decode(b []byte) (T, error) {
	var zero T
	e, err := Parse(b)
	if err != nil {
		return zero, fmt.Errorf("decode state %q: %w", s.name, err)
	}
	if e.Schema != s.name {
		return zero, fmt.Errorf("%w: expected %q, got %q", ErrSchema, s.name, e.Schema)
	}
	if can := s.Info().Restores; !slices.Contains(can, e.Version) {
		return zero, &VersionError{Schema: s.name, Have: e.Version, CanRestore: can}
	}
	payload := e.Payload
	for v := e.Version; v < s.version; v++ {
		if payload, err = s.migrate(v, payload); err != nil {
			return zero, fmt.Errorf("migrate state %q from version %d to %d: %w", s.name, v, v+1, err)
		}
	}
	v, err := s.decode(payload)
	if err != nil {
		from := ""
		if e.Version != s.version {
			from = fmt.Sprintf(", migrated from version %d", e.Version)
		}
		return zero, fmt.Errorf("decode state %q version %d%s: %w", s.name, s.version, from, err)
	}
	return v, nil
}

// migrate runs one step. A step that was written for well-formed state and panics on
// something else must not take down the process, which owns other sessions too.
func (s *Schema[T]) migrate(from uint32, payload []byte) (out []byte, err error) {
	defer func() {
		if r := recover(); r != nil {
			out, err = nil, fmt.Errorf("the migration panicked: %v", r)
		}
	}()
	out, err = s.steps[from](payload)
	if err != nil {
		return nil, err
	}
	return out, checkSize(s.name, out)
}

// Info returns what this schema writes and restores.
func (s *Schema[T]) Info() Info {
	oldest := s.version
	for oldest > 1 && s.steps[oldest-1] != nil {
		oldest--
	}
	restores := make([]uint32, 0, s.version-oldest+1)
	for v := oldest; v < s.version; v++ {
		restores = append(restores, v)
	}
	return Info{Name: s.name, Writes: s.version, Restores: append(restores, s.version)}
}

func encodeCBOR[T any](v T) ([]byte, error) {
	b, err := encMode.Marshal(v)
	if err != nil {
		return nil, err
	}
	// Refuse now what Decode would refuse when it is too late to keep the session where
	// it is: too many elements, too much nesting.
	if len(b) <= MaxPayload {
		if err := payloadMode.Wellformed(b); err != nil {
			return nil, err
		}
	}
	return b, nil
}

func decodeCBOR[T any](b []byte) (T, error) {
	var v T
	err := payloadMode.Unmarshal(b, &v)
	return v, err
}
