package supervise

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/ktlsvisor/ktlsvisor/internal/fault"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// The traffic secrets of a TLS 1.3 session in the kernel layer stand at the end of its
// slot, and the next one of a direction, while it is changed, in a piece:
//
//	slot, behind the facts:                 piece, see ledger_pieces.go:
//	+-----------+-----------+------+------+  +-----------+------------+-----+--------+
//	| next send | next recv | send | recv |  | direction | generation | seq | secret |
//	+-----------+-----------+------+------+  +-----------+------------+-----+--------+
//	  numbers of pieces,      checksum, generation,
//	  0 for none              length, secret
//
// prepare fills a piece with the next generation, and writes its number: that is the
// intent. Then the key is set in the socket, and complete takes the next generation over
// into the slot, and wipes the piece. Whoever finds both generations reads from the socket
// which it has. Whoever finds the one in the slot half written finds complete interrupted:
// the other one is in force.
//
// A session of the software layer has no keys here; its facts may take their room.
const (
	keyHeader = 8
	maxSecret = 48 // SHA-384
	keyPlace  = keyHeader + maxSecret
	keysSize  = 2*4 + 2*keyPlace
	keysOff   = slotSize - keysSize

	nextHeader = 1 + 4 + 8
)

// keyState is what the ledger knows of one direction's keys.
type keyState struct {
	gen     uint32 // KeyUpdates since the handshake
	current []byte // nil: no secrets (TLS 1.2, or the software layer)
	next    []byte // not nil: the change to it is under way
	seq     uint64 // sending: the number that the KeyUpdate's record has
}

func (k *keyState) wipe() {
	clear(k.current)
	clear(k.next)
	*k = keyState{}
}

// roomForKeys is the end of a slot, nil if the facts reach into it.
func (l *ledger) roomForKeys(i int) []byte {
	s := l.slot(i)
	if uint64(binary.LittleEndian.Uint32(s[factsOff+4:])) > keysOff-factsOff-8 {
		return nil
	}
	return s[keysOff:]
}

func keyOf(room []byte, d ktls.Direction) []byte {
	off := 8
	if d == ktls.Receiving {
		off += keyPlace
	}
	return room[off : off+keyPlace : off+keyPlace]
}

// nextOf is the cell with the number of the piece that has the next key.
func nextOf(room []byte, d ktls.Direction) []byte {
	if d == ktls.Receiving {
		return room[4:8]
	}
	return room[:4]
}

func encodeKey(b []byte, gen uint32, secret []byte) {
	binary.LittleEndian.PutUint32(b, 0) // not intact while it is written
	binary.LittleEndian.PutUint32(b[4:], gen<<8|uint32(len(secret)))
	clear(b[keyHeader:])
	copy(b[keyHeader:], secret)
	binary.LittleEndian.PutUint32(b, crc32.Checksum(b[4:], crcTable))
}

// decodeKey gives a secret that still lies in the ledger's memory.
func decodeKey(b []byte) (gen uint32, secret []byte, ok bool) {
	head := binary.LittleEndian.Uint32(b[4:])
	n := int(head & 0xff)
	if n == 0 || n > maxSecret || crc32.Checksum(b[4:], crcTable) != binary.LittleEndian.Uint32(b) {
		return 0, nil, false
	}
	return head >> 8, b[keyHeader : keyHeader+n], true
}

// next returns what prepare wrote, a copy.
func (l *ledger) next(room []byte, id uint64, d ktls.Direction) (gen uint32, seq uint64, secret []byte, ok bool) {
	n := binary.LittleEndian.Uint32(nextOf(room, d))
	if n == 0 {
		return 0, 0, nil, false
	}
	b, err := l.record(n, id)
	if err != nil || len(b) <= nextHeader || len(b) > nextHeader+maxSecret || b[0] != byte(d) {
		wipe(b)
		return 0, 0, nil, false
	}
	return binary.LittleEndian.Uint32(b[1:]), binary.LittleEndian.Uint64(b[5:]), b[nextHeader:], true
}

// maxKeyGen is how often a direction's key may change: the generation has 24 bits.
const maxKeyGen = 1<<24 - 1

// initKeys enters the secrets of a new session, after its facts.
func (l *ledger) initKeys(i int, tx, rx []byte) error {
	if len(tx) > maxSecret || len(rx) > maxSecret {
		return fmt.Errorf("traffic secret of %d bytes: %w", max(len(tx), len(rx)), errTooLarge)
	}
	room := l.roomForKeys(i)
	if room == nil {
		return fmt.Errorf("traffic secrets behind facts: %w", errTooLarge)
	}
	l.touch(i) // so that the next supervisor wipes it, if this one is killed
	clear(room)
	encodeKey(keyOf(room, ktls.Sending), 0, tx)
	encodeKey(keyOf(room, ktls.Receiving), 0, rx)
	return nil
}

