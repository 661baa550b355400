package ktls

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"
)

// Relay is told when a session of the kernel layer needs other keys and its owner has
// no secrets to make them of: it passes that to whoever has them. Its methods are
// called with locks of the Conn held: they must neither wait nor call the Conn.
//
// Receiving: after KeyUpdateReceived(n) the Conn reads nothing more until Rekeyed(n).
// Sending, asked for by the peer, by the Conn (KeyUpdateWanted) or by anybody else:
// Pause, then SendKeyUpdate, then the next key is set on a duplicate of the socket,
// then Continue.
type Relay interface {
	// KeyUpdateReceived says that the peer's nth KeyUpdate since SetRelay was read.
	// With requested set, no data is written until a KeyUpdate has been sent.
	KeyUpdateReceived(n uint64, requested bool)
	// KeyUpdateWanted asks for a KeyUpdate to be sent: a key reached its limit of use,
	// or the application wants it. With request set the peer is to change its key too.
	KeyUpdateWanted(request bool)
}

// ErrLent is a session whose keys are being changed; it can be detached when that is
// done, which takes an exchange of messages.
var ErrLent = errors.New("the session's keys are being changed")

// ErrNotPaused is returned by SendKeyUpdate without a Pause.
var ErrNotPaused = errors.New("a KeyUpdate is sent in a pause only")

// relayed is the state of a Conn with a Relay. mu is taken last of all locks.
//
//	           Pause              SendKeyUpdate
//	open ----------------> paused -------------> sent
//	  ^                       |                    |
//	  +------ Continue -------+----- Continue -----+
//
// Data waits while hold, owed or a pause says so; nothing else is written in a pause.
type relayed struct {
	relay  Relay
	mu     sync.Mutex
	change chan struct{} // closed, and another one made, whenever something changes
	rdl    time.Time     // the Conn's deadlines
	wdl    time.Time
	closed bool
	failed error // why the keys could not be changed

	received uint64 // KeyUpdates read
	rekeyed  uint64 // and followed

	hold    bool // Pause waits for a writer
	paused  bool
	sent    bool   // in the pause
	debts   uint64 // requests of the peer's
	paid    uint64
	wanted  bool // KeyUpdateWanted was called and nothing sent since
	request bool // with request set
	updates uint64
	over    bool // nothing can be sent any more, so nobody need wait for a KeyUpdate
}

func (r *relayed) changed() {
	close(r.change)
	r.change = make(chan struct{})
}

// do runs f and wakes whoever waits.
func (r *relayed) do(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
	r.changed()
}

// wait returns when ready says so, with a deadline's error, or when the Conn ends.
func (r *relayed) wait(deadline *time.Time, ready func() bool) error {
	for {
		r.mu.Lock()
		ok, closed, failed, dl, change := ready(), r.closed, r.failed, *deadline, r.change
		r.mu.Unlock()
		switch {
		case closed:
			return net.ErrClosed
		case failed != nil:
			return failed
		case ok:
			return nil
		}
		if dl.IsZero() {
			<-change
			continue
		}
		left := time.Until(dl)
		if left <= 0 {
			return os.ErrDeadlineExceeded
		}
		t := time.NewTimer(left)
		select {
		case <-change:
			t.Stop()
		case <-t.C:
		}
	}
}

// blocked reports that no data may be written. The caller holds mu.
func (r *relayed) blocked() bool {
	return !r.over && (r.hold || r.paused || r.debts > r.paid || r.wanted)
}

// SetRelay leaves changes of the session's keys to r. It is called once, before
// anything else is done with an imported session of the kernel layer; for others,
// and where the session's version has no KeyUpdate, it does nothing.
func (c *Conn) SetRelay(r Relay) {
	l, ok := c.layer.(*kernelLayer)
	if !ok || c.p.version != tls.VersionTLS13 {
		return
	}
	l.relayed = true
	c.rel = &relayed{relay: r, change: make(chan struct{})}
	if c.owed.Load()&owedUpdate != 0 { // of the owner before, and not sent
		c.rel.debts = 1
	}
	if c.owed.Load()&owedAsk != 0 {
		c.rel.wanted, c.rel.request = true, true
	}
	c.owed.And(^(owedUpdate | owedAsk))
}

// Remind calls the relay's methods for what is outstanding: to be used after SetRelay,
// and again when whoever changes the keys was replaced.
func (c *Conn) Remind() {
	r := c.rel
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.received > r.rekeyed {
		r.relay.KeyUpdateReceived(r.received, r.debts > r.paid)
	}
	if r.debts > r.paid || r.wanted {
		r.relay.KeyUpdateWanted(r.request)
	}
}

