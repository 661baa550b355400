package supervise

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// Names of groups. Few sessions are in a group, and a group has many of them, so a name
// stands once, behind the pieces, and the entries of the sessions have its number:
//
//	+-----+--------+------+
//	| crc | length | name |
//	+-----+--------+------+
//
// It is filled before the first entry that has its number is written, and wiped after the
// last one went: as with pieces, the next supervisor wipes what no entry has. The entry
// before the newest one of a slot may have a number that is another name's by now, so
// nobody asks for its group; should it be needed because the newest one is damaged, 16
// bits of the name's checksum in it tell.
const (
	nameSize   = nameHeader + wire.MaxGroup
	nameHeader = 8
)

func namesOff(slots int) int { return piecesOff(slots) + pieceCount(slots)*pieceSize }

// nameCount is enough for a group of each session, and the one that takes the place of
// another.
func nameCount(slots int) int { return slots + 2 }

// nameRef is what an entry has of a name. The zero value is that of no group.
type nameRef struct {
	n     uint32
	check uint16
}

type names struct {
	area
	known   map[string]nameRef
	members map[uint32]int // how many slots have the number in their newest entry
}

// join returns the reference of a name for one more entry.
func (s *names) join(name string) nameRef {
	if name == "" {
		return nameRef{}
	}
	r, ok := s.known[name]
	if !ok {
		if len(name) > wire.MaxGroup {
			return nameRef{} // the wire has the same limit
		}
		n, free := s.take()
		if !free {
			return nameRef{} // there is a place for each session
		}
		r = fillName(s.at(n), n, name)
	}
	s.found(r, name)
	return r
}

// found notes that an entry has a name.
func (s *names) found(r nameRef, name string) {
	if s.known == nil {
		s.known, s.members = map[string]nameRef{}, map[uint32]int{}
	}
	s.known[name] = r
	s.members[r.n]++
}

func fillName(b []byte, n uint32, name string) nameRef {
	binary.LittleEndian.PutUint32(b[4:], uint32(len(name)))
	copy(b[nameHeader:], name)
	sum := crc32.Checksum(b[4:nameHeader+len(name)], crcTable)
	binary.LittleEndian.PutUint32(b, sum)
	return nameRef{n: n, check: uint16(sum)}
}

// leave is the contrary of join: an entry is not the newest one any more.
func (s *names) leave(r nameRef) {
	if s.members[r.n] == 0 {
		return // no group
	}
	if s.members[r.n]--; s.members[r.n] > 0 {
		return
	}
	delete(s.members, r.n)
	if name, ok := s.read(r); ok && s.known[name] == r {
		delete(s.known, name)
	}
	s.release(r.n)
}

// read returns the name of a reference.
func (s *names) read(r nameRef) (name string, ok bool) {
	if r.n == 0 {
		return "", r == nameRef{}
	}
	b := s.at(r.n)
	sum, n := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])
	if n == 0 || n > wire.MaxGroup || uint16(sum) != r.check || crc32.Checksum(b[4:nameHeader+n], crcTable) != sum {
		return "", false
	}
	return string(b[nameHeader : nameHeader+n]), true
}
