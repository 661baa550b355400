package ktls

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// Errors of RecoverJournal. Any other error means that the state of the session is in
// doubt, so that nobody may go on with it.
var (
	// ErrNoJournal: the owner kept none of this session.
	ErrNoJournal = errors.New("its owner kept no journal of it")
	// ErrConnectionGone: its owner had closed the connection.
	ErrConnectionGone = errors.New("the connection had ended")
)

// Journals are those of a dead owner. Nothing in them is believed that was not checked,
// but who wrote them knew the sessions' keys anyhow.
type Journals struct {
	mem   []byte
	slots map[JournalKey]int
}

// OpenJournals looks through an arena whose owner was seen dead. mem must stay mapped
// as long as the result is used, and nobody may write it.
func OpenJournals(mem []byte) (*Journals, error) {
	n, err := checkArena(mem)
	if err != nil {
		return nil, err
	}
	j := &Journals{mem: mem, slots: map[JournalKey]int{}}
	for i := range usedSlots(mem, n) {
		m := j.slot(i)
		var h slotHead
		if sys.LoadShared(m) == stateLive && h.load(m) {
			j.slots[h.key] = i
		}
	}
	return j, nil
}

func (j *Journals) slot(i int) []byte { return j.mem[arenaHeader+i*slotSize:][:slotSize:slotSize] }

// Len is the number of journals found.
func (j *Journals) Len() int { return len(j.slots) }

// Recovered is what was found out about a session.
type Recovered struct {
	Record []byte // for Import; a secret, void once it was imported
	// Unsent and Unread are how many sealed and received bytes the dead owner left.
	Unsent, Unread int
	// Read and Written count the plaintext that the owner's application was given and
	// that was sealed for it, since it got the session.
	Read, Written uint64

	born uint64 // see cmBorn
}

// Recover makes the record of a session for its next owner from the journal, its facts
// and its socket, of which fd is a duplicate. The owner must have been seen dead, and
// nobody may use the socket before the result is imported. It does not own fd.
func (j *Journals) Recover(key JournalKey, facts []byte, fd int) (*Recovered, error) {
	at, err := sys.PositionTCP(fd)
	if err != nil {
		return nil, fmt.Errorf("recover session %d: %w", key.ID, err)
	}
	r, err := j.recover(key, facts, at)
	if err != nil {
		return nil, fmt.Errorf("recover session %d: %w", key.ID, err)
	}
	return r, nil
}

func (j *Journals) recover(key JournalKey, factsData []byte, at sys.TCPPosition) (*Recovered, error) {
	i, ok := j.slots[key]
	if !ok {
		return nil, ErrNoJournal
	}
	// One look at memory, so that what is checked is what is used.
	m := append(make([]byte, 0, slotSize), j.slot(i)...)
	defer clear(m)
	f, err := decodeFacts(factsData)
	if err != nil {
		return nil, fmt.Errorf("facts: %w", err)
	}
	var h slotHead
	if !h.load(m) || h.key != key {
		return nil, errors.New("its journal is damaged")
	}
	if string(h.session[:]) != string(f.ID) || h.version != f.Version || h.suite != f.Suite || h.client != f.Client {
		return nil, errors.New("its journal is of another session")
	}
	suite, err := lookupSuite(f.Version, f.Suite)
	if err != nil {
		return nil, err
	}
	rec := &record{V: recordVersion, ID: f.ID, Layer: LayerSoftware}
	defer func() { rec.TX.wipe(); rec.RX.wipe() }()
	out := &Recovered{}
	if err := j.receiving(m, key.ID, suite, at, rec, out); err != nil {
		return nil, fmt.Errorf("receiving: %w", err)
	}
	if err := j.sending(m, key.ID, suite, at, rec, out); err != nil {
		return nil, fmt.Errorf("sending: %w", err)
	}
	if at.Shut {
		return nil, ErrConnectionGone
	}
	if err := rec.check(f); err != nil {
		return nil, err
	}
	if out.Record = rec.encode(make([]byte, 0, rec.size())); len(out.Record) > maxRecord {
		clear(out.Record)
		return nil, fmt.Errorf("%d bytes are left of it, the limit is %d", len(out.Record), maxRecord)
	}
	return out, nil
}

// chunk returns the bytes [from, to) behind a chunk reference.
func (j *Journals) chunk(ref uint64, from, to uint64) ([]byte, error) {
	page, size := ref>>32, ref&0xffffffff
	n, _ := checkArena(j.mem)
	if from > to || to > size || size > maxRecord || page*arenaPage < uint64(chunksAt(n)) || page*arenaPage+size > uint64(len(j.mem)) {
		return nil, errors.New("its journal refers to what is not there")
	}
	b := j.mem[page*arenaPage:][:size]
	return append([]byte(nil), b[from:to]...), nil
}

