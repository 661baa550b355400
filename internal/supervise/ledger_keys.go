package supervise

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"github.com/ktlsvisor/ktlsvisor/internal/fault"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// The traffic secrets of a TLS 1.3 session in the kernel layer stand at the end of its
// piece, for each direction in two places side by side:
//
//	+--------+--------+--------+--------+
//	| send 0 | send 1 | recv 0 | recv 1 |   checksum, generation, length, seq, secret
//	+--------+--------+--------+--------+
//
// Between changes one of the two is filled. prepare fills the other with the next
// generation: that is the intent. Then the key is set in the socket, and complete
// wipes the older one. Whoever finds both filled reads from the socket which it has.
const (
	keyPlace  = 64
	keyHeader = 16
	maxSecret = keyPlace - keyHeader // SHA-384
	keysSize  = 4 * keyPlace
	keysOff   = pieceSize - keysSize
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

func (l *ledger) keyPlace(n uint32, d ktls.Direction, gen uint32) []byte {
	off := keysOff + int(gen&1)*keyPlace
	if d == ktls.Receiving {
		off += 2 * keyPlace
	}
	return l.piece(n)[off : off+keyPlace : off+keyPlace]
}

func encodeKey(b []byte, gen uint32, seq uint64, secret []byte) {
	binary.LittleEndian.PutUint32(b, 0) // not intact while it is written
	binary.LittleEndian.PutUint32(b[4:], gen<<8|uint32(len(secret)))
	binary.LittleEndian.PutUint64(b[8:], seq)
	clear(b[keyHeader:])
	copy(b[keyHeader:], secret)
	binary.LittleEndian.PutUint32(b, crc32.Checksum(b[4:], crcTable))
}

// decodeKey gives a secret that still lies in the ledger's memory.
func decodeKey(b []byte) (gen uint32, seq uint64, secret []byte, ok bool) {
	head := binary.LittleEndian.Uint32(b[4:])
	n := int(head & 0xff)
	if n == 0 || n > maxSecret || crc32.Checksum(b[4:], crcTable) != binary.LittleEndian.Uint32(b) {
		return 0, 0, nil, false
	}
	return head >> 8, binary.LittleEndian.Uint64(b[8:]), b[keyHeader : keyHeader+n], true
}

// maxKeyGen is how often a direction's key may change: the generation has 24 bits.
const maxKeyGen = 1<<24 - 1

// initKeys enters the secrets of a new session.
func (l *ledger) initKeys(n uint32, tx, rx []byte) error {
	if len(tx) > maxSecret || len(rx) > maxSecret {
		return fmt.Errorf("traffic secret of %d bytes: %w", max(len(tx), len(rx)), errTooLarge)
	}
	l.wipeKeys(n)
	encodeKey(l.keyPlace(n, ktls.Sending, 0), 0, 0, tx)
	encodeKey(l.keyPlace(n, ktls.Receiving, 0), 0, 0, rx)
	return nil
}

// wipeKeys makes sure that nothing of a session that had the slot before is left: what is
// of the next generation would be taken for this session's next key.
func (l *ledger) wipeKeys(n uint32) { clear(l.piece(n)[keysOff:]) }

// changing says whether a change of a direction's key is under way.
func (l *ledger) changing(n uint32, d ktls.Direction) bool {
	k := l.keys(n, d)
	defer k.wipe()
	return k.next != nil
}

// keys returns copies, which the caller wipes; the zero value when there are none.
func (l *ledger) keys(n uint32, d ktls.Direction) keyState {
	g0, s0, sec0, ok0 := decodeKey(l.keyPlace(n, d, 0))
	g1, s1, sec1, ok1 := decodeKey(l.keyPlace(n, d, 1))
	dup := func(b []byte) []byte { return append([]byte(nil), b...) }
	switch {
	case ok0 && ok1 && g1 == g0+1:
		return keyState{gen: g0, current: dup(sec0), next: dup(sec1), seq: s1}
	case ok0 && ok1 && g0 == g1+1:
		return keyState{gen: g1, current: dup(sec1), next: dup(sec0), seq: s0}
	case ok0 && !ok1:
		return keyState{gen: g0, current: dup(sec0)}
	case ok1 && !ok0:
		return keyState{gen: g1, current: dup(sec1)}
	}
	return keyState{}
}

// prepare records the intent to go to the next generation.
func (l *ledger) prepare(n uint32, d ktls.Direction, k *keyState, next []byte, seq uint64) {
	fault.Step("before-key-intent")
	encodeKey(l.keyPlace(n, d, k.gen+1), k.gen+1, seq, next)
	fault.Step("after-key-intent")
}

// complete records that the key of the next generation is set, and forgets the one
// before it.
func (l *ledger) complete(n uint32, d ktls.Direction, gen uint32) {
	fault.Step("before-key-complete")
	clear(l.keyPlace(n, d, gen))
	fault.Step("after-key-complete")
}

// abort takes an intent back: nothing was sent and nothing set.
func (l *ledger) abort(n uint32, d ktls.Direction, gen uint32) { clear(l.keyPlace(n, d, gen+1)) }
