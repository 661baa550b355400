package supervise

import (
	"encoding/binary"
	"hash/crc32"
)

// ktlsFacts are the facts of a slot that travel with its session, without decoding the
// rest: every move needs them and none changes them. ok is false when they are not there
// in the form in which putFacts writes; facts says why.
func (l *ledger) ktlsFacts(i int) (b []byte, ok bool) {
	place := l.slot(i)[factsOff : factsOff+factsSize]
	n := int(binary.LittleEndian.Uint32(place[4:]))
	if n == 0 || n > len(place)-8 || crc32.Checksum(place[4:8+n], crcTable) != binary.LittleEndian.Uint32(place) {
		return nil, false
	}
	in := place[8 : 8+n]
	_, pairs, in, ok := cborHead(in, 5)
	for ; ok && pairs > 0; pairs-- {
		var key, size uint64
		if _, key, in, ok = cborHead(in, 0); !ok || len(in) == 0 {
			return nil, false
		}
		major := in[0] >> 5
		if _, size, in, ok = cborHead(in, major); !ok {
			return nil, false
		}
		switch major {
		case 0, 7: // a number, true or false
			continue
		case 2, 3:
			if size > uint64(len(in)) {
				return nil, false
			}
			if key == 2 {
				return append([]byte(nil), in[:size]...), true
			}
			in = in[size:]
		default:
			return nil, false
		}
	}
	return nil, false
}

// cborHead reads the head of a value of one major type (RFC 8949 section 3): its argument
// is a number, a length or a count.
func cborHead(b []byte, major byte) (_ byte, arg uint64, rest []byte, ok bool) {
	if len(b) == 0 || b[0]>>5 != major {
		return 0, 0, nil, false
	}
	info := b[0] & 31
	if info < 24 {
		return major, uint64(info), b[1:], true
	}
	n := 1 << (info - 24)
	if info > 27 || len(b) < 1+n {
		return 0, 0, nil, false
	}
	for _, c := range b[1 : 1+n] {
		arg = arg<<8 | uint64(c)
	}
	return major, arg, b[1+n:], true
}
