package ktls

import (
	"math"
	"unicode/utf8"
)

// Facts and records in the form in which we write them, without reflection: every
// session that moves is encoded once and decoded twice, and the general decoder takes
// longer for that than the kernel does for the socket. Whatever is not in this form (an
// unknown key, another order, certificates) is left to the general decoder: what the two
// take is the same, and so is what they make of it.

// encode appends r; it gives what cbor.Marshal gives.
func (r *record) encode(b []byte) []byte {
	start := len(b)
	b = append(b, 0xb8, 0) // a map; the number of pairs comes at the end
	n := byte(0)
	num := func(key byte, v uint64) {
		if v != 0 {
			n++
			b = cborUint(cborUint(b, 0, uint64(key)), 0, v)
		}
	}
	str := func(key byte, v []byte) {
		if len(v) > 0 {
			n++
			b = append(cborUint(cborUint(b, 0, uint64(key)), 2, uint64(len(v))), v...)
		}
	}
	dir := func(key byte, k *keys) {
		if k != nil {
			n++
			b = k.encode(cborUint(b, 0, uint64(key)))
		}
	}
	n = 3
	b = cborInt(append(b, 1), r.V)
	b = append(cborBytesHead(append(b, 2), r.ID), r.ID...)
	b = cborUint(append(b, 3), 0, uint64(r.Layer))
	dir(4, r.TX)
	dir(5, r.RX)
	str(6, r.Raw)
	str(7, r.Plain)
	str(8, r.Sealed)
	str(9, r.Ctl)
	num(10, uint64(r.CtlTyp))
	str(11, r.Unread)
	str(12, r.Queued)
	str(13, r.Hand)
	num(14, uint64(r.RXEnd))
	num(15, uint64(r.TXEnd))
	num(16, uint64(r.Owed))
	num(17, uint64(r.Asked))
	num(18, r.RXUsed)
	num(19, r.TXUsed)
	num(20, r.RXGen)
	num(21, r.TXGen)
	num(22, uint64(r.Empties))
	num(23, uint64(r.Warnings))
	num(24, uint64(r.Handshakes))
	num(25, r.Wire)
	num(26, r.WireSeq)
	if n < 24 { // the short form
		b = append(b[:start+1], b[start+2:]...)
		b[start] = 0xa0 | n
	} else {
		b[start+1] = n
	}
	return b
}

func (k *keys) encode(b []byte) []byte {
	at, n := len(b), byte(0)
	b = append(b, 0)
	for i, v := range [][]byte{k.Secret, k.Key, k.IV} {
		if len(v) > 0 {
			n++
			b = append(cborUint(append(b, byte(i+1)), 2, uint64(len(v))), v...)
		}
	}
	for i, v := range []uint64{k.Seq, k.Gen} {
		if v != 0 {
			n++
			b = cborUint(append(b, byte(i+4)), 0, v)
		}
	}
	b[at] = 0xa0 | n
	return b
}

// size is not less than what encode appends.
func (r *record) size() int {
	n := 256 + len(r.ID) + len(r.Raw) + len(r.Plain) + len(r.Sealed) + len(r.Ctl) + len(r.Unread) + len(r.Queued) + len(r.Hand)
	for _, k := range []*keys{r.TX, r.RX} {
		if k != nil {
			n += 48 + len(k.Secret) + len(k.Key) + len(k.IV)
		}
	}
	return n
}

