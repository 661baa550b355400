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
//	+---------------------------+   | kernel layer: keys                |
//	                                +-----------------------------------+
//	                                pieces, for what few sessions have at
//	                                a time: see ledger_pieces.go
//	                                names of groups: see ledger_names.go
//
// What changes (owner, epoch, phase) is written to the older of the two entries,
// with a higher sequence number and its checksum last: a supervisor killed in
// mid-write leaves the other entry standing. Stores of a killed process stay in
// the shared pages.
const (
	ledgerMagic   = 0x6b746c7376697331 // "ktlsvis1"
	ledgerVersion = 4

	headerSize = 4096
	slotSize   = 512
	entrySize  = 64
	factsOff   = 2 * entrySize
	factsSize  = slotSize - factsOff // the keys included, if there are any

	hdrMagic    = 0
	hdrVersion  = 8
	hdrSlots    = 12
	hdrNextID   = 24
	hdrStarted  = 32
	hdrUsed     = 40 // slots ever used: the rest has never been touched, so takes no memory
	hdrPieces   = 44 // pieces ever used, likewise
	hdrNames    = 48 // names of groups, likewise
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
	Group    string     // its name is in a place of its own, see ledger_names.go
	// Of changes of keys: the generation of the receiving key when the ownership
	// began, and what is owed to the peer.
	RXBase uint32
	Owes   owed
	// Crashes of workers in a row that were handling it.
	Crashes uint8
	Blamed  bool // the death of Owner is among them
	// The piece with the record state of a session that is parked, 0 for none.
	Kept uint32
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
	// Base is the record state that every owner in the kernel layer can begin with: the one
	// of the handshake, which holds no sequence number.
	Base []byte `cbor:"11,keyasint,omitempty"`
}

var errTooLarge = errors.New("too large for its place in the ledger")

type ledger struct {
	mem    []byte
	slots  int
	pieces area
	names  names
}

func ledgerSize(slots int) int { return namesOff(slots) + nameCount(slots)*nameSize }

// ledgerOn is the ledger in mem, which is as large as it has to be.
func ledgerOn(mem []byte, slots int) *ledger {
	return &ledger{mem: mem, slots: slots,
		pieces: areaOn(mem, piecesOff(slots), pieceCount(slots), pieceSize, hdrPieces),
		names:  names{area: areaOn(mem, namesOff(slots), nameCount(slots), nameSize, hdrNames)}}
}

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
	l := ledgerOn(mem, slots)
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
	return ledgerOn(mem, slots), nil
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

// touch notes that slot i may hold something from now on.
func (l *ledger) touch(i int) {
	if i >= l.used() {
		binary.LittleEndian.PutUint32(l.mem[hdrUsed:], uint32(i+1))
	}
}

// entries are the newest intact entry of a slot, the one before it, and the half of the
// slot that the next one goes to. An entry that is not intact is the zero value, whose Seq
// is 0.
func (l *ledger) entries(i int) (newest, before stored, older []byte) {
	s := l.slot(i)
	a, b := s[:entrySize:entrySize], s[entrySize:2*entrySize:2*entrySize]
	ea, eb := decodeEntry(a), decodeEntry(b)
	if ea.Seq >= eb.Seq && ea.Seq > 0 {
		return ea, eb, b
	}
	return eb, ea, a
}

// put writes e to the older of the slot's two entries. The piece and the name that the
// one before named and e does not are wiped and free then.
func (l *ledger) put(i int, e entry) {
	l.touch(i)
	last, _, dst := l.entries(i)
	e.Seq = last.Seq + 1
	name := l.names.join(e.Group)
	fault.Step("before-ledger")
	encodeEntry(dst, stored{e, name})
	fault.Step("after-ledger")
	if n := last.Kept; n != 0 && n != e.Kept {
		l.release(n)
		fault.Step("after-void")
	}
	l.names.leave(last.name)
}

