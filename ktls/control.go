package ktls

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// What records other than application data mean: RFC 8446 sections 4.6, 5 and 6,
// RFC 5246 sections 7.2 and 7.4.1. The same for both layers.

// Handshake messages that an established session may see.
const (
	msgHelloRequest     = 0
	msgClientHello      = 1
	msgNewSessionTicket = 4
	msgKeyUpdate        = 24
)

const (
	levelWarning = 1
	levelFatal   = 2
)

// Limits on what a peer may send between two pieces of application data, all as
// BoringSSL has them, so that a peer cannot keep a reader busy with nothing.
const (
	maxEmpties    = 32
	maxWarnings   = 4
	maxHandshakes = 32
	// maxHandshakeMessage bounds the memory for a message in several records. A
	// ticket in the client role is the largest legitimate one.
	maxHandshakeMessage = 1<<16 + 1<<10
)

// floods counts what maxEmpties and its neighbours limit.
type floods struct {
	empties, warnings, handshakes uint8
}

// Bits of Conn.owed. A fatal alert's description is in the bits from owedAlertShift.
const (
	owedUpdate     uint32 = 1 << iota // the answer to a KeyUpdate
	owedAsk                           // a KeyUpdate with update_requested
	owedNoReneg                       // warning no_renegotiation
	owedClose                         // close_notify, and nothing after it
	owedFatal                         // fatal alert, and nothing after it
	owedAlertShift = 8
)

// fail ends the session because of what the peer did, and sends the alert as soon
// as the writing side is free.
func (c *Conn) fail(alert Alert, what string) error {
	var err error = &AlertError{Alert: alert, Sent: true, What: what}
	if !c.fatal.CompareAndSwap(nil, &err) {
		return *c.fatal.Load()
	}
	c.owed.Or(owedFatal | uint32(alert)<<owedAlertShift)
	c.settle()
	return err
}

// endCleanly ends both directions with close_notify, for a reason that is not the
// peer's fault.
func (c *Conn) endCleanly(reason error) error {
	if !c.fatal.CompareAndSwap(nil, &reason) {
		return *c.fatal.Load()
	}
	c.owed.Or(owedClose)
	c.settle()
	return reason
}

// endWrite is endCleanly for the writing side, which holds wmu.
func (c *Conn) endWrite(reason error) error {
	if !c.fatal.CompareAndSwap(nil, &reason) {
		return *c.fatal.Load()
	}
	c.owed.Or(owedClose)
	_ = c.payOwed(false)
	return reason
}

// handleData is told of n bytes of application data.
func (c *Conn) handleData(n int) error {
	if len(c.hand) > 0 {
		return c.fail(alertUnexpectedMessage, "application data inside a handshake message")
	}
	c.floods = floods{}
	if c.tickets != nil && c.tickets.given > 0 {
		c.dropTickets() // servers send them all at once
	}
	c.rxUsed += usage(n)
	if c.limit == 0 || c.rxUsed <= c.limit {
		return nil
	}
	switch {
	case !c.layer.canRekey(), c.rxUsed > c.limit+c.limit/4:
		// n was genuine and is given to the caller; the next Read says why no more.
		_ = c.endCleanly(ErrKeyLimit)
	case c.asked.Load() != 0:
	case c.rel != nil:
		c.rel.want(true)
	default:
		c.owed.Or(owedAsk)
	}
	return nil
}

// handleControl handles one record other than non-empty application data.
func (c *Conn) handleControl(ctl control) error {
	if len(c.hand) > 0 && ctl.typ != typeHandshake {
		return c.fail(alertUnexpectedMessage, "another record inside a handshake message")
	}
	switch ctl.typ {
	case 0, typeData:
		if c.floods.empties++; c.floods.empties > maxEmpties {
			return c.fail(alertDecodeError, "too many empty records")
		}
		return nil
	case typeAlert:
		return c.handleAlert(ctl.data)
	case typeHandshake:
		return c.handleHandshake(ctl.data)
	case typeChangeCipherSpec:
		return c.fail(alertUnexpectedMessage, "ChangeCipherSpec in an established session")
	}
	return c.fail(alertUnexpectedMessage, fmt.Sprintf("record of unknown type %d", ctl.typ))
}

func (c *Conn) handleAlert(data []byte) error {
	if len(data) == 0 {
		return c.fail(alertUnexpectedMessage, "empty alert record")
	}
	if len(data) != 2 {
		return c.fail(alertDecodeError, "malformed alert record")
	}
	level, alert := data[0], Alert(data[1])
	if level != levelWarning && level != levelFatal {
		return c.fail(alertIllegalParameter, fmt.Sprintf("alert of level %d", level))
	}
	if alert == alertCloseNotify {
		c.rerr, c.rxEnd = io.EOF, endNotify
		return c.rerr
	}
	// TLS 1.3 has no warnings but user_canceled; the level means nothing there
	// (RFC 8446 section 6).
	if c.p.version == tls.VersionTLS13 && alert == alertUserCanceled ||
		c.p.version == tls.VersionTLS12 && level == levelWarning {
		if c.floods.warnings++; c.floods.warnings > maxWarnings {
			return c.fail(alertDecodeError, "too many warning alerts")
		}
		return nil
	}
	var err error = &AlertError{Alert: alert}
	c.fatal.CompareAndSwap(nil, &err)
	return *c.fatal.Load()
}

