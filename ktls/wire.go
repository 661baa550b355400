package ktls

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"slices"
)

// wire is the connection as crypto/tls sees it during the handshake. It gives no
// byte past the record that was asked for, so that nothing of the session after
// the handshake is lost in a dropped tls.Conn, takes none off the socket (see
// readAhead), and watches the records that go by
// for what the public API of crypto/tls does not tell: the server's random, and
// how many records each side sent under the session's keys.
//
// Only the goroutine that runs the handshake uses it: crypto/tls reads, writes and
// logs keys there.
type wire struct {
	net.Conn
	client bool

	readAhead
	hdr  [recordHeaderLen]byte // of the record being read
	hdrN int
	left int  // bytes of its body still to come
	keep bool // it may be the ServerHello, so all of it goes to body
	body []byte

	started bool // a first record header was read
	notTLS  bool // and it was none

	hello        helloReader
	in, out      afterCCS
	clientRandom []byte
	master       []byte // TLS 1.2
	clientSecret []byte // TLS 1.3: CLIENT_TRAFFIC_SECRET_0
	serverSecret []byte
	is13         bool // the key log has spoken of TLS 1.3

	// opener counts a TLS 1.3 server's records under the application key: session
	// tickets, of which crypto/tls writes none, one or more with its Finished or
	// after the client's. Which records those are shows only by trying the key.
	opener  *half
	scratch *buffer
	err     error // why the count cannot be trusted

	keyLog io.Writer // the user's own
}

// afterCCS measures the records of one direction after its ChangeCipherSpec in TLS
// 1.2: the Finished, and nothing else if both sides behave. The AEADs of TLS 1.2 do
// not hide lengths, so that there is no need to open anything.
type afterCCS struct {
	ccs   bool
	recs  int
	size  int  // of all records with their headers
	other bool // one was no handshake record
}

var errFinished = errors.New("more than a Finished message after ChangeCipherSpec")

func (a *afterCCS) add(typ recordType, size int) {
	a.recs++
	a.size += size
	a.other = a.other || typ != typeHandshake
}

// NetConn returns the TCP connection, for callbacks that look for it.
func (w *wire) NetConn() net.Conn { return w.Conn }

// Read gives bytes up to the end of a record and not beyond, whatever was received.
func (w *wire) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if len(w.ahead) == 0 {
		if err := w.receive(); err != nil {
			return 0, err
		}
	}
	n := 0
	if w.hdrN < recordHeaderLen {
		n = copy(p[:min(len(p), recordHeaderLen-w.hdrN)], w.ahead)
		copy(w.hdr[w.hdrN:], p[:n])
		w.ahead = w.ahead[n:]
		if w.hdrN += n; w.hdrN == recordHeaderLen {
			w.header() // of a record that may be empty
		}
	}
	if w.hdrN == recordHeaderLen {
		k := copy(p[n:min(len(p), n+w.left)], w.ahead)
		if w.keep {
			w.body = append(w.body, p[n:n+k]...)
		}
		n, w.ahead = n+k, w.ahead[k:]
		if w.left -= k; w.left == 0 {
			w.endRecord()
		}
	}
	w.releaseAhead()
	return n, nil
}

func (w *wire) header() {
	if !w.started {
		w.started = true
		// A server that will have nothing of us begins with an alert.
		typ := recordType(w.hdr[0])
		w.notTLS = typ != typeHandshake && typ != typeAlert || w.hdr[1] != 3
	}
	w.left = int(binary.BigEndian.Uint16(w.hdr[3:]))
	w.answered = false
	w.protected = w.protected || recordType(w.hdr[0]) == typeData || !w.is13 && w.in.ccs
	if !w.is13 && w.in.ccs {
		w.in.add(recordType(w.hdr[0]), recordHeaderLen+w.left)
	}
	w.keep = w.client && !w.is13 && !w.in.ccs && !w.hello.done()
	w.body = w.body[:0]
	if w.left == 0 {
		w.endRecord()
	}
}

func (w *wire) endRecord() {
	w.hdrN = 0
	switch typ := recordType(w.hdr[0]); {
	case w.is13:
	case typ == typeChangeCipherSpec:
		w.in.ccs = true
	case w.keep && typ == typeHandshake:
		w.hello.add(w.body)
	}
}