// get returns the newest intact entry of a slot; ok is false for a slot never
// used, and damaged when something was written there and nothing intact is left.
func (l *ledger) get(i int) (e entry, ok, damaged bool) {
	newest, _, _ := l.entries(i)
	if newest.Seq > 0 {
		if newest.Group, ok = l.names.read(newest.name); !ok {
			return entry{}, false, true
		}
		return newest.entry, true, false
	}
	for _, c := range l.slot(i)[:2*entrySize] {
		if c != 0 {
			return entry{}, false, true
		}
	}
	return entry{}, false, false
}

// before is the entry that the newest one of a slot took the place of, without the name
// of its group.
func (l *ledger) before(i int) (e entry, ok bool) {
	newest, before, _ := l.entries(i)
	return before.entry, newest.Seq > 0 && before.Seq > 0
}

// free marks a slot free and wipes what it held. Whoever is killed between the two
// leaves the wiping to the next supervisor.
func (l *ledger) free(i int) { l.vacate(i, entry{Phase: slotFree}, func() {}) }

// vacate is the end of what a slot held: e says so, then counts, and nothing is left.
func (l *ledger) vacate(i int, e entry, counted func()) {
	last, _, _ := l.entries(i)
	l.put(i, e)
	counted()
	l.dropNext(i, last.ID)
	clear(l.slot(i)[factsOff:])
}

// stored is an entry as it stands in a slot: it has the place of its group's name.
type stored struct {
	entry
	name nameRef
}

func encodeEntry(b []byte, e stored) {
	binary.LittleEndian.PutUint32(b, 0) // not intact while it is written
	put24(b[4:], e.Kept)
	put24(b[7:], e.name.n)
	b[10] = byte(e.Phase) & 15
	if e.Software {
		b[10] |= 16
	}
	if e.Blamed {
		b[10] |= 32
	}
	b[11] = byte(e.Flags)
	b[12] = byte(e.Owes)
	b[13] = e.Crashes
	binary.LittleEndian.PutUint16(b[14:], e.name.check)
	binary.LittleEndian.PutUint64(b[16:], e.Seq)
	binary.LittleEndian.PutUint64(b[24:], e.ID)
	binary.LittleEndian.PutUint64(b[32:], uint64(e.Epoch))
	binary.LittleEndian.PutUint64(b[40:], e.Owner)
	binary.LittleEndian.PutUint64(b[48:], uint64(e.Accepted))
	binary.LittleEndian.PutUint32(b[56:], e.Moves)
	binary.LittleEndian.PutUint32(b[60:], e.RXBase)
	fault.Step("half-ledger")
	binary.LittleEndian.PutUint32(b, crc32.Checksum(b[4:entrySize], crcTable))
}

func put24(b []byte, n uint32) { b[0], b[1], b[2] = byte(n), byte(n>>8), byte(n>>16) }

func get24(b []byte) uint32 { return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 }

// decodeEntry returns the zero value for what is not intact.
func decodeEntry(b []byte) stored {
	if crc32.Checksum(b[4:entrySize], crcTable) != binary.LittleEndian.Uint32(b) {
		return stored{}
	}
	return stored{entry{
		Kept:     get24(b[4:]),
		Phase:    slotPhase(b[10] & 15),
		Software: b[10]&16 != 0,
		Blamed:   b[10]&32 != 0,
		Flags:    wire.Flags(b[11]),
		Owes:     owed(b[12]),
		Crashes:  b[13],
		Seq:      binary.LittleEndian.Uint64(b[16:]),
		ID:       binary.LittleEndian.Uint64(b[24:]),
		Epoch:    wire.Epoch(binary.LittleEndian.Uint64(b[32:])),
		Owner:    binary.LittleEndian.Uint64(b[40:]),
		Accepted: int64(binary.LittleEndian.Uint64(b[48:])),
		Moves:    binary.LittleEndian.Uint32(b[56:]),
		RXBase:   binary.LittleEndian.Uint32(b[60:]),
	}, nameRef{n: get24(b[7:]), check: binary.LittleEndian.Uint16(b[14:])}}
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
