package ktls

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// CommitLog is what the sessions of a process that was seen dead had committed.
type CommitLog struct {
	mem   []byte
	slots map[JournalKey][]int
}

// commitCopy is one slot's content.
type commitCopy struct {
	born     uint64
	state    []byte
	exact    bool
	kept     bool   // input and output, too
	in       []byte // from the last commit on
	consumed uint64 // count at in[0]
	inEnd    uint64 // kernel layer: up to which count in is there
	out      []byte
	outBase  uint64
	sent     uint64 // kernel layer
	ended    ending
	err      error // it cannot be trusted
}

// OpenCommits looks through an arena whose owner was seen dead for what was committed.
// mem must stay mapped as long as the result is used.
func OpenCommits(mem []byte) (*CommitLog, error) {
	n, err := checkArena(mem)
	if err != nil {
		return nil, err
	}
	l := &CommitLog{mem: mem, slots: map[JournalKey][]int{}}
	for i := range usedSlots(mem, n) {
		m := l.slot(i)
		state := sys.LoadShared(m)
		if state != stateCommit {
			continue
		}
		if rec, ok := newestCommit(m); ok {
			key := JournalKey{rec.id, rec.epoch}
			l.slots[key] = append(l.slots[key], i)
		}
	}
	return l, nil
}

func (l *CommitLog) slot(i int) []byte { return l.mem[arenaHeader+i*slotSize:][:slotSize:slotSize] }

// Len is the number of sessions in the log.
func (l *CommitLog) Len() int { return len(l.slots) }

// of returns a copy of what goes with a journal, or, in the kernel layer, of the last.
func (l *CommitLog) of(key JournalKey, journal *Recovered) *commitCopy {
	var last *commitCopy
	for _, i := range l.slots[key] {
		// One look at memory, so that what is checked is what is used.
		m := append(make([]byte, 0, slotSize), l.slot(i)...)
		rec, ok := newestCommit(m)
		if !ok || rec.id != key.ID || rec.epoch != key.Epoch || journal != nil && rec.born != journal.born || last != nil && last.born > rec.born {
			continue
		}
		last = &commitCopy{born: rec.born, kept: rec.flags&commitStateOnly == 0, consumed: rec.consumed, outBase: rec.outBase}
		last.err = last.read(l.mem, m, rec)
	}
	return last
}

// newestCommit returns the newer intact entry.
func newestCommit(m []byte) (commitRecord, bool) {
	var a, b commitRecord
	aok, bok := a.load(m[commitEntry:]), b.load(m[commitEntry+commitEntryLen:])
	if !aok || bok && b.seq > a.seq {
		a, aok = b, bok
	}
	return a, aok
}

var errNotThere = errors.New("it refers to what is not there")

// read copies what a slot refers to. mem may be written by whom the owner gave it
// to, so lengths are checked, and bytes copied once.
func (k *commitCopy) read(mem, m []byte, rec commitRecord) (err error) {
	slots, err := checkArena(mem)
	if err != nil {
		return err
	}
	word := func(at int) uint64 { return binary.LittleEndian.Uint64(m[at:]) }
	chunk := func(ref, from, to uint64) ([]byte, error) {
		page, size := ref>>32, ref&0xffffffff
		if from > to || to > size || size > maxRecord || page*arenaPage < uint64(chunksAt(slots)) || page*arenaPage+size > uint64(len(mem)) {
			return nil, errNotThere
		}
		return append([]byte(nil), mem[page*arenaPage:][from:to]...), nil
	}
	if rec.flags&commitHasState != 0 {
		k.state = []byte{}
		if rec.stateLen > 0 {
			if k.state, err = chunk(rec.state, 0, uint64(rec.stateLen)); err != nil {
				return err
			}
		}
	}
	if !k.kept {
		return nil
	}
	k.exact = word(wordPlain) <= rec.commits

	var alert []byte
	k.inEnd = word(wordReceived)
	note := sys.ReadNote(m[commitNoteRX:])
	if word(wordCalled) == k.inEnd {
		switch {
		case note.Doubt:
			return errors.New("how much the last receive took is not known")
		case note.N > 0 && note.Type == int(typeData):
			k.inEnd += uint64(note.N)
		case note.N == alertLen && note.Type == int(typeAlert):
			// The owner died before it could say what alert it had got. It lies where input
			// would.
			if at := k.inEnd - rec.inBase; rec.in != 0 && at <= MaxUncommitted+bigBuf {
				if alert, err = chunk(rec.in, at, at+alertLen); err != nil {
					return err
				}
			}
		}
	}
	k.sent = word(wordSent)
	note = sys.ReadNote(m[commitNoteTX:])
	if word(wordSending) == k.sent {
		if note.Doubt {
			return errors.New("how much the last send took is not known")
		}
		k.sent += uint64(note.N)
	}
	k.ended = ending(min(word(wordEnded), uint64(endFIN)))
	if k.ended == endOpen && isCloseNotify(alert) {
		k.ended = endNotify
	}
	if rec.in != 0 && rec.consumed >= rec.inBase {
		from := rec.consumed - rec.inBase
		if size := rec.in & 0xffffffff; from < size {
			// The software layer's journal says how far it is good.
			if k.in, err = chunk(rec.in, from, size); err != nil {
				return err
			}
		}
	}
	if rec.outLen > 0 && k.outBase+uint64(rec.outLen) > min(k.sent, k.outBase) {
		if k.out, err = chunk(rec.out, 0, uint64(rec.outLen)); err != nil {
			return err
		}
	}
	return nil
}