func (c *Conn) handleHandshake(data []byte) error {
	if len(data) == 0 {
		return c.fail(alertUnexpectedMessage, "empty handshake record")
	}
	c.hand = append(c.hand, data...)
	first, gen := data[0], c.rxGen
	if err := c.handleMessages(); err != nil {
		return err
	}
	c.holdMessage()
	if first == msgKeyUpdate && c.rxGen == gen && c.layer.canRekey() {
		if err := c.layer.rearm(); err != nil {
			return c.endCleanly(fmt.Errorf("%w: %w", ErrKeyUpdateUnsupported, err))
		}
	}
	return nil
}

// handleMessages handles the whole messages in c.hand.
func (c *Conn) handleMessages() error {
	for len(c.hand) > 0 {
		typ := c.hand[0]
		if !c.expects(typ) {
			return c.fail(alertUnexpectedMessage, fmt.Sprintf("handshake message of type %d in an established session", typ))
		}
		if len(c.hand) < 4 {
			return nil
		}
		n := int(c.hand[1])<<16 | int(binary.BigEndian.Uint16(c.hand[2:]))
		switch {
		case typ == msgKeyUpdate && n != 1, typ == msgHelloRequest && n != 0:
			return c.fail(alertDecodeError, "handshake message of wrong length")
		case n > maxHandshakeMessage:
			return c.fail(alertIllegalParameter, "handshake message too long")
		case len(c.hand) < 4+n:
			return nil
		}
		body := c.hand[4 : 4+n]
		c.hand = c.hand[4+n:]
		if c.floods.handshakes++; c.floods.handshakes > maxHandshakes {
			return c.fail(alertUnexpectedMessage, "too many handshake messages without data")
		}
		if err := c.handleMessage(typ, body); err != nil {
			return err
		}
	}
	c.hand = nil
	return nil
}

// expects reports whether a handshake message of this type is allowed at all, so
// that nothing is collected for one that is not.
func (c *Conn) expects(typ byte) bool {
	switch {
	case c.p.version == tls.VersionTLS13 && c.p.client:
		return typ == msgKeyUpdate || typ == msgNewSessionTicket
	case c.p.version == tls.VersionTLS13:
		return typ == msgKeyUpdate
	case c.p.client:
		return typ == msgHelloRequest
	}
	return typ == msgClientHello
}

func (c *Conn) handleMessage(typ byte, body []byte) error {
	switch typ {
	case msgKeyUpdate:
		return c.handleKeyUpdate(body[0])
	case msgNewSessionTicket:
		if bad := checkTicket(body); bad != nil {
			return c.fail(bad.alert, bad.what)
		}
		c.storeTicket(body)
		return nil
	}
	// TLS 1.2 renegotiation, asked for by either role: the session goes on without
	// (RFC 5246 section 7.2.2).
	if p := c.place.Load(); p != nil {
		p.renegs.Add(1)
	}
	c.owed.Or(owedNoReneg)
	return nil
}

// payOwed sends the control records that the reading side asked for. The caller
// holds wmu. With wait false, what does not go out now stays owed, or is kept
// sealed by the layer.
func (c *Conn) payOwed(wait bool) error {
	for {
		o := c.owed.Load()
		if o == 0 {
			return nil
		}
		if c.txEnd != endOpen || c.werr != nil {
			c.owed.Store(0) // nothing may follow, or nothing can
			return nil
		}
		if c.rel != nil && c.rel.inPause() {
			return errWouldBlock // Continue comes back to it
		}
		if err := c.payOne(o, wait); err != nil {
			c.noteLost(err)
			return err
		}
	}
}

func (c *Conn) payOne(o uint32, wait bool) error {
	var bits uint32
	var taken bool
	var err error
	// The bits go first: one that is set again meanwhile is a new debt.
	pay := func(b uint32) {
		bits = o & b
		c.owed.And(^bits)
	}
	if !wait && o&(owedFatal|owedClose) == 0 && c.layer.unsent() > 0 {
		// A peer that asks and does not read gets its answer when there is room for it;
		// until then one debt stands for all of its questions.
		if err := c.layer.flush(false); err != nil {
			return err
		}
	}
	switch {
	case o&owedFatal != 0:
		pay(^uint32(0))
		taken, err = c.sendAlert(levelFatal, Alert(o>>owedAlertShift), wait)
		c.ended(taken)
	case o&(owedUpdate|owedAsk) != 0 && !c.layer.canRekey():
		pay(owedUpdate | owedAsk) // of an owner before us, who could
		return c.endWrite(ErrKeyUpdateUnsupported)
	case o&(owedUpdate|owedAsk) != 0:
		pay(owedUpdate | owedAsk)
		taken, err = c.sendKeyUpdate(bits&owedAsk != 0, wait)
	case o&owedNoReneg != 0:
		pay(owedNoReneg)
		taken, err = c.sendAlert(levelWarning, alertNoRenegotiation, wait)
	default:
		pay(owedClose)
		taken, err = c.sendAlert(levelWarning, alertCloseNotify, wait)
		c.ended(taken)
	}
	if !taken {
		c.owed.Or(bits)
	}
	return err
}

func (c *Conn) ended(taken bool) {
	if taken {
		c.txEnd, c.werr = endNotify, errWriteClosed
	}
}

// errWriteClosed is what Write says after CloseWrite.
var errWriteClosed = errors.New("session: write after close_notify was sent")

func (c *Conn) sendAlert(level byte, alert Alert, wait bool) (taken bool, err error) {
	taken, err = c.layer.writeControl(typeAlert, []byte{level, byte(alert)}, wait)
	c.txUsed += usage(2)
	return taken, err
}
