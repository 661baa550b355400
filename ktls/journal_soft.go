package ktls

import (
	"errors"
	"fmt"
	"slices"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// readJournal is what the receiving half keeps for its journal. Without one it is
// empty, and keep is not used.
type readJournal struct {
	place *Place
	keep  int    // index in buf of the first record that was not wholly delivered
	seq   uint64 // its sequence number
	skip  int    // how much of it was delivered
	gen   uint64
	key1  bool
	ended uint64 // flagNotify, flagFIN: before this owner

	lazy   bool      // the control record before start is done with when read is called again
	hold   bool      // it is not: its message goes on in the next record
	dirty  bool      // the register does not say all of this
	old    []*buffer // free when it does
	opened *buffer   // private memory that plain is in

	floods   *floods // the Conn's, under the same lock
	answered uint16  // KeyUpdates of the peer that we wanted

	unread blob
	count  uint64 // of plaintext bytes delivered
}

// writeJournal is the sending half's.
type writeJournal struct {
	place     *Place
	gen       uint64
	key1      bool
	switchDue bool   // a KeyUpdate is sealed
	ended     uint64 // flagEnded, flagFIN
	paid      uint64
	asked     uint16 // KeyUpdates of the peer that we asked for
	dirty     bool
	old       []*buffer
	queue     blob
	queued    bool // what is sealed now comes from queue
}

// base is the index in buf of the first byte that must stay.
func (r *softReader) base() int {
	if r.j.place != nil {
		return r.j.keep
	}
	return r.start
}

// consumed says that all records before start are done with.
func (r *softReader) consumed() {
	r.j.keep, r.j.seq, r.j.skip, r.j.dirty = r.start, r.dir.seq, 0, true
}

// publish makes the register say how far reading has come.
func (r *softReader) publish() {
	j := &r.j
	j.dirty = false
	if !j.place.off.Load() {
		w := words{
			rxOff: r.pos - uint64(r.end-j.keep), rxSeq: j.seq, rxUsed: r.used, rxGen: j.gen,
			rxFlags: j.ended | uint64(j.skip)<<rxSkipShift | uint64(j.answered)<<rxAnsweredShift | j.floods.bits()<<rxFloodShift,
			rxBase:  r.pos - uint64(r.end),
			rxOwed:  uint64(j.place.updates.Load())<<32 | uint64(j.place.renegs.Load()),
			rxCount: j.count,
		}
		if j.key1 {
			w[rxFlags] |= flagKey1
		}
		if r.buf != nil {
			w[rxChunk] = chunkRef(r.buf)
		}
		if b := &j.unread; b.buf != nil {
			w[rxUnread], w[rxUnreadAt] = chunkRef(b.buf), span(b.from, b.to)
		}
		j.place.publish(regRX, &w)
	}
	for i, b := range j.old {
		j.place.put(b)
		j.old[i] = nil
	}
	j.old = j.old[:0]
}

// retire frees a chunk when the register no longer refers to it.
func (r *softReader) retire(b *buffer) {
	if b != nil {
		r.j.old, r.j.dirty = append(r.j.old, b), true
	}
}

// journalMove puts buf[base:end] to the front of b, or of buf itself, and publishes.
func (r *softReader) journalMove(b *buffer) {
	from := r.j.keep
	shift := from
	old := r.buf
	copy(b.b, old.b[from:r.end])
	r.j.keep, r.start, r.end = 0, r.start-shift, r.end-shift
	if b != old {
		r.buf = b
		r.publish()
		r.j.place.put(old)
		return
	}
	r.publish()
}

// journalRoom is unpark with a journal: room to receive into, published.
func (r *softReader) journalRoom() {
	j := &r.j
	if r.buf == nil {
		r.buf = j.place.get(bigBuf)
		j.keep, r.start, r.end, j.dirty = 0, 0, 0, true
	} else if n := r.end - j.keep; len(r.buf.b) != bigBuf || j.keep > 0 && j.keep < n {
		r.journalMove(j.place.get(bigBuf))
	} else if j.keep > 0 {
		r.journalMove(r.buf) // without overlap: what is published stays until the switch
	}
	if r.end == len(r.buf.b) {
		// A handshake message in so many pieces that they do not fit: whoever sends
		// that goes without a journal.
		j.place.quit()
		j.keep, j.hold = r.start, false
		r.journalMove(r.buf)
	}
	if j.dirty {
		r.publish()
	}
}

// deliver notes that p was given to the reader. The register says so before read returns,
// so that nothing is ever read twice.
func (r *softReader) deliver(p []byte) {
	*r.j.floods = floods{} // as the Conn will
	r.j.count += uint64(len(p))
}

// deliverOpened is deliver for a part of the record before start.
func (r *softReader) deliverOpened(p []byte) {
	r.deliver(p)
	if r.j.skip += len(p); len(r.plain) == 0 {
		r.consumed()
		r.releaseOpened()
		r.plain = nil
	}
	r.publish()
}

// private returns memory to open rec in, when p has no room for all of it.
func (r *softReader) private(rec, p []byte) []byte {
	need := len(rec) - recordHeaderLen - tagLen
	if r.suite.explicitNonce() {
		need -= explicitLen
	}
	if len(p) >= need {
		return p
	}
	if r.j.opened == nil || len(r.j.opened.b) < len(rec) {
		if r.j.opened != nil {
			putBuffer(r.j.opened)
		}
		r.j.opened = getBuffer(len(rec))
	}
	return r.j.opened.b
}

func (r *softReader) releaseOpened() {
	if r.j.opened != nil {
		putBuffer(r.j.opened)
		r.j.opened = nil
	}
}

// publish makes the register say what was sealed.
func (w *softWriter) publish() {
	j := &w.j
	j.dirty = false
	if !j.place.off.Load() {
		v := words{
			txOff: w.sent + uint64(w.end-w.start), txSeq: w.dir.seq, txUsed: w.used, txGen: j.gen,
			txFlags: j.ended, txBase: w.sent - uint64(w.start), txPaid: j.paid, txAsked: uint64(j.asked), txPlain: w.plain,
		}
		if j.key1 {
			v[txFlags] |= flagKey1
		}
		if j.switchDue {
			v[txFlags] |= flagRekey
		}
		if w.buf != nil {
			v[txChunk] = chunkRef(w.buf)
		}
		if b := &j.queue; b.buf != nil {
			v[txQueue], v[txQueueAt] = chunkRef(b.buf), span(b.from, b.to)
		}
		j.place.publish(regTX, &v)
	}
	for i, b := range j.old {
		j.place.put(b)
		j.old[i] = nil
	}
	j.old = j.old[:0]
}

func (w *softWriter) retire(b *buffer) {
	if b != nil {
		w.j.old, w.j.dirty = append(w.j.old, b), true
	}
}

// seals notes what a control record, about to be sealed, will mean to whoever goes on.
func (j *writeJournal) seals(typ recordType, p []byte) {
	switch {
	case typ == typeHandshake && p[0] == msgKeyUpdate:
		j.switchDue = true
		if p[len(p)-1] == 1 {
			j.asked++
		}
		j.paid = uint64(j.place.updates.Load())<<32 | j.paid&0xffffffff
	case typ == typeAlert && len(p) == 2 && (p[0] == levelFatal || Alert(p[1]) == alertCloseNotify):
		j.ended |= flagEnded
	case typ == typeAlert && len(p) == 2 && Alert(p[1]) == alertNoRenegotiation:
		j.paid = j.paid&^0xffffffff | uint64(j.place.renegs.Load())
	}
}

// Journal makes the session keep a journal in p from now on, so that whoever sees this
// process die can go on with the session (RecoverJournal). It is called before the
// session is used: nothing may read, write or push back meanwhile. The Conn must be of
// the software layer, over TCP without multipath. An error leaves the session as it was,
// without a journal, and p to be freed.
//
// If the arena has no room for what the session has in progress, at some later time, the
// journal ends and the session goes on without: see Place.Live.
func (c *Conn) Journal(p *Place) error {
	c.rmu.Lock()
	defer c.rmu.Unlock()
	c.wmu.Lock()
	defer c.wmu.Unlock()
	return c.journalLocked(p)
}

// TryJournal is Journal for a session that is in use, between two Reads: when anything is
// under way with the Conn it does nothing and returns ErrInUse.
func (c *Conn) TryJournal(p *Place) error {
	if !c.rmu.TryLock() {
		return ErrInUse
	}
	defer c.rmu.Unlock()
	if !c.wmu.TryLock() {
		return ErrInUse
	}
	defer c.wmu.Unlock()
	return c.journalLocked(p)
}

func (c *Conn) journalLocked(p *Place) error {
	l, ok := c.layer.(*softLayer)
	switch {
	case c.closed.Load():
		return errClosedJournal
	case !ok:
		return errors.New("journal: the session is in the kernel layer, whose state is in the socket")
	case l.rx.j.place != nil:
		return errors.New("journal: the session has one already")
	case len(c.hand) > 0:
		return errors.New("journal: the session is in the middle of a handshake message")
	}
	if err := l.position(); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	if err := l.begin(c, p); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return nil
}

var errClosedJournal = errors.New("journal: the session is closed")

// Journaled says whether the session has a journal that is kept.
func (c *Conn) Journaled() bool { return c.place.Load().Live() }

// position finds out where in both streams the session is, if nobody before has.
func (l *softLayer) position() error {
	if l.counted {
		return nil
	}
	var at sys.TCPPosition
	var err error
	cerr := l.rc.Control(func(fd uintptr) {
		if !sys.IsTCP(int(fd)) {
			err = errors.New("its socket does not tell how far it has come")
			return
		}
		if err = sys.SetOOBInline(int(fd)); err == nil {
			at, err = sys.PositionTCP(int(fd))
		}
	})
	if err == nil {
		err = cerr
	}
	switch {
	case err != nil:
		return err
	case at.Closed:
		return errors.New("the connection has ended")
	}
	l.rx.pos, l.tx.sent, l.counted = at.Read, at.Written, true
	return nil
}

// begin writes everything there is into the place and makes it valid.
func (l *softLayer) begin(c *Conn, p *Place) error {
	sys.StoreShared(p.m, stateFree)
	clear(p.m[slotEpoch:]) // never without an id: readers stop there
	h := slotHead{key: p.key, version: c.p.version, suite: c.p.suite, client: c.p.client}
	copy(h.session[:], c.facts.ID)
	h.store(p.m)
	p.gens = [3]uint64{}
	r, w := &l.rx, &l.tx

	// What was opened joins what was pushed back: both are read before anything else.
	c.unread = append(slices.Clip(c.unread), r.plain...)
	r.plain = nil
	raw, kept := r.raw(), w.kept()
	var rb, wb *buffer
	var unread, queue blob
	abort := func() error {
		for _, b := range []*buffer{rb, wb, unread.buf, queue.buf} {
			p.put(b)
		}
		return ErrArenaFull
	}
	if len(raw) > 0 {
		rb = p.get(max(len(raw), 1))
		copy(rb.b, raw)
	}
	if len(kept) > 0 {
		wb = p.get(len(kept))
		copy(wb.b, kept)
	}
	if len(c.unread) > 0 {
		unread.add(p, c.unread)
	}
	if plain := c.queued[c.commits.ahead():]; len(plain) > 0 {
		queue.add(p, plain)
	}
	if p.off.Load() {
		return abort()
	}
	if owed := c.owed.Load(); owed != 0 {
		if owed&owedUpdate != 0 {
			p.updates.Store(1)
		}
		if owed&owedNoReneg != 0 {
			p.renegs.Store(1)
		}
	}
	if r.buf != nil {
		putBuffer(r.buf)
	}
	r.buf, r.start, r.end = rb, 0, len(raw)
	if w.buf != nil {
		putBuffer(w.buf)
	}
	w.buf, w.start, w.end = wb, 0, len(kept)
	r.used, w.used = c.rxUsed, c.txUsed
	r.j = readJournal{place: p, floods: &c.floods, seq: r.dir.seq, gen: c.rxGen, ended: endFlags(c.rxEnd, flagNotify), unread: unread, count: c.commits.count()}
	w.j = writeJournal{place: p, asked: uint16(c.asked.Load()), gen: c.txGen, ended: endFlags(c.txEnd, flagEnded), queue: queue}
	storeKey(p.m, regRX, false, &r.dir)
	storeKey(p.m, regTX, false, &w.dir)
	r.publish()
	w.publish()
	p.publish(regCommit, &words{cmBorn: c.commits.born()})
	c.place.Store(p)
	sys.StoreShared(p.m, stateLive)
	return nil
}

func endFlags(e ending, notify uint64) uint64 {
	switch e {
	case endNotify:
		return notify
	case endFIN:
		return flagFIN
	}
	return 0
}

// journaledRekeyRead publishes the next receiving key, which begins behind the record
// that read gave last.
func (r *softReader) rekeyed() {
	j := &r.j
	j.key1 = !j.key1
	j.gen++
	j.lazy = false
	r.used = 0
	storeKey(j.place.m, regRX, j.key1, &r.dir)
	r.consumed()
	r.publish()
	clear(keyAt(j.place.m, regRX, !j.key1))
}

// rekeyed publishes the next sending key.
func (w *softWriter) rekeyed() {
	j := &w.j
	j.key1 = !j.key1
	j.gen++
	j.switchDue = false
	w.used = 0
	storeKey(j.place.m, regTX, j.key1, &w.dir)
	w.publish()
	clear(keyAt(j.place.m, regTX, !j.key1))
}

// softJournal is the layer of a Conn that keeps a journal, or nil.
func (c *Conn) softJournal() *softLayer {
	if c.place.Load() == nil {
		return nil
	}
	l, _ := c.layer.(*softLayer)
	return l
}

// tookUnread notes that p was read out of c.unread.
func (c *Conn) tookUnread(p []byte) {
	if l := c.softJournal(); l != nil {
		r := &l.rx
		r.deliver(p)
		r.retire(r.j.unread.take(len(p)))
		r.publish()
	}
}

// setUnread notes what c.unread is after something was pushed back.
func (c *Conn) setUnread() {
	if l := c.softJournal(); l != nil {
		r := &l.rx
		old := r.j.unread.buf
		r.j.unread = blob{}
		r.j.unread.add(r.j.place, c.unread)
		r.retire(old)
		r.publish()
	}
}

// addQueued notes that p was queued.
func (c *Conn) addQueued(p []byte) {
	if l := c.softJournal(); l != nil {
		w := &l.tx
		w.retire(w.j.queue.add(w.j.place, p))
		w.publish()
	}
}

// writeQueued is the layer's write for a part of c.queued.
func (c *Conn) writeQueued(p []byte) (int, error) {
	l := c.softJournal()
	if l == nil {
		return c.layer.write(p)
	}
	l.tx.j.queued = true
	n, err := l.write(p)
	l.tx.j.queued = false
	return n, err
}

// bits are the counts in three bytes.
func (f *floods) bits() uint64 {
	return uint64(f.empties) | uint64(f.warnings)<<8 | uint64(f.handshakes)<<16
}

// noteUpdate tells the journal of the peer's KeyUpdate, before the next key.
func (c *Conn) noteUpdate(request bool) {
	l := c.softJournal()
	if l == nil {
		return
	}
	if request {
		l.rx.j.place.updates.Add(1)
	}
	if c.asked.Load() > 0 {
		l.rx.j.answered++
	}
}

// holdMessage tells the journal whether a handshake message goes on in the next record.
func (c *Conn) holdMessage() {
	if l := c.softJournal(); l != nil {
		l.rx.j.hold = len(c.hand) > 0
	}
}
