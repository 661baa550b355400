package supervise

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/ktlsvisor/ktlsvisor/internal/fault"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// The ledger is shared memory (a memfd sealed against growing and shrinking) that
// outlives the supervisor: the keeper holds its descriptor and never maps it.
//
//	header page                     one slot per session, slotSize bytes
//	+---------------------------+   +-----------------------------------+
//	| magic, version, sizes     |   | entry A: owner, epoch, phase, crc |
//	| next id                   |   | entry B: the same, older or newer |
//	| counters                  |   | facts:   crc, length, CBOR        |
//	+---------------------------+   +-----------------------------------+
//	                                pieces, for what few sessions have at
//	                                a time: see ledger_pieces.go
//
// What changes (owner, epoch, phase) is written to the older of the two entries,
// with a higher sequence number and its checksum last: a supervisor killed in
// mid-write leaves the other entry standing. Stores of a killed process stay in
// the shared pages.
const (
	ledgerMagic   = 0x6b746c7376697331 // "ktlsvis1"
	ledgerVersion = 3

	headerSize = 4096
	slotSize   = 512
	entrySize  = 128
	factsOff   = 2 * entrySize
	factsSize  = slotSize - factsOff

	hdrMagic    = 0
	hdrVersion  = 8
	hdrSlots    = 12
	hdrNextID   = 24
	hdrStarted  = 32
	hdrUsed     = 40 // slots ever used: the rest has never been touched, so takes no memory
	hdrPieces   = 44 // pieces ever used, likewise
	hdrCounters = 64
	hdrReasons  = hdrCounters + 8*32
)

var crcTable = crc32.MakeTable(crc32.Castagnoli)

// slotPhase is a session's phase as recorded in the ledger.
type slotPhase uint8

const (
	slotFree   slotPhase = 0
	slotParked slotPhase = 1 // owned by nobody; its record state is in a piece
	slotOwned  slotPhase = 2 // owned by the worker in entry.Owner
)

// entry is the part of a slot that changes. Writing it with phase owned is the
// commit of a move.
type entry struct {
	Seq      uint64
	ID       uint64
	Epoch    wire.Epoch
	Owner    uint64
	Accepted int64 // Unix nanoseconds
	Moves    uint32
	Phase    slotPhase
	Software bool
	Flags    wire.Flags // how a parked session comes to its next owner
	Group    string
	// Of changes of keys: the generation of the receiving key when the ownership
	// began, and what is owed to the peer.
	RXBase uint32
	Owes   owed
	// Crashes of workers in a row that were handling it.
	Crashes uint8
	Blamed  bool // the death of Owner is among them
	// Pieces, 0 for none: what a session of the kernel layer has for its life, and the
	// record state of one that is parked.
	Base, Kept uint32
}

// facts is the part of a slot that never changes. Most of it is in Facts as well, and
// is written apart only where it is not: see putFacts.
type facts struct {
	Pool     string `cbor:"1,keyasint"`
	Facts    []byte `cbor:"2,keyasint,omitempty"`
	Peer     string `cbor:"3,keyasint,omitempty"`
	SNI      string `cbor:"4,keyasint,omitempty"`
	ALPN     string `cbor:"5,keyasint,omitempty"`
	Version  uint16 `cbor:"6,keyasint,omitempty"`
	Suite    uint16 `cbor:"7,keyasint,omitempty"`
	Reason   string `cbor:"8,keyasint,omitempty"`
	Cookie   uint64 `cbor:"10,keyasint,omitempty"` // of its socket; in pools that retain none
	Overflow bool   `cbor:"9,keyasint,omitempty"`  // Facts are with the keeper, too large for the slot
}

var errTooLarge = errors.New("too large for its place in the ledger")

type ledger struct {
	mem   []byte
	slots int
	spare []uint32 // pieces that were used and are free now
}

func ledgerSize(slots int) int { return piecesOff(slots) + pieceCount(slots)*pieceSize }

