package ktls

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// What an application has committed, and what it has read and written since, in memory
// that outlives its process: a slot of an arena beside the journal's (journal.go), with
// the same chunks. It is the same for both record layers, because it counts plaintext.
//
//	slot:  state, id | two entries | counters | two notes
//
// An entry says what the last commit was and where everything is: input that was read
// and not committed, the state, output that was committed. It is written to the older of
// the two places, with a checksum and the next sequence number, so a kill leaves the old
// one or the new one. What an entry refers to is freed only when the next entry stands.
//
// Input is received into its chunk, behind what is there, and the counter goes up when
// it has arrived. How much of it arrived in a system call whose result the process did
// not live to see is told by the note in the kernel layer (sys.RecvNoted: the kernel
// itself writes the number), and by the journal in the software layer, which counts what
// it has delivered. For output it is the same.
const (
	stateCommit = 3 // of slotState

	commitEntry    = 64 // two of commitEntryLen bytes
	commitEntryLen = 128
	commitWords    = 320
	commitNoteRX   = 384
	commitNoteTX   = 512

	// Counters, of eight bytes.
	wordReceived = commitWords      // plaintext bytes read off the session
	wordCalled   = commitWords + 8  // the value of received when the note was opened
	wordSent     = commitWords + 16 // kernel layer: bytes of committed output taken
	wordSending  = commitWords + 24 // the value of sent when the note was opened
	wordPlain    = commitWords + 32 // number of commits with which output by Write is accounted for
	wordEnded    = commitWords + 40 // 1: close_notify was read
)

// countFrom is where the count of input begins, so that there is room before it for
// what is pushed back.
const countFrom = 1 << 40

// Limits of one session, in bytes.
const (
	// MaxUncommitted is how much input may be read and not committed.
	MaxUncommitted = 1 << 20
	// MaxCommitState is how large the state of a commit may be.
	MaxCommitState = maxRecord
)

var (
	// ErrUncommitted is returned by Read when MaxUncommitted bytes wait for a Commit.
	ErrUncommitted = fmt.Errorf("%d bytes were read and not committed: call Commit for what is done with", MaxUncommitted)
	// ErrNoCommit is returned by Commit when the session has no place for it.
	ErrNoCommit = errors.New("the session does not keep what is committed")
)

// entry of a slot.
type commitRecord struct {
	seq      uint64 // of entries
	id       uint64
	epoch    uint64
	born     uint64 // of two slots with the same id and epoch the higher one counts
	commits  uint64
	consumed uint64 // counted like wordReceived
	inBase   uint64 // count at the first byte of the input's chunk
	in       uint64 // chunk references
	state    uint64
	stateLen uint32
	flags    uint32
	out      uint64
	outLen   uint32
	outBase  uint64 // count of sent bytes at the first byte of out
}

// Flags of an entry.
const (
	commitHasState  = 1 << iota
	commitStateOnly // input is not kept
)

var commitTable = crc32.MakeTable(crc32.Castagnoli)

func (e *commitRecord) store(b []byte) {
	clear(b[4:commitEntryLen])
	for i, v := range []uint64{e.seq, e.id, e.epoch, e.born, e.commits, e.consumed, e.inBase, e.in, e.state, e.out, e.outBase} {
		binary.LittleEndian.PutUint64(b[8+8*i:], v)
	}
	for i, v := range []uint32{e.stateLen, e.flags, e.outLen} {
		binary.LittleEndian.PutUint32(b[96+4*i:], v)
	}
	binary.LittleEndian.PutUint32(b, crc32.Checksum(b[4:commitEntryLen], commitTable))
}

func (e *commitRecord) load(b []byte) bool {
	for i, v := range []*uint64{&e.seq, &e.id, &e.epoch, &e.born, &e.commits, &e.consumed, &e.inBase, &e.in, &e.state, &e.out, &e.outBase} {
		*v = binary.LittleEndian.Uint64(b[8+8*i:])
	}
	for i, v := range []*uint32{&e.stateLen, &e.flags, &e.outLen} {
		*v = binary.LittleEndian.Uint32(b[96+4*i:])
	}
	return e.seq > 0 && e.id > 0 && crc32.Checksum(b[4:commitEntryLen], commitTable) == binary.LittleEndian.Uint32(b)
}