func (j *Journals) receiving(m []byte, id uint64, suite *suiteInfo, at sys.TCPPosition, rec *record, out *Recovered) error {
	var w, cm words
	if err := w.load(m, id, regRX); err != nil {
		return err
	}
	if err := cm.load(m, id, regCommit); err != nil {
		return err
	}
	read := at.Read
	if at.Closed && read > w[rxOff] {
		read = j.withoutFIN(&w, read)
	}
	d, err := loadKey(m, regRX, w[rxFlags]&flagKey1 != 0, suite, w[rxSeq])
	if err != nil {
		return err
	}
	defer d.wipe()
	if read < w[rxOff] {
		return fmt.Errorf("%d bytes were received, and %d used", read, w[rxOff])
	}
	if n := read - w[rxOff]; n > 0 {
		if w[rxOff] < w[rxBase] || n > bigBuf {
			return errors.New("received bytes are missing in its journal")
		}
		if rec.Raw, err = j.chunk(w[rxChunk], w[rxOff]-w[rxBase], read-w[rxBase]); err != nil {
			return err
		}
	}
	half := half{suite: suite, dir: d, used: w[rxUsed]}
	if skip := int(w[rxFlags] >> rxSkipShift & 0xffff); skip > 0 {
		if err := reopen(&half, rec, skip); err != nil {
			return err
		}
	}
	if from, to := w[rxUnreadAt]>>32, w[rxUnreadAt]&0xffffffff; from != to {
		if rec.Unread, err = j.chunk(w[rxUnread], from, to); err != nil {
			return err
		}
	}
	switch {
	case w[rxFlags]&flagFIN != 0:
		rec.RXEnd = endFIN
	case w[rxFlags]&flagNotify != 0:
		rec.RXEnd = endNotify
	}
	rec.RX = newKeys(&half.dir, half.dir.seq, w[rxGen])
	rec.RXUsed, rec.RXGen, rec.RXPos = half.used, w[rxGen], read+1
	rec.Empties, rec.Warnings, rec.Handshakes = uint8(w[rxFlags]>>8), uint8(w[rxFlags]>>16), uint8(w[rxFlags]>>24)
	w.debts(m, id, rec)
	out.Read, out.born = w[rxCount], cm[cmBorn]
	out.Unread = len(rec.Raw) + len(rec.Plain) + len(rec.Unread)
	return nil
}

// reopen opens the first record again, of which skip bytes were delivered.
func reopen(h *half, rec *record, skip int) error {
	if len(rec.Raw) < recordHeaderLen {
		return errors.New("the record that was being read is not there")
	}
	n, rerr := h.checkHeader(rec.Raw)
	if rerr != nil {
		return rerr
	}
	n += recordHeaderLen
	if len(rec.Raw) < n {
		return errors.New("the record that was being read is not there")
	}
	typ, plain, err := h.open(rec.Raw[:n], make([]byte, n))
	if err != nil {
		return err
	}
	if typ != typeData || skip > len(plain) {
		return errors.New("the record that was being read is another")
	}
	rec.Plain, rec.Raw = plain[skip:], rec.Raw[n:]
	return nil
}

// withoutFIN is the read position of a connection that has ended both ways, whose
// counters do not say whether a FIN is among them: if so, what was received ends one byte
// earlier. Nothing more comes, so that the byte matters only for whether the last
// record is whole.
func (j *Journals) withoutFIN(w *words, read uint64) uint64 {
	n := read - w[rxOff]
	if w[rxOff] < w[rxBase] || n > bigBuf {
		return read
	}
	raw, err := j.chunk(w[rxChunk], w[rxOff]-w[rxBase], read-w[rxBase])
	if err != nil {
		return read
	}
	for len(raw) >= recordHeaderLen {
		k := recordHeaderLen + int(binary.BigEndian.Uint16(raw[3:]))
		if len(raw) < k {
			break
		}
		raw = raw[k:]
	}
	if len(raw) == 0 {
		return read
	}
	return read - 1
}

// debts fills in what each side has asked for and not been given.
func (w *words) debts(m []byte, id uint64, rec *record) {
	var tx words
	if tx.load(m, id, regTX) != nil {
		return // which sending complains about
	}
	if int32(uint32(w[rxOwed]>>32)-uint32(tx[txPaid]>>32)) > 0 {
		rec.Owed |= owedUpdate
	}
	if int32(uint32(w[rxOwed])-uint32(tx[txPaid])) > 0 {
		rec.Owed |= owedNoReneg
	}
	if n := int16(uint16(tx[txAsked]) - uint16(w[rxFlags]>>rxAnsweredShift)); n > 0 {
		rec.Asked = uint32(n)
	}
}

func (j *Journals) sending(m []byte, id uint64, suite *suiteInfo, at sys.TCPPosition, rec *record, out *Recovered) error {
	var w words
	if err := w.load(m, id, regTX); err != nil {
		return err
	}
	d, err := loadKey(m, regTX, w[txFlags]&flagKey1 != 0, suite, w[txSeq])
	if err != nil {
		return err
	}
	defer func() { d.wipe() }()
	if w[txFlags]&flagRekey != 0 {
		next, err := suite.next(&d)
		if err != nil {
			return err
		}
		d.wipe()
		d = next
		w[txGen]++
		w[txUsed] = 0
	}
	written := at.Written
	switch {
	case at.Closed:
		written = w[txOff] // nothing goes out any more
	case written > w[txOff]:
		return fmt.Errorf("%d bytes were sent, %d are in its journal", written, w[txOff])
	}
	if written < w[txOff] {
		if written < w[txBase] {
			return errors.New("bytes to be sent are missing in its journal")
		}
		if rec.Sealed, err = j.chunk(w[txChunk], written-w[txBase], w[txOff]-w[txBase]); err != nil {
			return err
		}
	}
	if from, to := w[txQueueAt]>>32, w[txQueueAt]&0xffffffff; from != to {
		if rec.Queued, err = j.chunk(w[txQueue], from, to); err != nil {
			return err
		}
	}
	switch {
	case at.SentFIN, w[txFlags]&flagFIN != 0:
		rec.TXEnd = endFIN
	case w[txFlags]&flagEnded != 0:
		rec.TXEnd = endNotify
	}
	if rec.TXEnd != endOpen {
		rec.Owed = 0
	}
	rec.TX = newKeys(&d, w[txSeq], w[txGen])
	if w[txFlags]&flagRekey != 0 {
		rec.TX.Seq = 0
	}
	rec.TXUsed, rec.TXGen, rec.TXPos = w[txUsed], w[txGen], written+1
	out.Written = w[txPlain]
	out.Unsent = len(rec.Sealed) + len(rec.Queued)
	return nil
}
