package ktls

import (
	"crypto/tls"
	"errors"
)

// readAhead is how a handshake takes more than one record off the socket at once,
// and yet never a byte of the session that follows: that byte belongs to the record
// layer, and in the kernel layer nobody could put it back.
//
// A server that has not spoken may take everything: nobody can finish a handshake
// without its ServerHello. After that, the peer's Finished is still to come, in a
// record of its own kind, and no cutting into records makes that record shorter than
// least says. So that many bytes are the handshake's, behind what is unprotected.
type readAhead struct {
	ahead     []byte  // received and not given; a part of from
	from      *buffer // nil when there is nothing
	spoke     bool    // we have written something
	answered  bool    // and no record has begun since
	protected bool    // a record has begun that may end the handshake
}

var errReadPast = errors.New("more was received than the handshake")

func (r *readAhead) releaseAhead() {
	if r.from != nil && len(r.ahead) == 0 {
		putBuffer(r.from)
		r.ahead, r.from = nil, nil
	}
}

// receive waits for at least one byte.
func (w *wire) receive() error {
	w.from = getBuffer(smallBuf)
	n, err := w.Conn.Read(w.from.b[:min(smallBuf, w.sure())])
	w.ahead = w.from.b[:n]
	if n > 0 {
		return nil // an error comes again
	}
	w.releaseAhead()
	return err
}

// sure is how many of the next bytes belong to the handshake for certain, at least
// one.
func (w *wire) sure() int {
	if !w.client && !w.spoke {
		return smallBuf
	}
	switch inRecord := w.hdrN == recordHeaderLen; {
	case w.protected && inRecord:
		return w.left
	case w.protected:
		return recordHeaderLen - w.hdrN
	case inRecord:
		return w.left + w.least(recordType(w.hdr[0]) == typeChangeCipherSpec)
	}
	return w.least(w.in.ccs) - w.hdrN
}

// least is the smallest number of bytes from the beginning of a record to the end of
// the peer's Finished, while nothing protected has come; ccs says that the
// ChangeCipherSpec of TLS 1.2 has. A Finished cut into several records takes more.
func (w *wire) least(ccs bool) int {
	const (
		finished12   = recordHeaderLen + finishedLen12 + tagLen
		ccsRecord    = recordHeaderLen + 1
		keyExchange  = recordHeaderLen + 4 + 1 + 32 // ClientKeyExchange with X25519
		finishedHead = 4
	)
	var suite *suiteInfo
	if w.hello.done() {
		suite = findSuite(w.hello.suite())
	}
	if suite == nil {
		return finished12 // the shortest of all
	}
	if suite.version == tls.VersionTLS13 {
		return recordHeaderLen + finishedHead + suite.hashLen + 1 + tagLen
	}
	n := finished12
	if suite.explicitNonce() {
		n += explicitLen
	}
	if !ccs {
		n += ccsRecord
		if !w.client && w.answered {
			n += keyExchange // which answers what we wrote
		}
	}
	return n
}
