package ktls

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/ktlsvisor/ktlsvisor/internal/fault"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// The journal of the software layer: what somebody else needs to go on with a session
// whose owner was killed, at whatever instruction. It lives in an arena, memory that
// the owner shares with whoever will look after its death, and never before.
//
//	arena:  header | slots, one a session | pages
//	slot:   state, id, epoch | keys | three registers, each in two copies
//	pages:  chunks of ciphertext in progress, and of plaintext that waits
//
// A register is a handful of words that must change together. The copy that is not
// valid is written, then the register's generation is raised by one atomic store; its
// lowest bit says which copy is valid. A kill leaves the old copy or the new one.
//
//   - receiving: stream offset and sequence number of the first record that was not
//     wholly delivered, how much of it was, and where the ciphertext from there on is.
//     The chunk and the offset of its first byte are published before anything is
//     received into it; how much was received, the socket tells (sys.PositionTCP).
//     Records are opened out of place: the ciphertext is what a new owner opens again.
//   - sending: the sequence number after the last sealed record, the stream offset at
//     which that ends, and where the sealed bytes are. It is published before any of
//     these bytes is sent; how many were, the socket tells. So a record that was
//     sealed and not published was not sent either, and its number is free.
//   - commit: which Commits count what was delivered and sealed here.
//
// A change of keys writes the next secret into the direction's other key place and
// switches with the register. A KeyUpdate of ours is published together with the word
// that a switch is due, before it is sent.
const (
	arenaMagic    = 0x314e524a736c746b // "ktlsJRN1"
	arenaVersion  = 1
	arenaHeader   = 4096
	arenaUsed     = 32 // in the header: slots from there on were never used
	arenaPage     = 4096
	slotSize      = 1024
	minArena      = 64 << 10
	maxArenaSlots = 1 << 20

	slotState   = 0
	slotID      = 8
	slotEpoch   = 16
	slotSession = 24 // sessionIDLen bytes
	slotVersion = 40 // version, suite: uint16 each; role: one byte
	slotSum     = 48 // over the above
	slotGens    = 64 // of the registers
	slotKeys    = 128
	slotRegs    = slotKeys + 4*keyPlace

	keyPlace = 48 // a traffic secret, or key (32) and iv (12) of TLS 1.2
	keyIV    = 32
	regWords = 14
	regSize  = 8 * regWords
	regSum   = regWords - 1

	stateFree = 0
	stateLive = 1
	stateOff  = 2 // goes on without a journal
)

type register int

const (
	regRX register = iota
	regTX
	regCommit
)

// Words of the receiving register.
const (
	rxOff      = iota // stream offset of the first record not wholly delivered
	rxSeq             // its sequence number
	rxUsed            // of the key's limit
	rxGen             // KeyUpdates since the handshake
	rxFlags           // flag bits, floods, what was delivered of that record, KeyUpdates of the peer that we wanted
	rxChunk           // chunk reference: page, and bytes from there
	rxBase            // stream offset of the chunk's first byte
	rxOwed            // answers that the peer has asked for: KeyUpdate, no_renegotiation
	rxUnread          // chunk reference: plaintext to be read before anything else
	rxUnreadAt        // from, to in it
	_                 // two that are free
	_
	rxCount // of plaintext bytes delivered
)

// Words of the sending register.
const (
	txOff = iota // stream offset behind the last sealed record
	txSeq        // of the next record
	txUsed
	txGen
	txFlags
	txChunk
	txBase
	txPaid    // what of rxOwed was answered
	txQueue   // chunk reference: plaintext that was queued
	txQueueAt // from, to in it
	txPlain   // count of bytes of application data sealed
	txAsked   // KeyUpdates of the peer that we asked for
)

// Words of the commit register.
const (
	_      = iota // free
	cmBorn        // of the Commits that count with this journal; 0: none
)

const (
	flagKey1   = 1 << iota // the direction's second key place is in force
	flagRekey              // sending: a KeyUpdate is sealed and the switch is due
	flagEnded              // sending: close_notify or a fatal alert is sealed
	flagNotify             // receiving: close_notify had come before
	flagFIN                // either: and the FIN

	rxFloodShift    = 8  // three bytes
	rxSkipShift     = 32 // 16 bits
	rxAnsweredShift = 48 // 16 bits
)

// JournalKey names a session in an arena: its id, and the epoch of the ownership.
type JournalKey struct{ ID, Epoch uint64 }

// FormatArena writes the header of an arena with so many slots into fresh memory,
// which reads as zeros. It is memory of sys.MapShared; a session takes a slot of
// 1 KiB, and what is in progress 4 to 100 KiB of the rest.
func FormatArena(mem []byte, slots int) error {
	if len(mem) < minArena || len(mem)%arenaPage != 0 || slots < 1 || slots > maxArenaSlots || chunksAt(slots) >= len(mem) {
		return fmt.Errorf("arena of %d bytes for %d sessions: too small, or not whole pages", len(mem), slots)
	}
	binary.LittleEndian.PutUint64(mem[8:], arenaVersion)
	binary.LittleEndian.PutUint64(mem[16:], uint64(slots))
	binary.LittleEndian.PutUint64(mem[24:], uint64(len(mem)))
	sys.StoreShared(mem, arenaMagic)
	return nil
}

// chunksAt is where an arena's pages begin.
func chunksAt(slots int) int {
	return (arenaHeader + slots*slotSize + arenaPage - 1) / arenaPage * arenaPage
}