// Pausing says whether a Pause is in force, and whether its KeyUpdate was sent.
func (c *Conn) Pausing() (paused, sent bool) {
	r := c.rel
	if r == nil {
		return false, false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.paused, r.sent
}

// KeyUpdateRequest reads a KeyUpdate message: whether it asks the peer to change its
// key as well. ok is false for anything else.
func KeyUpdateRequest(msg []byte) (request, ok bool) {
	for _, request := range []bool{false, true} {
		if bytes.Equal(msg, keyUpdateMessage(request)) {
			return request, true
		}
	}
	return false, false
}

// KeyUpdateMessage is what KeyUpdateRequest reads.
func KeyUpdateMessage(request bool) []byte { return keyUpdateMessage(request) }

// Lent reports that a change of keys is under way, so that the session cannot be
// detached now.
func (c *Conn) Lent() bool {
	r := c.rel
	if r == nil {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.paused || r.received > r.rekeyed
}

// AwaitsKeys reports that reading or writing waits for the relay, or is about to.
func (c *Conn) AwaitsKeys() bool {
	r := c.rel
	if r == nil {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.blocked() || r.received > r.rekeyed
}

// keyUpdateReceived is handleKeyUpdate's end in a Conn with a relay.
func (r *relayed) keyUpdateReceived(requested bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.received++
	if requested {
		r.debts++
	}
	r.relay.KeyUpdateReceived(r.received, requested)
}

// followKeyUpdate goes on to the peer's next key.
func (c *Conn) followKeyUpdate(requested bool) error {
	if c.floods.handshakes++; c.floods.handshakes > maxHandshakes {
		return c.fail(alertUnexpectedMessage, "too many handshake messages without data")
	}
	c.rxUsed = 0
	c.rxGen++
	c.rel.keyUpdateReceived(requested)
	return nil
}

// want asks for a KeyUpdate, once until it is sent.
func (r *relayed) want(request bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.wanted && (r.request || !request) {
		return // it was asked for, or will be answered with the one that was
	}
	r.wanted, r.request = true, r.request || request
	r.relay.KeyUpdateWanted(r.request)
}

// Rekeyed says that the key for what follows the peer's nth KeyUpdate is set. Reading
// goes on.
func (c *Conn) Rekeyed(n uint64) {
	if r := c.rel; r != nil {
		r.do(func() { r.rekeyed = max(r.rekeyed, min(n, r.received)) })
	}
}

// RelayFailed ends the session, because its keys could not be changed: err is what
// Read and Write give.
func (c *Conn) RelayFailed(err error) {
	r := c.rel
	if r == nil {
		return
	}
	err = fmt.Errorf("%w: %w", ErrKeyDoubt, err)
	c.fatal.CompareAndSwap(nil, &err)
	r.do(func() { r.failed = err })
}

// Pause stops writing at a record's end: when it returns nil nothing is written until
// Continue, except by SendKeyUpdate. It waits for a Write in progress, which stops
// between two records, and as long as the socket is full.
func (c *Conn) Pause() error {
	r := c.rel
	if r == nil {
		return ErrNoKernelTLS
	}
	r.do(func() { r.hold = true })
	c.wmu.Lock()
	defer c.wmu.Unlock()
	err := c.closeRecord()
	r.do(func() {
		r.hold = false
		if err != nil {
			return
		}
		if err = r.endLocked(c); err != nil {
			r.over = true // an end is final; writers are told which it was
		} else if !r.paused {
			r.paused, r.sent = true, false
		}
	})
	return err
}

// endLocked is why nothing can be sent any more.
func (r *relayed) endLocked(c *Conn) error {
	switch f := c.fatal.Load(); {
	case r.closed || c.closed.Load():
		return net.ErrClosed
	case f != nil:
		return *f
	case c.txEnd != endOpen || c.werr != nil:
		return errWriteClosed
	}
	return nil
}

// closeRecord makes sure that the kernel keeps no record open for more, as it may after
// a copy from a file or pipe that a deadline ended: such a record would get its sequence
// number in the pause, together with the KeyUpdate. The copy left a byte for this in the
// pending output, which was taken from the source before any pause was wanted.
func (c *Conn) closeRecord() error {
	if len(c.queued) == 0 || c.rel.inPause() || c.closed.Load() || c.fatal.Load() != nil || c.werr != nil {
		return nil
	}
	n, err := c.layer.write(c.queued[:1])
	c.txUsed += usage(n)
	c.queued = c.queued[n:]
	if err != nil {
		return c.writeFailed(err)
	}
	return nil
}

// SendKeyUpdate sends a KeyUpdate in a Pause, at most one. An error means that it was
// not sent: the socket had no room until the Conn's write deadline, or the session is
// at its end.
func (c *Conn) SendKeyUpdate(request bool) error {
	r := c.rel
	if r == nil {
		return ErrNoKernelTLS
	}
	c.wmu.Lock()
	defer c.wmu.Unlock()
	var err error
	var debts uint64
	done := false
	r.do(func() {
		err, debts, done = r.endLocked(c), r.debts, r.sent
		if err == nil && !r.paused {
			err = ErrNotPaused
		}
	})
	if err != nil || done {
		return err
	}
	taken, err := c.layer.writeControl(typeHandshake, keyUpdateMessage(request), true)
	c.noteLost(err)
	if !taken {
		if err == nil {
			err = errWouldBlock
		}
		return err
	}
	if l, ok := c.layer.(*kernelLayer); ok {
		l.keyUpdateSent()
	}
	c.txUsed = 0
	c.txGen++
	if request {
		c.asked.Add(1)
	}
	r.do(func() {
		r.sent, r.paid, r.wanted, r.request = true, debts, false, false
		r.updates++
	})
	return nil
}

// Continue ends a Pause. After SendKeyUpdate it is called when the next key is set.
func (c *Conn) Continue() {
	r := c.rel
	if r == nil {
		return
	}
	c.wmu.Lock()
	r.do(func() {
		if r.paused && r.sent {
			if l, ok := c.layer.(*kernelLayer); ok {
				l.wire.rekeyed()
			}
		}
		r.paused, r.sent = false, false
	})
	// What the reading side had to say meanwhile, an alert perhaps.
	c.unlockInner()
}

// awaitKey waits until the key for reading on is set.
func (c *Conn) awaitKey() error {
	return c.rel.wait(&c.rel.rdl, func() bool { return c.rel.rekeyed == c.rel.received })
}

// awaitTurn waits until data may be written, with wmu given up meanwhile. Other writers
// are kept out by turn. What it waited for counts only while it holds wmu again: before,
// another Pause, Detach or Close may have come in between.
func (c *Conn) awaitTurn() error {
	r := c.rel
	for {
		if c.closed.Load() {
			return net.ErrClosed
		}
		r.mu.Lock()
		blocked := r.blocked()
		r.mu.Unlock()
		if !blocked {
			return nil
		}
		c.wmu.Unlock()
		err := r.wait(&r.wdl, func() bool { return !r.blocked() })
		c.wmu.Lock()
		if err != nil {
			return err
		}
	}
}

// keyUpdateByRelay is KeyUpdate in a Conn with a relay.
func (c *Conn) keyUpdateByRelay(request bool) error {
	r := c.rel
	r.mu.Lock()
	before := r.updates
	r.mu.Unlock()
	r.want(request)
	c.wmu.Unlock()
	err := r.wait(&r.wdl, func() bool { return r.over || r.updates > before && !r.blocked() })
	c.wmu.Lock()
	if err != nil {
		return c.writeFailed(err)
	}
	r.mu.Lock()
	done := r.updates > before
	r.mu.Unlock()
	if !done {
		if err = c.writable(); err == nil {
			err = errWriteClosed
		}
	}
	return err
}

// owed is what the next owner owes the peer.
func (r *relayed) owed() (bits uint32) {
	if r == nil {
		return 0
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.debts > r.paid || r.wanted {
		bits = owedUpdate
	}
	if r.wanted && r.request {
		bits |= owedAsk
	}
	return bits
}

// inPause reports that the reading side must not send anything now.
func (r *relayed) inPause() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.paused
}

// deadlines notes the Conn's deadlines; nil: unchanged.
func (r *relayed) deadlines(read, write *time.Time) {
	if r == nil {
		return
	}
	r.do(func() {
		if read != nil {
			r.rdl = *read
		}
		if write != nil {
			r.wdl = *write
		}
	})
}

// end wakes everybody for good.
func (r *relayed) end() {
	if r != nil {
		r.do(func() { r.closed = true })
	}
}

// awaitEndOfPause gives a change of keys the time to come to its end.
func (r *relayed) awaitEndOfPause(limit time.Duration) {
	if r == nil {
		return
	}
	dl := time.Now().Add(limit)
	_ = r.wait(&dl, func() bool { return !r.paused })
}