// createLedger makes a new ledger; the caller owns the descriptor.
func createLedger(slots int) (*ledger, int, error) {
	size := ledgerSize(slots)
	fd, err := sys.SharedMemfd("ktlsvisor-ledger", int64(size))
	if err != nil {
		return nil, -1, err
	}
	mem, err := sys.MapShared(fd, size)
	if err != nil {
		sys.CloseAll([]int{fd})
		return nil, -1, err
	}
	l := &ledger{mem: mem, slots: slots}
	binary.LittleEndian.PutUint32(mem[hdrVersion:], ledgerVersion)
	binary.LittleEndian.PutUint32(mem[hdrSlots:], uint32(slots))
	binary.LittleEndian.PutUint64(mem[hdrNextID:], 1)
	binary.LittleEndian.PutUint64(mem[hdrStarted:], uint64(time.Now().UnixNano()))
	binary.LittleEndian.PutUint64(mem[hdrMagic:], ledgerMagic)
	return l, fd, nil
}

// openLedger maps a ledger that an earlier supervisor made.
func openLedger(fd int) (*ledger, error) {
	size, err := sys.FileSize(fd)
	if err != nil {
		return nil, fmt.Errorf("ledger: %w", err)
	}
	if size < headerSize {
		return nil, fmt.Errorf("ledger: %d bytes, not even a header", size)
	}
	mem, err := sys.MapShared(fd, int(size))
	if err != nil {
		return nil, fmt.Errorf("ledger: %w", err)
	}
	slots := int(binary.LittleEndian.Uint32(mem[hdrSlots:]))
	switch v := binary.LittleEndian.Uint32(mem[hdrVersion:]); {
	case binary.LittleEndian.Uint64(mem[hdrMagic:]) != ledgerMagic:
		err = errors.New("ledger: this memory is none of ours")
	case v != ledgerVersion:
		err = fmt.Errorf("ledger: version %d, this supervisor knows %d: use the program that started the unit", v, ledgerVersion)
	case ledgerSize(slots) > int(size):
		err = fmt.Errorf("ledger: %d slots do not fit %d bytes", slots, size)
	}
	if err != nil {
		_ = sys.Unmap(mem)
		return nil, err
	}
	return &ledger{mem: mem, slots: slots}, nil
}

func (l *ledger) close() { _ = sys.Unmap(l.mem) }

func (l *ledger) nextID() uint64 {
	n := binary.LittleEndian.Uint64(l.mem[hdrNextID:])
	binary.LittleEndian.PutUint64(l.mem[hdrNextID:], n+1)
	return n
}

func (l *ledger) slot(i int) []byte {
	off := headerSize + i*slotSize
	return l.mem[off : off+slotSize : off+slotSize]
}

// used is the number of slots that may hold something.
func (l *ledger) used() int {
	return min(int(binary.LittleEndian.Uint32(l.mem[hdrUsed:])), l.slots)
}

// put writes e to the older of the slot's two entries. The pieces that the one before
// named and e does not are wiped and free then.
func (l *ledger) put(i int, e entry) {
	if i >= l.used() {
		binary.LittleEndian.PutUint32(l.mem[hdrUsed:], uint32(i+1))
	}
	s := l.slot(i)
	a, aok := decodeEntry(s[:entrySize])
	b, bok := decodeEntry(s[entrySize : 2*entrySize])
	dst := s[:entrySize]
	var last entry
	switch {
	case aok && (!bok || a.Seq >= b.Seq):
		dst, last = s[entrySize:2*entrySize], a
	case bok:
		last = b
	}
	e.Seq = last.Seq + 1
	fault.Step("before-ledger")
	encodeEntry(dst, e)
	fault.Step("after-ledger")
	for _, n := range []uint32{last.Kept, last.Base} {
		if n != 0 && n != e.Kept && n != e.Base {
			l.release(n)
			fault.Step("after-void")
		}
	}
}

// get returns the newest intact entry of a slot; ok is false for a slot never
// used, and damaged when something was written there and nothing intact is left.
func (l *ledger) get(i int) (e entry, ok, damaged bool) {
	s := l.slot(i)
	a, aok := decodeEntry(s[:entrySize])
	b, bok := decodeEntry(s[entrySize : 2*entrySize])
	switch {
	case aok && bok && a.Seq >= b.Seq, aok && !bok:
		return a, true, false
	case bok:
		return b, true, false
	}
	for _, c := range s[:2*entrySize] {
		if c != 0 {
			return entry{}, false, true
		}
	}
	return entry{}, false, false
}

// before is the entry that the newest one of a slot took the place of.
func (l *ledger) before(i int) (e entry, ok bool) {
	s := l.slot(i)
	a, aok := decodeEntry(s[:entrySize])
	b, bok := decodeEntry(s[entrySize : 2*entrySize])
	if a.Seq > b.Seq {
		a = b
	}
	return a, aok && bok
}