// Write watches whole records, which is how crypto/tls writes.
func (w *wire) Write(p []byte) (int, error) {
	w.spoke, w.answered = true, true
	for b := p; len(b) > 0; {
		n := recordHeaderLen
		if len(b) >= n {
			n += int(binary.BigEndian.Uint16(b[3:]))
		}
		if len(b) < n {
			w.err = errors.New("crypto/tls wrote a part of a record")
			break
		}
		w.wrote(b[:n])
		b = b[n:]
	}
	return w.Conn.Write(p)
}

func (w *wire) wrote(rec []byte) {
	typ := recordType(rec[0])
	switch {
	case typ == typeHandshake && !w.client && !w.hello.done():
		w.hello.add(rec[recordHeaderLen:])
	case w.is13:
		if typ == typeData && !w.client && w.serverSecret != nil && softwareWorks() == nil {
			w.tryOpen(rec)
		}
	case w.out.ccs:
		w.out.add(typ, len(rec))
	case typ == typeChangeCipherSpec:
		w.out.ccs = true
	}
}

// tryOpen (not with fips140=only, where no tickets are sent) counts rec if it is under the application key: only then does it open,
// and the opener's sequence number moves on.
func (w *wire) tryOpen(rec []byte) {
	if w.opener == nil {
		s, err := lookupSuite(tls.VersionTLS13, w.hello.suite())
		if err != nil {
			w.err = err
			return
		}
		d, err := s.direction13(slices.Clone(w.serverSecret), 0)
		if err != nil {
			w.err = err
			return
		}
		w.opener = &half{suite: s, dir: d}
		w.scratch = getBuffer(midBuf)
	}
	_, _, _ = w.opener.open(rec, w.scratch.b)
}

// keyLogWriter is the wire as tls.Config.KeyLogWriter. It runs under a mutex of
// the whole process, so it does little.
type keyLogWriter struct{ w *wire }

func (k keyLogWriter) Write(line []byte) (int, error) {
	k.w.logged(line)
	if k.w.keyLog != nil {
		return k.w.keyLog.Write(line)
	}
	return len(line), nil
}

// logged takes one line of the key log: label, client random, secret.
func (w *wire) logged(line []byte) {
	label, rest, _ := bytes.Cut(bytes.TrimSuffix(line, []byte("\n")), []byte(" "))
	random, secret, _ := bytes.Cut(rest, []byte(" "))
	switch string(label) {
	case "CLIENT_RANDOM":
		w.master, w.clientRandom = fromHex(secret), fromHex(random)
	case "CLIENT_HANDSHAKE_TRAFFIC_SECRET", "SERVER_HANDSHAKE_TRAFFIC_SECRET":
		w.is13 = true
		w.in, w.out = afterCCS{}, afterCCS{}
	case "CLIENT_TRAFFIC_SECRET_0":
		w.clientSecret = fromHex(secret)
	case "SERVER_TRAFFIC_SECRET_0":
		w.serverSecret = fromHex(secret)
	}
}

// fromHex is nil for what is not hexadecimal.
func fromHex(s []byte) []byte {
	b := make([]byte, hex.DecodedLen(len(s)))
	if _, err := hex.Decode(b, s); err != nil {
		return nil
	}
	return b
}

func (w *wire) wipe() {
	w.ahead = nil
	w.releaseAhead()
	clear(w.master)
	clear(w.clientSecret)
	clear(w.serverSecret)
	if w.opener != nil {
		w.opener.wipe()
		putBuffer(w.scratch)
		w.opener, w.scratch = nil, nil
	}
}

// helloReader collects a ServerHello, whatever records it is cut into, as far as
// its random and its cipher suite (RFC 8446 section 4.1.3, RFC 5246 section
// 7.4.1.3). A HelloRetryRequest has the same form and the same suite.
type helloReader struct {
	b []byte
}

// helloMin is where the session id's length is: type, length, version, random.
const helloMin = 1 + 3 + 2 + 32

func (h *helloReader) done() bool {
	return len(h.b) > helloMin && len(h.b) >= helloMin+1+int(h.b[helloMin])+2
}

func (h *helloReader) add(p []byte) {
	h.b = append(h.b, p[:min(len(p), helloMin+1+255+2)]...)
}

func (h *helloReader) random() []byte { return h.b[6:helloMin] }

func (h *helloReader) suite() uint16 {
	if !h.done() {
		return 0
	}
	return binary.BigEndian.Uint16(h.b[helloMin+1+int(h.b[helloMin]):])
}