// checkArena reads the header.
func checkArena(mem []byte) (slots int, err error) {
	if len(mem) < minArena || sys.LoadShared(mem) != arenaMagic {
		return 0, errors.New("not an arena")
	}
	if v := binary.LittleEndian.Uint64(mem[8:]); v != arenaVersion {
		return 0, fmt.Errorf("arena of version %d, this program knows %d", v, arenaVersion)
	}
	n, size := binary.LittleEndian.Uint64(mem[16:]), binary.LittleEndian.Uint64(mem[24:])
	if n < 1 || n > maxArenaSlots || size != uint64(len(mem)) || chunksAt(int(n)) >= len(mem) {
		return 0, errors.New("the header of the arena is damaged")
	}
	return int(n), nil
}

// usedSlots is how many of n slots were ever used; the memory of the others need not be
// touched.
func usedSlots(mem []byte, n int) int {
	return int(min(uint64(n), sys.LoadShared(mem[arenaUsed:])))
}

// slotHead is the part of a slot that does not change while it is live.
type slotHead struct {
	key            JournalKey
	session        [sessionIDLen]byte
	version, suite uint16
	client         bool
}

func (h *slotHead) store(m []byte) {
	binary.LittleEndian.PutUint64(m[slotID:], h.key.ID)
	binary.LittleEndian.PutUint64(m[slotEpoch:], h.key.Epoch)
	copy(m[slotSession:], h.session[:])
	binary.LittleEndian.PutUint16(m[slotVersion:], h.version)
	binary.LittleEndian.PutUint16(m[slotVersion+2:], h.suite)
	clear(m[slotVersion+4 : slotSum])
	if h.client {
		m[slotVersion+4] = 1
	}
	binary.LittleEndian.PutUint64(m[slotSum:], headSum(m))
}

// load reports whether the slot is what it should be.
func (h *slotHead) load(m []byte) bool {
	h.key = JournalKey{binary.LittleEndian.Uint64(m[slotID:]), binary.LittleEndian.Uint64(m[slotEpoch:])}
	copy(h.session[:], m[slotSession:])
	h.version = binary.LittleEndian.Uint16(m[slotVersion:])
	h.suite = binary.LittleEndian.Uint16(m[slotVersion+2:])
	h.client = m[slotVersion+4] == 1
	return binary.LittleEndian.Uint64(m[slotSum:]) == headSum(m)
}

func headSum(m []byte) uint64 {
	sum := uint64(slotSum)
	for i := slotID; i < slotSum; i += 8 {
		sum = mix(sum, binary.LittleEndian.Uint64(m[i:]))
	}
	return sum
}

// mix makes a checksum that tells of stray writes, not of intent: whoever owns the
// arena can write what he wants.
func mix(sum, v uint64) uint64 {
	sum = (sum ^ v) * 0x9e3779b97f4a7c15
	return sum ^ sum>>29
}

// words are a register's; the last is the checksum.
type words [regWords]uint64

func (w *words) sum(salt uint64) uint64 {
	sum := salt
	for _, v := range w[:regSum] {
		sum = mix(sum, v)
	}
	return sum
}

// regSalt makes a copy valid only in its place and its turn.
func regSalt(id uint64, r register, gen uint64) uint64 { return id<<8 ^ gen<<2 ^ uint64(r) }

// store publishes w as generation gen of a register of the slot m of session id.
func (w *words) store(m []byte, id uint64, r register, gen uint64) {
	w[regSum] = w.sum(regSalt(id, r, gen))
	dst := m[slotRegs+regSize*(2*int(r)+int(gen&1)):][:regSize]
	fault.Step("before-register")
	for i, v := range w {
		binary.LittleEndian.PutUint64(dst[8*i:], v)
	}
	fault.Step("half-register")
	sys.StoreShared(m[slotGens+8*int(r):], gen)
	fault.Step("after-register")
}

// load reads the valid copy of a register.
func (w *words) load(m []byte, id uint64, r register) error {
	gen := sys.LoadShared(m[slotGens+8*int(r):])
	src := m[slotRegs+regSize*(2*int(r)+int(gen&1)):][:regSize]
	for i := range w {
		w[i] = binary.LittleEndian.Uint64(src[8*i:])
	}
	if gen == 0 || w[regSum] != w.sum(regSalt(id, r, gen)) {
		return errors.New("a register of its journal is damaged")
	}
	return nil
}

// storeKey writes a direction's key into one of its two places.
func storeKey(m []byte, r register, second bool, d *direction) {
	k := keyAt(m, r, second)
	clear(k)
	if d.secret != nil {
		copy(k, d.secret)
		return
	}
	copy(k, d.key)
	copy(k[keyIV:], d.iv)
}

func keyAt(m []byte, r register, second bool) []byte {
	i := 2 * int(r)
	if second {
		i++
	}
	return m[slotKeys+keyPlace*i:][:keyPlace]
}

// loadKey is the inverse of storeKey. It copies.
func loadKey(m []byte, r register, second bool, s *suiteInfo, seq uint64) (direction, error) {
	k := keyAt(m, r, second)
	if s.version == tls.VersionTLS13 {
		return direction{secret: bytes.Clone(k[:s.hashLen]), seq: seq}, nil // the rest is derived when it is needed
	}
	return direction{key: bytes.Clone(k[:s.keyLen]), iv: bytes.Clone(k[keyIV:][:s.ivLen()]), seq: seq}, nil
}

// Chunk references: the number of the first page and how many bytes are there.
func chunkRef(b *buffer) uint64 {
	if b == nil {
		return 0
	}
	return uint64(b.page)<<32 | uint64(len(b.b))
}

func span(from, to int) uint64 { return uint64(from)<<32 | uint64(to) }
