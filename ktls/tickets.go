package ktls

import (
	"crypto/tls"
	"io"
	"net"
	"slices"
	"time"

	"golang.org/x/crypto/cryptobyte"
)

// Session tickets in the client role. In TLS 1.3 they come after the handshake, as
// records of the established session, and only crypto/tls can make a
// tls.ClientSessionState of one: the resumption secret is inside its tls.Conn. So
// where the configuration has a ClientSessionCache, the tls.Conn of the handshake is
// kept for a while, cut off from the socket, and each ticket that the record layer
// opened is sealed again, with the key that tls.Conn expects, and given to it to
// read. Those records never leave this function's memory.

// maxTickets is how many tickets of one session are stored. Servers send one to four.
const maxTickets = 4

// ticketStore gives tickets to crypto/tls. A nil one stores nothing.
type ticketStore struct {
	tc    *tls.Conn
	feed  *feedConn
	seal  half // the server's first sending key, with a sequence of its own
	given int
}

// feedConn is what is left of the connection of a finished handshake: it gives what
// was put in, and takes nothing.
type feedConn struct {
	local, remote net.Addr
	b             []byte
}

func (f *feedConn) Read(p []byte) (int, error) {
	if len(f.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p, f.b)
	f.b = f.b[n:]
	return n, nil
}

func (f *feedConn) Write([]byte) (int, error)      { return 0, net.ErrClosed }
func (*feedConn) Close() error                     { return nil }
func (f *feedConn) LocalAddr() net.Addr            { return f.local }
func (f *feedConn) RemoteAddr() net.Addr           { return f.remote }
func (*feedConn) SetDeadline(time.Time) error      { return nil }
func (*feedConn) SetReadDeadline(time.Time) error  { return nil }
func (*feedConn) SetWriteDeadline(time.Time) error { return nil }

// keepTickets takes tc over when the session may get tickets that somebody wants.
// nil otherwise, and where the software layer's ciphers do not work (fips140=only).
func (w *wire) keepTickets(tc *tls.Conn, p params, user *tls.Config) *ticketStore {
	if !p.client || p.version != tls.VersionTLS13 || w.serverSecret == nil ||
		user.ClientSessionCache == nil || user.SessionTicketsDisabled || softwareWorks() != nil {
		return nil
	}
	suite, err := lookupSuite(p.version, p.suite)
	if err != nil {
		return nil
	}
	dir, err := suite.direction13(slices.Clone(w.serverSecret), 0)
	if err != nil {
		return nil
	}
	t := &ticketStore{tc: tc, seal: half{suite: suite, dir: dir}}
	t.feed = &feedConn{local: w.LocalAddr(), remote: w.RemoteAddr()}
	w.Conn = t.feed
	return t
}

// store gives tc a NewSessionTicket message without its header. It reports whether
// more can come.
func (t *ticketStore) store(body []byte) (more bool) {
	msg := append([]byte{msgNewSessionTicket, byte(len(body) >> 16), byte(len(body) >> 8), byte(len(body))}, body...)
	for len(msg) > 0 {
		n := min(len(msg), maxPlaintext)
		if !t.put(typeHandshake, msg[:n]) {
			return false
		}
		msg = msg[n:]
	}
	// A byte of data makes Read come back.
	var b [1]byte
	if !t.put(typeData, b[:]) {
		return false
	}
	// An error is a ticket that crypto/tls does not like, such as one valid for more
	// than a week. The session does not depend on it.
	if _, err := t.tc.Read(b[:]); err != nil {
		return false
	}
	t.given++
	return t.given < maxTickets
}

func (t *ticketStore) put(typ recordType, p []byte) bool {
	rec := make([]byte, t.seal.sealedLen(len(p)))
	n, err := t.seal.seal(rec, typ, p)
	t.feed.b = append(t.feed.b, rec[:n]...)
	return err == nil
}

func (t *ticketStore) wipe() {
	if t != nil {
		t.seal.wipe()
		t.tc, t.feed = nil, nil
	}
}

// storeTicket is called for each ticket of the client role, under rmu.
func (c *Conn) storeTicket(body []byte) {
	if c.tickets != nil && !c.tickets.store(body) {
		c.dropTickets()
	}
}

// dropTickets frees what is kept for tickets.
func (c *Conn) dropTickets() {
	c.tickets.wipe()
	c.tickets = nil
}

// Extensions of a NewSessionTicket that are looked at.
const (
	extEarlyData = 42
	extTLSFlags  = 62 // draft-ietf-tls-tlsflags
)

// checkTicket checks the form of a NewSessionTicket (RFC 8446 sections 4.2 and 4.6.1),
// stored or not.
func checkTicket(b []byte) *recordError {
	malformed := &recordError{alertDecodeError, "malformed NewSessionTicket"}
	var (
		lifetime, ageAdd          uint32
		nonce, ticket, extensions cryptobyte.String
	)
	s := cryptobyte.String(b)
	if !s.ReadUint32(&lifetime) || !s.ReadUint32(&ageAdd) || !s.ReadUint8LengthPrefixed(&nonce) ||
		!s.ReadUint16LengthPrefixed(&ticket) || len(ticket) == 0 ||
		!s.ReadUint16LengthPrefixed(&extensions) || !s.Empty() {
		return malformed
	}
	var seen []uint16
	for !extensions.Empty() {
		var typ uint16
		var data cryptobyte.String
		if !extensions.ReadUint16(&typ) || !extensions.ReadUint16LengthPrefixed(&data) {
			return malformed
		}
		if slices.Contains(seen, typ) {
			return &recordError{alertIllegalParameter, "NewSessionTicket with an extension twice"}
		}
		if len(seen) >= maxTicketExtensions {
			return malformed
		}
		seen = append(seen, typ)
		switch typ {
		case extEarlyData:
			if len(data) != 4 {
				return malformed
			}
		case extTLSFlags:
			var flags cryptobyte.String
			if !data.ReadUint8LengthPrefixed(&flags) || len(flags) == 0 || !data.Empty() {
				return malformed
			}
			if flags[len(flags)-1] == 0 {
				return &recordError{alertIllegalParameter, "NewSessionTicket with flags that are not minimal"}
			}
		}
	}
	return nil
}

// maxTicketExtensions bounds the search for one that comes twice.
const maxTicketExtensions = 64
