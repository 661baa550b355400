package supervise

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/ktlsvisor/ktlsvisor/internal/fault"
)

// Behind the slots the ledger has pieces, for what is not of every session all the time:
// the record state while a session is parked, and in the kernel layer the record state
// of the handshake and the keys, for the session's life.
//
//	+-----+--------+----+--------------+------------------------------------+
//	| crc | length | id | record state | kernel layer: keys, ledger_keys.go |
//	+-----+--------+----+--------------+------------------------------------+
//
// A piece belongs to the session whose entry names it. It is filled before that entry
// is written, and wiped after an entry that does not name it any more: whoever is killed
// between the two leaves a piece that nobody names, and the next supervisor wipes it.
// Nothing is ever written over a record state that an entry names.
//
// The record state of a parked session is void from the entry with the next owner on,
// which is before RESUME is sent (I5). The one of the handshake, in the kernel layer,
// holds no sequence number, and is good for the adoption after any later crash.
const (
	pieceSize   = 512
	pieceHeader = 16
	baseSize    = pieceSize - keysSize // of which the record state of the handshake is
)

func piecesOff(slots int) int { return headerSize + slots*slotSize }

// pieceCount is enough for two pieces of every session, and the one that takes the
// place of another. The first one is never used: its number says that there is none.
func pieceCount(slots int) int { return 2*slots + 2 }

func (l *ledger) piece(n uint32) []byte {
	if int(n) >= pieceCount(l.slots) {
		n = 0
	}
	off := piecesOff(l.slots) + int(n)*pieceSize
	return l.mem[off : off+pieceSize : off+pieceSize]
}

// piecesUsed is the number of pieces that may hold something, the first included.
func (l *ledger) piecesUsed() uint32 {
	return max(1, min(binary.LittleEndian.Uint32(l.mem[hdrPieces:]), uint32(pieceCount(l.slots))))
}

// keepRecord puts a record state into a piece of its own, of which it takes at most size
// bytes. An entry is to name it.
func (l *ledger) keepRecord(id uint64, rec []byte, size int) (uint32, error) {
	if len(rec) > size-pieceHeader {
		return 0, fmt.Errorf("record state of %d bytes: %w", len(rec), errTooLarge)
	}
	var n uint32
	if free := len(l.spare); free > 0 {
		n, l.spare = l.spare[free-1], l.spare[:free-1]
	} else {
		n = l.piecesUsed()
		if int(n) >= pieceCount(l.slots) {
			return 0, errors.New("the ledger has no piece left")
		}
		binary.LittleEndian.PutUint32(l.mem[hdrPieces:], n+1)
	}
	b := l.piece(n)
	binary.LittleEndian.PutUint32(b[4:], uint32(len(rec)))
	binary.LittleEndian.PutUint64(b[8:], id)
	copy(b[pieceHeader:], rec)
	fault.Step("half-record")
	binary.LittleEndian.PutUint32(b, crc32.Checksum(b[4:pieceHeader+len(rec)], crcTable))
	return n, nil
}

// record returns the record state in a piece, a copy that the caller wipes.
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

// release wipes a piece that no entry names.
func (l *ledger) release(n uint32) {
	if n == 0 || n >= l.piecesUsed() {
		return
	}
	clear(l.piece(n))
	l.spare = append(l.spare, n)
}

// sweep finds out which pieces are free and wipes them: an earlier supervisor may not
// have come so far.
func (l *ledger) sweep() {
	named := make([]bool, l.piecesUsed())
	for i := range l.used() {
		e, ok, _ := l.get(i)
		for _, n := range []uint32{e.Base, e.Kept} {
			if ok && int(n) < len(named) {
				named[n] = true
			}
		}
	}
	l.spare = l.spare[:0]
	for n := len(named) - 1; n > 0; n-- { // the first ones are given away first
		if !named[n] {
			l.release(uint32(n))
		}
	}
}