// cborUint appends the head of a value (RFC 8949 section 3) in its shortest form.
func cborUint(b []byte, major byte, v uint64) []byte {
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

func cborInt(b []byte, v int) []byte {
	if v < 0 {
		return cborUint(b, 1, uint64(-1-v))
	}
	return cborUint(b, 0, uint64(v))
}

// cborBytesHead is the head of v, or null, as the general encoder has it.
func cborBytesHead(b, v []byte) []byte {
	if v == nil {
		return append(b, 0xf6)
	}
	return cborUint(b, 2, uint64(len(v)))
}

// reader takes values from the front of an encoding. bad is set, for good, by the first
// that is not what was asked for.
type reader struct {
	b   []byte
	bad bool
}

// head reads a head in the shortest form, so that nothing can be written in two ways.
func (r *reader) head(major byte) uint64 {
	if len(r.b) == 0 || r.b[0]>>5 != major {
		r.bad = true
		return 0
	}
	info := r.b[0] & 31
	if info < 24 {
		r.b = r.b[1:]
		return uint64(info)
	}
	n := 1 << (info - 24)
	if info > 27 || len(r.b) < 1+n {
		r.bad = true
		return 0
	}
	var v uint64
	for _, c := range r.b[1 : 1+n] {
		v = v<<8 | uint64(c)
	}
	r.b = r.b[1+n:]
	return v
}

// uint reads a number up to limit.
func (r *reader) uint(limit uint64) uint64 {
	v := r.head(0)
	r.bad = r.bad || v > limit
	return v
}

// take reads a string; it is a part of the input.
func (r *reader) take(major byte) []byte {
	n := r.head(major)
	if r.bad || n > uint64(len(r.b)) {
		r.bad = true
		return nil
	}
	v := r.b[:n:n]
	r.b = r.b[n:]
	return v
}

func (r *reader) bytes() []byte { return append([]byte{}, r.take(2)...) }

func (r *reader) text() string {
	v := r.take(3)
	r.bad = r.bad || !utf8.Valid(v)
	return string(v)
}

func (r *reader) bool() bool {
	if r.bad || len(r.b) == 0 || r.b[0] != 0xf4 && r.b[0] != 0xf5 {
		r.bad = true
		return false
	}
	v := r.b[0] == 0xf5
	r.b = r.b[1:]
	return v
}

// pairs calls f with every key of a map, which must rise.
func (r *reader) pairs(f func(key uint64)) {
	last := int64(-1)
	for n := r.head(5); n > 0 && !r.bad; n-- {
		key := r.uint(math.MaxInt32)
		if r.bad = r.bad || int64(key) <= last; r.bad {
			return
		}
		last = int64(key)
		f(key)
	}
}

// decode fills an empty r; false means that b is for the general decoder, and r is of no
// use.
func (r *record) decode(b []byte) bool {
	in := reader{b: b}
	in.pairs(func(key uint64) {
		switch key {
		case 1:
			r.V = int(in.uint(math.MaxInt32))
		case 2:
			r.ID = in.bytes()
		case 3:
			r.Layer = Layer(in.uint(math.MaxUint8))
		case 4:
			r.TX = in.keys()
		case 5:
			r.RX = in.keys()
		case 6:
			r.Raw = in.bytes()
		case 7:
			r.Plain = in.bytes()
		case 8:
			r.Sealed = in.bytes()
		case 9:
			r.Ctl = in.bytes()
		case 10:
			r.CtlTyp = recordType(in.uint(math.MaxUint8))
		case 11:
			r.Unread = in.bytes()
		case 12:
			r.Queued = in.bytes()
		case 13:
			r.Hand = in.bytes()
		case 14:
			r.RXEnd = ending(in.uint(math.MaxUint8))
		case 15:
			r.TXEnd = ending(in.uint(math.MaxUint8))
		case 16:
			r.Owed = uint32(in.uint(math.MaxUint32))
		case 17:
			r.Asked = uint32(in.uint(math.MaxUint32))
		case 18:
			r.RXUsed = in.uint(math.MaxUint64)
		case 19:
			r.TXUsed = in.uint(math.MaxUint64)
		case 20:
			r.RXGen = in.uint(math.MaxUint64)
		case 21:
			r.TXGen = in.uint(math.MaxUint64)
		case 22:
			r.Empties = uint8(in.uint(math.MaxUint8))
		case 23:
			r.Warnings = uint8(in.uint(math.MaxUint8))
		case 24:
			r.Handshakes = uint8(in.uint(math.MaxUint8))
		case 25:
			r.Wire = in.uint(math.MaxUint64)
		case 26:
			r.WireSeq = in.uint(math.MaxUint64)
		default:
			in.bad = true
		}
	})
	if in.bad || len(in.b) > 0 {
		r.TX.wipe()
		r.RX.wipe()
		return false
	}
	return true
}

func (r *reader) keys() *keys {
	k := new(keys)
	r.pairs(func(key uint64) {
		switch key {
		case 1:
			k.Secret = r.bytes()
		case 2:
			k.Key = r.bytes()
		case 3:
			k.IV = r.bytes()
		case 4:
			k.Seq = r.uint(math.MaxUint64)
		case 5:
			k.Gen = r.uint(math.MaxUint64)
		default:
			r.bad = true
		}
	})
	return k
}

// decode is that of facts without certificates and what belongs to them.
func (f *facts) decode(b []byte) bool {
	in := reader{b: b}
	in.pairs(func(key uint64) {
		switch key {
		case 1:
			f.V = int(in.uint(math.MaxInt32))
		case 2:
			f.ID = in.bytes()
		case 3:
			f.Version = uint16(in.uint(math.MaxUint16))
		case 4:
			f.Suite = uint16(in.uint(math.MaxUint16))
		case 5:
			f.Client = in.bool()
		case 6:
			f.Layer = Layer(in.uint(math.MaxUint8))
		case 7:
			f.Reason = in.text()
		case 8:
			f.ServerName = in.text()
		case 9:
			f.Protocol = in.text()
		case 10:
			f.Resumed = in.bool()
		case 11:
			f.Curve = uint16(in.uint(math.MaxUint16))
		case 12:
			f.ECH = in.bool()
		case 13:
			f.HRR = in.bool()
		case 20:
			f.Local = in.text()
		case 21:
			f.Remote = in.text()
		default:
			in.bad = true
		}
	})
	return !in.bad && len(in.b) == 0
}
