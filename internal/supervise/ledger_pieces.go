package supervise

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/ktlsvisor/ktlsvisor/internal/fault"
)

// Behind the slots the ledger has pieces, for what is not of every session all the time:
// the record state while a session is parked, and in the kernel layer the next key while
// a key is changed.
//
//	+-----+--------+----+--------------------------+
//	| crc | length | id | record state or next key |
//	+-----+--------+----+--------------------------+
//
// A piece belongs to the session whose entry, or whose place for keys, names it. It is
// filled before that is written, and wiped after what does not name it any more: whoever
// is killed between the two leaves a piece that nobody names, and the next supervisor wipes
// it. Nothing is ever written over a piece that is named.
//
// The record state of a parked session is void from the entry with the next owner on,
// which is before RESUME is sent (I5).
const (
	pieceSize   = 512
	pieceHeader = 16
)

func piecesOff(slots int) int { return headerSize + slots*slotSize }

// pieceCount is enough for two pieces of every session, and the one that takes the
// place of another. The first one is never used: its number says that there is none.
func pieceCount(slots int) int { return 2*slots + 2 }

func (l *ledger) piece(n uint32) []byte { return l.pieces.at(n) }

// keepRecord puts a record state into a piece of its own. An entry is to name it.
func (l *ledger) keepRecord(id uint64, rec []byte) (uint32, error) {
	return l.fillPiece(id, rec, func() { fault.Step("half-record") })
}

// fillPiece puts data into a piece; before it is intact, half is called.
func (l *ledger) fillPiece(id uint64, data []byte, half func()) (uint32, error) {
	if len(data) > pieceSize-pieceHeader {
		return 0, fmt.Errorf("record state of %d bytes: %w", len(data), errTooLarge)
	}
	n, ok := l.pieces.take()
	if !ok {
		return 0, errors.New("the ledger has no piece left")
	}
	b := l.piece(n)
	binary.LittleEndian.PutUint32(b[4:], uint32(len(data)))
	binary.LittleEndian.PutUint64(b[8:], id)
	copy(b[pieceHeader:], data)
	half()
	binary.LittleEndian.PutUint32(b, crc32.Checksum(b[4:pieceHeader+len(data)], crcTable))
	return n, nil
}

// record returns what is in a piece, a copy that the caller wipes.
func (l *ledger) record(n uint32, id uint64) ([]byte, error) {
	b := l.piece(n)
	size := binary.LittleEndian.Uint32(b[4:])
	switch {
	case n == 0 || size == 0 || size > pieceSize-pieceHeader:
		return nil, errors.New("record state in the ledger: nothing there")
	case crc32.Checksum(b[4:pieceHeader+size], crcTable) != binary.LittleEndian.Uint32(b):
		return nil, errors.New("record state in the ledger: checksum does not match")
	case binary.LittleEndian.Uint64(b[8:]) != id:
		return nil, errors.New("record state in the ledger: it is another session's")
	}
	return append([]byte(nil), b[pieceHeader:pieceHeader+size]...), nil
}

// parked returns the record state of a session that nobody owns.
func (l *ledger) parked(i int, e entry) ([]byte, error) {
	if e.Kept == 0 && !e.Software {
		return l.base(i)
	}
	return l.record(e.Kept, e.ID)
}

// release wipes a piece that nothing names any more.
func (l *ledger) release(n uint32) { l.pieces.release(n) }

// sweep brings the ledger of an earlier supervisor in order, which may have been killed
// anywhere: it wipes what no session has, and finds out what is free. Nothing is written
// to the ledger before.
func (l *ledger) sweep() {
	pieces, places := l.pieces.unnamed(), l.names.unnamed()
	l.names.known, l.names.members = nil, nil
	for i := range l.used() {
		e, _, _ := l.entries(i)
		if e.Seq == 0 || e.Phase == slotFree {
			clear(l.slot(i)[factsOff:])
			continue
		}
		pieces.name(e.Kept)
		for _, n := range l.settleNext(i, e.ID) {
			pieces.name(n)
		}
		if group, ok := l.names.read(e.name); ok && group != "" {
			places.name(e.name.n)
			l.names.found(e.name, group)
		}
	}
	l.pieces.keep(pieces)
	l.names.keep(places)
}

// area is a part of the ledger with places of one size, which are numbered. The first one
// is never used.
type area struct {
	mem   []byte
	size  int
	high  []byte   // the cell in the header: how many may hold something, the first included
	spare []uint32 // used before, and free now
}

func areaOn(mem []byte, off, count, size, high int) area {
	return area{mem: mem[off : off+count*size], size: size, high: mem[high : high+4]}
}

func (a *area) count() uint32 { return uint32(len(a.mem) / a.size) }

// at is the place with a number; the first one if there is no such place.
func (a *area) at(n uint32) []byte {
	if n >= a.count() {
		n = 0
	}
	off := int(n) * a.size
	return a.mem[off : off+a.size : off+a.size]
}

func (a *area) used() uint32 {
	return max(1, min(binary.LittleEndian.Uint32(a.high), a.count()))
}

// take gives away a place that is free, and wiped.
func (a *area) take() (n uint32, ok bool) {
	if free := len(a.spare); free > 0 {
		n, a.spare = a.spare[free-1], a.spare[:free-1]
		return n, true
	}
	if n = a.used(); n >= a.count() {
		return 0, false
	}
	binary.LittleEndian.PutUint32(a.high, n+1)
	return n, true
}

func (a *area) release(n uint32) {
	if n == 0 || n >= a.used() {
		return
	}
	clear(a.at(n))
	a.spare = append(a.spare, n)
}

// inUse says of each place that may hold something whether anything names it.
type inUse []bool

func (a *area) unnamed() inUse { return make(inUse, a.used()) }

func (u inUse) name(n uint32) {
	if int(n) < len(u) {
		u[n] = true
	}
}

// keep wipes all places but those in use.
func (a *area) keep(u inUse) {
	a.spare = a.spare[:0]
	for n := len(u) - 1; n > 0; n-- { // the first ones are given away first
		if !u[n] {
			a.release(uint32(n))
		}
	}
}