// free marks a slot free and wipes what it held. Whoever is killed between the two
// leaves the wiping to the next supervisor.
func (l *ledger) free(i int) {
	l.put(i, entry{Phase: slotFree})
	clear(l.slot(i)[factsOff:])
}

func encodeEntry(b []byte, e entry) {
	binary.LittleEndian.PutUint32(b, 0) // not intact while it is written
	put24(b[4:7], e.Base)
	b[7] = byte(e.Kept)
	binary.LittleEndian.PutUint64(b[8:], e.Seq)
	binary.LittleEndian.PutUint64(b[16:], e.ID)
	binary.LittleEndian.PutUint64(b[24:], uint64(e.Epoch))
	binary.LittleEndian.PutUint64(b[32:], e.Owner)
	binary.LittleEndian.PutUint64(b[40:], uint64(e.Accepted))
	binary.LittleEndian.PutUint32(b[48:], e.Moves)
	b[52] = byte(e.Phase)
	b[53] = 0
	if e.Software {
		b[53] = 1
	}
	if e.Blamed {
		b[53] |= 2
	}
	b[54] = byte(len(e.Group))
	b[55] = byte(e.Flags)
	clear(b[56:entrySize])
	copy(b[56:56+wire.MaxGroup], e.Group)
	binary.LittleEndian.PutUint32(b[120:], e.RXBase)
	b[124] = byte(e.Owes)
	b[125] = e.Crashes
	binary.LittleEndian.PutUint16(b[126:], uint16(e.Kept>>8))
	fault.Step("half-ledger")
	binary.LittleEndian.PutUint32(b, crc32.Checksum(b[4:entrySize], crcTable))
}

func put24(b []byte, n uint32) { b[0], b[1], b[2] = byte(n), byte(n>>8), byte(n>>16) }

func decodeEntry(b []byte) (e entry, ok bool) {
	if crc32.Checksum(b[4:entrySize], crcTable) != binary.LittleEndian.Uint32(b) || int(b[54]) > wire.MaxGroup {
		return entry{}, false
	}
	e = entry{
		Seq:      binary.LittleEndian.Uint64(b[8:]),
		ID:       binary.LittleEndian.Uint64(b[16:]),
		Epoch:    wire.Epoch(binary.LittleEndian.Uint64(b[24:])),
		Owner:    binary.LittleEndian.Uint64(b[32:]),
		Accepted: int64(binary.LittleEndian.Uint64(b[40:])),
		Moves:    binary.LittleEndian.Uint32(b[48:]),
		Phase:    slotPhase(b[52]),
		Software: b[53]&1 != 0,
		Flags:    wire.Flags(b[55]),
		Group:    string(b[56 : 56+int(b[54])]),
		RXBase:   binary.LittleEndian.Uint32(b[120:]),
		Owes:     owed(b[124]),
		Crashes:  b[125],
		Blamed:   b[53]&2 != 0,
		Base:     uint32(b[4]) | uint32(b[5])<<8 | uint32(b[6])<<16,
		Kept:     uint32(b[7]) | uint32(binary.LittleEndian.Uint16(b[126:]))<<8,
	}
	return e, e.Seq > 0
}

// Places for CBOR in a slot: u32 checksum, u32 length, bytes.

func putPlace(b []byte, v any) error {
	data, err := cbor.Marshal(v)
	if err != nil {
		return err
	}
	if len(data) > len(b)-8 {
		return fmt.Errorf("%d bytes: %w", len(data), errTooLarge)
	}
	clear(b)
	copy(b[8:], data)
	binary.LittleEndian.PutUint32(b[4:], uint32(len(data)))
	binary.LittleEndian.PutUint32(b, crc32.Checksum(b[4:8+len(data)], crcTable))
	return nil
}

func getPlace(b []byte, v any) error {
	n := binary.LittleEndian.Uint32(b[4:])
	if n == 0 || int(n) > len(b)-8 {
		return errors.New("nothing there")
	}
	if crc32.Checksum(b[4:8+n], crcTable) != binary.LittleEndian.Uint32(b) {
		return errors.New("checksum does not match")
	}
	return cbor.Unmarshal(b[8:8+n], v)
}
