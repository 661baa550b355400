// Package plaincbor reads and writes CBOR (RFC 8949) in the one form in which this
// project writes it, without reflection: maps with rising unsigned keys, definite
// lengths, heads in their shortest form. Encodings that are used for every session that
// moves are read with it first; what is in another form is left to a general decoder,
// which decides whether it is wrong. So it may refuse anything, and must take nothing
// that the general decoder would not take in the same way.
package plaincbor

import (
	"math"
	"unicode/utf8"
)

// Major types.
const (
	Uint  = 0
	Bytes = 2
	Text  = 3
	Array = 4
	Map   = 5
)

// AppendHead appends the head of a value in its shortest form: v is the number, the length
// or the count.
func AppendHead(b []byte, major byte, v uint64) []byte {
	major <<= 5
	switch {
	case v < 24:
		return append(b, major|byte(v))
	case v <= math.MaxUint8:
		return append(b, major|24, byte(v))
	case v <= math.MaxUint16:
		return append(b, major|25, byte(v>>8), byte(v))
	case v <= math.MaxUint32:
		return append(b, major|26, byte(v>>24), byte(v>>16), byte(v>>8), byte(v))
	}
	return append(b, major|27, byte(v>>56), byte(v>>48), byte(v>>40), byte(v>>32), byte(v>>24), byte(v>>16), byte(v>>8), byte(v))
}

// AppendUint appends a number.
func AppendUint(b []byte, v uint64) []byte { return AppendHead(b, Uint, v) }

// AppendBytes appends a byte string.
func AppendBytes(b, v []byte) []byte { return append(AppendHead(b, Bytes, uint64(len(v))), v...) }

// AppendText appends a text, which must be valid UTF-8.
func AppendText(b []byte, v string) []byte { return append(AppendHead(b, Text, uint64(len(v))), v...) }

// AppendTrue appends true; false is never written, its key is left out.
func AppendTrue(b []byte) []byte { return append(b, 0xf5) }

// Reader takes values from the front of an encoding. Bad is set, for good, by the first
// that is not what was asked for; what methods return is of no use then.
type Reader struct {
	b   []byte
	Bad bool
}

// NewReader reads b, which it keeps.
func NewReader(b []byte) Reader { return Reader{b: b} }

// Done reports that everything was read and all of it was good.
func (r *Reader) Done() bool { return !r.Bad && len(r.b) == 0 }

func (r *Reader) head(major byte) uint64 {
	if r.Bad || len(r.b) == 0 || r.b[0]>>5 != major {
		r.Bad = true
		return 0
	}
	info := r.b[0] & 31
	if info < 24 {
		r.b = r.b[1:]
		return uint64(info)
	}
	n := 1 << (info - 24)
	if info > 27 || len(r.b) < 1+n {
		r.Bad = true
		return 0
	}
	var v uint64
	for _, c := range r.b[1 : 1+n] {
		v = v<<8 | uint64(c)
	}
	r.b = r.b[1+n:]
	return v
}

// Uint reads a number up to limit.
func (r *Reader) Uint(limit uint64) uint64 {
	v := r.head(Uint)
	r.Bad = r.Bad || v > limit
	return v
}

// Array reads the head of an array of at most limit elements.
func (r *Reader) Array(limit int) int {
	n := r.head(Array)
	if r.Bad || n > uint64(limit) {
		r.Bad = true
		return 0
	}
	return int(n)
}

// Part reads a byte string; it is a part of the input.
func (r *Reader) Part() []byte { return r.part(Bytes) }

func (r *Reader) part(major byte) []byte {
	n := r.head(major)
	if r.Bad || n > uint64(len(r.b)) {
		r.Bad = true
		return nil
	}
	v := r.b[:n:n]
	r.b = r.b[n:]
	return v
}

// Bytes reads a byte string into memory of its own; it is never nil.
func (r *Reader) Bytes() []byte { return append([]byte{}, r.Part()...) }

// Text reads a text.
func (r *Reader) Text() string {
	v := r.part(Text)
	r.Bad = r.Bad || !utf8.Valid(v)
	return string(v)
}

// Bool reads true or false.
func (r *Reader) Bool() bool {
	if r.Bad || len(r.b) == 0 || r.b[0] != 0xf4 && r.b[0] != 0xf5 {
		r.Bad = true
		return false
	}
	v := r.b[0] == 0xf5
	r.b = r.b[1:]
	return v
}

// Map calls f with every key of a map of at most 64 pairs; f reads the value. Keys rise,
// so none comes twice.
func (r *Reader) Map(f func(key uint64)) {
	n := r.head(Map)
	if n > 64 {
		r.Bad = true
	}
	last := int64(-1)
	for ; n > 0 && !r.Bad; n-- {
		key := r.Uint(math.MaxInt32)
		if r.Bad = r.Bad || int64(key) <= last; r.Bad {
			return
		}
		last = int64(key)
		f(key)
	}
}

// Skip passes a number, a string, true or false.
func (r *Reader) Skip() {
	if r.Bad || len(r.b) == 0 {
		r.Bad = true
		return
	}
	switch major := r.b[0] >> 5; major {
	case Uint:
		r.head(Uint)
	case Bytes, Text:
		r.part(major)
	default:
		r.Bool()
	}
}