// sessionID is that of the session in a slot.
func (l *ledger) sessionID(i int) uint64 {
	e, _, _ := l.entries(i)
	return e.ID
}

// changing says whether a change of a direction's key is under way.
func (l *ledger) changing(i int, d ktls.Direction) bool {
	k := l.keys(i, d)
	defer k.wipe()
	return k.next != nil
}

// keys returns copies, which the caller wipes; the zero value when there are none.
func (l *ledger) keys(i int, d ktls.Direction) keyState {
	room := l.roomForKeys(i)
	if room == nil {
		return keyState{}
	}
	gen, secret, ok := decodeKey(keyOf(room, d))
	k := keyState{gen: gen, current: bytes.Clone(secret)}
	if binary.LittleEndian.Uint32(nextOf(room, d)) == 0 {
		return k
	}
	nextGen, seq, next, there := l.next(room, l.sessionID(i), d)
	switch {
	case !there:
		return k
	case ok && nextGen == gen+1:
		k.next, k.seq = next, seq
		return k
	case ok && nextGen == gen && bytes.Equal(next, secret): // taken over, and the piece was not wiped
		wipe(next)
		return k
	case !ok:
		return keyState{gen: nextGen, current: next}
	}
	wipe(next)
	k.wipe() // these do not belong together
	return keyState{}
}

// prepare records the intent to go to the next generation.
func (l *ledger) prepare(i int, d ktls.Direction, k *keyState, next []byte, seq uint64) error {
	fault.Step("before-key-intent")
	b := make([]byte, nextHeader, nextHeader+maxSecret)
	b[0] = byte(d)
	binary.LittleEndian.PutUint32(b[1:], k.gen+1)
	binary.LittleEndian.PutUint64(b[5:], seq)
	b = append(b, next...)
	defer wipe(b)
	l.abort(i, d)
	room := l.roomForKeys(i)
	if room == nil {
		return fmt.Errorf("traffic secrets behind facts: %w", errTooLarge)
	}
	n, err := l.fillPiece(l.sessionID(i), b, func() {})
	if err != nil {
		return err
	}
	binary.LittleEndian.PutUint32(nextOf(room, d), n)
	fault.Step("after-key-intent")
	return nil
}

// complete records that the key of the next generation is set, and forgets the one
// before it.
func (l *ledger) complete(i int, d ktls.Direction, gen uint32) {
	fault.Step("before-key-complete")
	k := l.keys(i, d)
	if k.gen == gen && k.next != nil {
		l.takeOver(i, d, l.sessionID(i))
		l.abort(i, d)
	}
	k.wipe()
	fault.Step("after-key-complete")
}

// takeOver writes the next generation over the one before it. Killed in the middle it
// leaves the next one only.
func (l *ledger) takeOver(i int, d ktls.Direction, id uint64) {
	room := l.roomForKeys(i)
	if room == nil {
		return
	}
	if gen, _, next, ok := l.next(room, id, d); ok {
		encodeKey(keyOf(room, d), gen, next)
		wipe(next)
	}
}

// abort takes an intent back: nothing was sent and nothing set.
func (l *ledger) abort(i int, d ktls.Direction) {
	room := l.roomForKeys(i)
	if room == nil {
		return
	}
	l.unname(nextOf(room, d), l.sessionID(i))
}

// unname forgets the number of a piece, and wipes the piece if it is the session's.
func (l *ledger) unname(cell []byte, id uint64) {
	n := binary.LittleEndian.Uint32(cell)
	if n == 0 {
		return
	}
	b, err := l.record(n, id)
	wipe(b)
	binary.LittleEndian.PutUint32(cell, 0)
	if err == nil {
		l.release(n)
	}
}

// dropNext wipes what is left of changes of keys when a session ends.
func (l *ledger) dropNext(i int, id uint64) {
	if room := l.roomForKeys(i); room != nil {
		l.unname(nextOf(room, ktls.Sending), id)
		l.unname(nextOf(room, ktls.Receiving), id)
	}
}

// settleNext finishes what complete had begun, and returns the pieces that are named.
func (l *ledger) settleNext(i int, id uint64) (named []uint32) {
	room := l.roomForKeys(i)
	if room == nil {
		return nil
	}
	for _, d := range []ktls.Direction{ktls.Sending, ktls.Receiving} {
		cell := nextOf(room, d)
		if binary.LittleEndian.Uint32(cell) == 0 {
			continue
		}
		if _, _, ok := decodeKey(keyOf(room, d)); !ok {
			l.takeOver(i, d, id)
		}
		if !l.changing(i, d) {
			binary.LittleEndian.PutUint32(cell, 0)
			continue
		}
		named = append(named, binary.LittleEndian.Uint32(cell))
	}
	return named
}
