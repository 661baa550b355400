package ktls

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/ktlsvisor/ktlsvisor/internal/fault"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// Import continues a session that Detach ended, in this process or another. On
// success the Conn owns sock; on error the caller still does. facts and record are
// checked in full, and in the kernel layer the socket itself too: it must have
// keys of that version and suite in both directions. A record may be imported
// once; who had it before must not use it any more. Import does not touch the
// socket's deadlines.
func Import(sock Socket, facts, record []byte) (*Conn, error) {
	fault.Step("before-import")
	c, err := importSession(sock, facts, record)
	fault.Step("after-import")
	if err != nil {
		return nil, fmt.Errorf("import session: %w", err)
	}
	return c, nil
}

func importSession(sock Socket, factsData, recordData []byte) (*Conn, error) {
	if sock == nil {
		return nil, errors.New("no socket")
	}
	f, err := decodeFacts(factsData)
	if err != nil {
		return nil, fmt.Errorf("facts: %w", err)
	}
	d := decodedRecords.Get().(*decodedRecord)
	defer d.release()
	r := &d.record
	if err := d.decode(recordData); err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	if err := r.check(f); err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	if err := checkTCP(sock, f.Layer); err != nil {
		return nil, err
	}
	layer, err := d.layer(sock, f)
	if err != nil {
		return nil, err
	}
	c := newConn(sock, layer, f.params(), f)
	if err := c.addresses(); err != nil {
		layer.wipe()
		return nil, err
	}
	r.restore(c)
	return c, nil
}

// decodedRecord is a record with places for its keys, and for what its layer takes from
// it. Those of a process that adopts thousands of sessions are used again.
type decodedRecord struct {
	record
	tx, rx keys
	state  layerState
}

var decodedRecords = sync.Pool{New: func() any { return new(decodedRecord) }}

// release wipes the keys, of which the layer has its own copy.
func (d *decodedRecord) release() {
	for _, k := range []*keys{d.TX, d.RX, &d.tx, &d.rx} {
		k.wipe()
	}
	*d = decodedRecord{}
	decodedRecords.Put(d)
}

func (d *decodedRecord) decode(b []byte) error {
	if len(b) > maxRecord {
		return fmt.Errorf("%d bytes, the limit is %d", len(b), maxRecord)
	}
	if d.read(b) {
		return nil
	}
	r := &record{}
	if err := cborDecode.Unmarshal(b, r); err != nil {
		r.TX.wipe()
		r.RX.wipe()
		return err
	}
	d.record = *r
	return nil
}

// check checks everything but keys, which the layer's constructor does.
func (r *record) check(f *facts) error {
	switch {
	case r.V < 1 || r.V > recordVersion:
		return fmt.Errorf("encoding version %d, this program reads up to %d", r.V, recordVersion)
	case !bytes.Equal(r.ID, f.ID):
		return errors.New("belongs to another session than the facts")
	case r.Layer != f.Layer:
		return fmt.Errorf("is of the %s layer, the facts of the %s layer", r.Layer, f.Layer)
	case r.Layer == LayerKernel && (r.TX != nil || r.RX != nil || len(r.Raw)+len(r.Plain)+len(r.Sealed) > 0):
		return errors.New("of the kernel layer with keys or ciphertext in it")
	case r.Layer == LayerSoftware && (r.CtlTyp != 0 || len(r.Ctl) > 0):
		return errors.New("of the software layer with a half control record")
	case len(r.Raw) > bigBuf:
		return fmt.Errorf("%d received bytes, the limit is %d", len(r.Raw), bigBuf)
	case len(r.Plain) > maxPlaintext, len(r.Ctl) > maxPlaintext:
		return errors.New("more opened bytes than a record holds")
	case len(r.Sealed) > 2*bigBuf:
		return fmt.Errorf("%d sealed bytes, the limit is %d", len(r.Sealed), 2*bigBuf)
	case len(r.Queued) > MaxQueued+splicePipe:
		return ErrQueueFull
	case len(r.Hand) > maxHandshakeMessage+maxPlaintext:
		return errors.New("half handshake message too long")
	case r.Asked > 1<<20:
		return fmt.Errorf("%d requested KeyUpdates", r.Asked)
	case r.RXEnd > endFIN || r.TXEnd > endFIN:
		return errors.New("unknown end of a direction")
	case r.Owed&^(owedUpdate|owedAsk|owedNoReneg) != 0:
		// A session that owes its last alert has ended and cannot be detached.
		return fmt.Errorf("unknown flags %#x", r.Owed)
	case r.Owed&(owedUpdate|owedAsk) != 0 && f.Version != tls.VersionTLS13:
		return errors.New("with a KeyUpdate to send that it cannot send")
	}
	return nil
}

// layer makes the record layer, checking what is its own.
func (d *decodedRecord) layer(sock Socket, f *facts) (recordLayer, error) {
	r, st := &d.record, &d.state
	*st = layerState{raw: r.Raw, plain: r.Plain, sealed: r.Sealed, ctl: r.Ctl, typ: r.CtlTyp, wire: r.Wire, wireSeq: r.WireSeq, rxPos: r.RXPos, txPos: r.TXPos, alerted: r.TXEnd != endOpen}
	if r.Layer == LayerKernel {
		return importKernelLayer(sock, f.params(), st)
	}
	suite, err := lookupSuite(f.Version, f.Suite)
	if err != nil {
		return nil, err
	}
	tx, err := r.TX.direction(suite)
	if err != nil {
		return nil, fmt.Errorf("sending keys: %w", err)
	}
	rx, err := r.RX.direction(suite)
	if err != nil {
		tx.wipe()
		return nil, fmt.Errorf("receiving keys: %w", err)
	}
	l, err := newSoftLayer(sock, f.params(), tx, rx)
	if err != nil {
		tx.wipe()
		rx.wipe()
		return nil, err
	}
	l.restore(st)
	return l, nil
}

// restore puts the rest of the record's state into a new Conn.
func (r *record) restore(c *Conn) {
	c.unread, c.queued, c.hand = r.Unread, r.Queued, r.Hand
	c.rxEnd, c.txEnd = r.RXEnd, r.TXEnd
	switch r.RXEnd {
	case endNotify:
		c.rerr = io.EOF
	case endFIN:
		c.rerr = ErrTruncated
	}
	if r.TXEnd != endOpen {
		c.werr = errWriteClosed
	}
	c.owed.Store(r.Owed)
	c.asked.Store(r.Asked)
	c.rxUsed, c.txUsed, c.rxGen, c.txGen = r.RXUsed, r.TXUsed, r.RXGen, r.TXGen
	if l, ok := c.layer.(*kernelLayer); ok && !l.wire.known {
		tx, rx := l.used()
		c.txUsed, c.rxUsed = max(c.txUsed, tx), max(c.rxUsed, rx)
	}
	c.floods = floods{r.Empties, r.Warnings, r.Handshakes}
	c.noteBuffered()
	c.notePending()
}

// checkTCP makes sure that sock is a TCP socket. The software layer also runs over
// multipath TCP, which Go's listeners use by default where the kernel has it.
func checkTCP(sock Socket, layer Layer) error {
	if s, ok := sock.(interface{ IsTCP() bool }); ok && s.IsTCP() {
		return nil // its owner has looked already
	}
	rc, err := sock.SyscallConn()
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	ok := false
	if err := rc.Control(func(fd uintptr) {
		ok = sys.IsTCP(int(fd)) || layer == LayerSoftware && sys.IsMPTCP(int(fd))
	}); err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	if !ok {
		return errors.New("the descriptor is not a TCP socket")
	}
	return nil
}