// alertLen is the length of an alert (RFC 8446 section 6).
const alertLen = 2

// isCloseNotify goes by what Conn.handleAlert does.
func isCloseNotify(alert []byte) bool {
	return len(alert) == alertLen && (alert[0] == levelWarning || alert[0] == levelFatal) && Alert(alert[1]) == alertCloseNotify
}

// Committed is what the next owner of a session goes on from.
type Committed struct {
	// Record is for Import; a secret, if that which it was made of was one.
	Record []byte
	// State is the state of the last commit, nil when there was none.
	State []byte
	// Exact: nothing is lost to the application and nothing doubled, if it goes on from
	// State. It is not when only states were kept, or when output went out by Write since
	// the last commit: nobody knows how much of it did.
	Exact bool
	// Again is how many bytes of input will be read again, Unsent how many of committed
	// output the next owner sends.
	Again, Unsent int
}

// Amend says what the next owner of a session gets. record is that of the kernel layer
// as it was when the dead owner got the session, or, with journal not nil, what
// Journals.Recover made of a session of the software layer. nil without an error: nothing
// is known of the session, which had no Commits. An error means that its input or output
// is in doubt.
func (l *CommitLog) Amend(key JournalKey, record []byte, journal *Recovered) (*Committed, error) {
	k := l.of(key, journal)
	if k == nil {
		return nil, nil
	}
	c, err := k.amend(record, journal)
	if err != nil {
		return nil, fmt.Errorf("session %d: what was committed: %w", key.ID, err)
	}
	return c, nil
}

func (k *commitCopy) amend(recordData []byte, journal *Recovered) (*Committed, error) {
	c := &Committed{Record: recordData, State: k.state, Exact: k.exact}
	if k.err != nil || !k.kept {
		return c, k.err
	}
	var d decodedRecord
	if err := d.decode(recordData); err != nil {
		return nil, err
	}
	r := &d.record
	defer r.TX.wipe()
	defer r.RX.wipe()
	end, sent := k.inEnd, k.sent
	if journal != nil {
		end, sent = journal.Read, journal.Written
	} else {
		// Whatever else was in there was taken over by the owner, and is in the commit.
		r.Unread, r.Queued = nil, nil
		if k.ended == endNotify {
			r.RXEnd = endNotify
		}
	}
	if end < k.consumed || end-k.consumed > uint64(len(k.in)) || end-k.consumed > MaxUncommitted+bigBuf {
		return nil, fmt.Errorf("%d bytes of input were read, %d committed, and %d are there", end, k.consumed, len(k.in))
	}
	in, out := k.in[:end-k.consumed], k.out
	r.Unread = append(append([]byte(nil), in...), r.Unread...)
	lead := 0 // plaintext that was queued before the committed output
	switch {
	case sent >= k.outBase:
		out = out[min(sent-k.outBase, uint64(len(out))):]
	case journal == nil:
		return nil, errors.New("less output was sent than before the commit")
	default:
		lead = int(min(k.outBase-sent, uint64(len(r.Queued))))
	}
	if len(out) > 0 {
		q := append([]byte(nil), r.Queued[:lead]...)
		r.Queued = append(append(q, out...), r.Queued[lead:]...)
	}
	c.Record = r.encode(make([]byte, 0, r.size()))
	if len(r.Queued) > MaxQueued+splicePipe || len(c.Record) > maxRecord {
		return nil, errors.New("more input and output is left than a session may have")
	}
	c.Again, c.Unsent = len(in), len(out)
	return c, nil
}
