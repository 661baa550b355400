package ktls

import (
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"testing"
)

// Families 07 to 12 and 16: the form of records, and of tickets.

// kernelHeader: in TLS 1.2 with AES-GCM the kernel takes the explicit nonce for a part
// of the header and looks at nothing before all 13 bytes are there (6.1 to 7.3). A peer
// that sends less is one that stalls in a record, to which deadlines are the answer.
const kernelHeader = "the kernel waits for the 13 bytes of header and explicit nonce"

// Family 07: limits of size (RFC 8446 section 5.2, RFC 5246 section 6.2).
func TestConformanceRecordSize(t *testing.T) {
	header := func(n, body int) func(s *scripted) {
		// A reader that waited for the body would hang: not all of it follows.
		return func(s *scripted) {
			rec := binary.BigEndian.AppendUint16([]byte{byte(typeData), 3, 3}, uint16(n))
			s.sendRaw(append(rec, make([]byte, body)...))
		}
	}
	const tooMuch = maxPlaintext + 1
	runConformance(t, []confCase{
		{name: "plaintext one too long", suites: true, send: func(s *scripted) { s.send(typeData, make([]byte, tooMuch)) }, want: sends(alertRecordOverflow)},
		{name: "alert one too long", send: func(s *scripted) { s.send(typeAlert, make([]byte, tooMuch)) }, want: sends(alertRecordOverflow)},
		{name: "padded to the limit", version: v13, suites: true, send: padded(typeData, 0, maxPlaintext), want: goesOn},
		{name: "padded beyond the limit", version: v13, suites: true, send: padded(typeData, 8193, 8192), want: sends(alertRecordOverflow)},
		{name: "full and padded", version: v13, send: padded(typeData, maxPlaintext, 1), want: sends(alertRecordOverflow)},
		{name: "header of a ciphertext too long", version: v13, send: header(maxPlaintext+256+1, 0), want: sends(alertRecordOverflow)},
		{name: "header of 65535", version: v13, send: header(65535, 0), want: sends(alertRecordOverflow)},
		{name: "no body at all", version: v13, send: header(0, 0), want: sends(alertBadRecordMAC)},
		{name: "header of a ciphertext too long 1.2", version: v12, send: header(maxPlaintext+2048+1, 8), want: sends(alertRecordOverflow)},
		{name: "header of 65535 1.2", version: v12, send: header(65535, 8), want: sends(alertRecordOverflow)},
		{name: "no body at all 1.2", version: v12, suites: true, send: header(0, 8), want: sends(alertBadRecordMAC)},
		{name: "header alone 1.2", version: v12, send: header(65535, 0), want: sends(alertRecordOverflow), notKernel: true, why: kernelHeader},
		{name: "no body and nothing behind 1.2", version: v12, send: header(0, 0), want: sends(alertBadRecordMAC), notKernel: true, why: kernelHeader},
		{name: "no room for a tag", send: func(s *scripted) { s.sendRaw(append([]byte{byte(typeData), 3, 3, 0, 8}, make([]byte, 8)...)) }, want: sends(alertBadRecordMAC)},
	})
}

// Family 08: padding, inner and outer types (RFC 8446 section 5.4).
func TestConformanceTypes(t *testing.T) {
	const kernelPadding = "the kernel calls a record without a type one that does not authenticate"
	outer := func(typ byte) func(s *scripted) {
		return func(s *scripted) {
			s.sendRaw(s.sealInner(typ, tls.VersionTLS12, append([]byte("data"), byte(typeData))))
		}
	}
	cases := []confCase{
		{name: "padded by one", version: v13, suites: true, send: padded(typeData, 0, 1), want: goesOn},
		{name: "padded warning", version: v13, send: func(s *scripted) {
			s.sendRaw(s.sealInner(byte(typeData), tls.VersionTLS12, append([]byte{levelWarning, byte(alertUserCanceled), byte(typeAlert)}, make([]byte, 50)...)))
		}, want: goesOn},
		{name: "nothing but a zero", version: v13, send: sendInner(0), want: sends(alertUnexpectedMessage), kernel: inKernel(sends(alertBadRecordMAC)), why: kernelPadding},
		{name: "nothing but zeros", version: v13, send: sendInner(make([]byte, 100)...), want: sends(alertUnexpectedMessage), kernel: inKernel(sends(alertBadRecordMAC)), why: kernelPadding},
		{name: "nothing but zeros, full", version: v13, send: sendInner(make([]byte, maxPlaintext+1)...), want: sends(alertUnexpectedMessage), kernel: inKernel(sends(alertBadRecordMAC)), why: kernelPadding},
		{name: "not even a type", version: v13, send: sendInner(), want: sends(alertUnexpectedMessage), kernel: inKernel(sends(alertBadRecordMAC)), why: kernelPadding},
		{name: "unprotected data", send: sendBytes(append([]byte{23, 3, 3, 0, 14}, "data in plain!"...)...), want: sends(alertBadRecordMAC)},
		// Anyone on the way can send these; ending the session is all there is to do.
		{name: "unprotected alert", version: v13, send: sendBytes(21, 3, 3, 0, 2, 2, 80), want: sends(alertUnexpectedMessage), kernel: inKernel(sends(alertBadRecordMAC)), why: "too short for the kernel to look at its type"},
		{name: "unprotected ChangeCipherSpec", version: v13, send: sendBytes(20, 3, 3, 0, 1, 1), want: sends(alertUnexpectedMessage), kernel: inKernel(sends(alertBadRecordMAC)), why: "too short for the kernel to look at its type"},
		{name: "unprotected alert 1.2", version: v12, send: sendBytes(21, 3, 3, 0, 2, 2, 80), want: sends(alertBadRecordMAC), notKernel: true, why: kernelHeader},
		{name: "unprotected alert and more 1.2", version: v12, send: sendBytes(append([]byte{21, 3, 3, 0, 2, 2, 80}, make([]byte, 6)...)...), want: sends(alertBadRecordMAC)},
		{name: "unprotected alert and FIN 1.2", version: v12, send: func(s *scripted) {
			s.sendRaw([]byte{21, 3, 3, 0, 2, 2, 80})
			_ = s.c.CloseWrite()
		}, want: sends(alertBadRecordMAC), kernel: inKernel(ends(ErrTruncated)), why: kernelHeader},
	}
	for _, typ := range []byte{20, 24, 25, 99, 128, 255} {
		cases = append(cases, confCase{name: fmt.Sprintf("type %d", typ), send: sendAll(recordType(typ), "\x01"), want: sends(alertUnexpectedMessage)},
			confCase{name: fmt.Sprintf("type %d, empty", typ), send: sendAll(recordType(typ), ""), want: sends(alertUnexpectedMessage)})
	}
	for _, typ := range []byte{0, 20, 21, 22, 24, 255} {
		cases = append(cases, confCase{name: fmt.Sprintf("data in a record of type %d", typ), version: v13, send: outer(typ), want: sends(alertUnexpectedMessage),
			kernel: inKernel(sends(alertBadRecordMAC)), why: "the kernel takes 23 for the outer type, and authenticates that"})
	}
	runConformance(t, cases)
}

// Family 09: the version in a record's header.
func TestConformanceRecordVersion(t *testing.T) {
	var cases []confCase
	for _, v := range []uint16{0, 0x0003, 0x0200, tls.VersionTLS10, tls.VersionTLS11, tls.VersionTLS13, 0x03ff, 0x1303, 0xfefd} {
		cases = append(cases, confCase{name: fmt.Sprintf("%#04x", v), send: func(s *scripted) {
			rec := s.seal(typeData, []byte("x"))
			binary.BigEndian.PutUint16(rec[1:], v)
			s.sendRaw(rec)
		}, want: sends(alertProtocolVersion)})
	}
	runConformance(t, cases)
}

// Family 11: a record damaged anywhere, lost, doubled, or out of order.
func TestConformanceDamagedRecords(t *testing.T) {
	damage := func(at int) func(s *scripted) {
		return func(s *scripted) {
			rec := s.seal(typeData, pattern(200))
			i := at
			if i < 0 {
				i += len(rec)
			}
			rec[i] ^= 0x40
			s.sendRaw(rec)
		}
	}
	bad, version := sends(alertBadRecordMAC), sends(alertProtocolVersion)
	cases := []confCase{
		{name: "type", version: v12, suites: true, send: damage(0), want: bad},
		{name: "type 1.3", version: v13, suites: true, send: func(s *scripted) {
			rec := s.seal(typeData, nil)
			rec[0] ^= 0x40
			s.sendRaw(rec)
		}, want: sends(alertUnexpectedMessage), kernel: &goesOn, why: "the kernel takes 23 for the outer type, which means nothing, whatever it is"},
		{name: "explicit nonce or body", suites: true, send: damage(5), want: bad},
		{name: "last of the explicit nonce", suites: true, send: damage(12), want: bad},
		{name: "body", suites: true, send: damage(100), want: bad},
		{name: "tag, first", suites: true, send: damage(-16), want: bad},
		{name: "tag, last", suites: true, send: damage(-1), want: bad},
		{name: "body of an alert", send: func(s *scripted) {
			rec := s.seal(typeAlert, []byte{1, 0})
			rec[len(rec)-18] ^= 1
			s.sendRaw(rec)
		}, want: bad},
		{name: "full record", suites: true, send: func(s *scripted) {
			rec := s.seal(typeData, pattern(maxPlaintext))
			rec[9000] ^= 1
			s.sendRaw(rec)
		}, want: bad},
		{name: "length made shorter", send: func(s *scripted) {
			rec := s.seal(typeData, pattern(200))
			rec[4]--
			s.sendRaw(rec)
		}, want: bad},
		{name: "length made longer", send: func(s *scripted) {
			rec := s.seal(typeData, pattern(100))
			rec[4]++
			s.sendRaw(append(rec, s.seal(typeData, pattern(100))...))
		}, want: bad},
		{name: "one lost", suites: true, send: func(s *scripted) {
			_ = s.seal(typeData, []byte("lost"))
			s.send(typeData, []byte("x"))
		}, want: bad},
		{name: "doubled", suites: true, send: func(s *scripted) {
			rec := s.seal(typeData, nil)
			s.sendRaw(append(rec, rec...))
		}, want: bad},
		// Software looks at the type first, the kernel at the length and then the version.
		{name: "nonsense", version: v12, send: sendBytes([]byte("GET / HTTP/1.0\r\n\r\n")...), want: version},
		{name: "nonsense 1.3", version: v13, send: sendBytes([]byte("GET / HTTP/1.0\r\n\r\n")...), want: sends(alertUnexpectedMessage), kernel: &version, why: "as above"},
		{name: "zeros", version: v12, send: sendBytes(make([]byte, 40)...), want: version, kernel: &bad, why: "as above"},
		{name: "zeros 1.3", version: v13, send: sendBytes(make([]byte, 40)...), want: sends(alertUnexpectedMessage), kernel: &bad, why: "as above"},
	}
	runConformance(t, cases)
}

// Family 15, as far as records go: ChangeCipherSpec, and messages that belong into a
// handshake.
func TestConformanceAfterHandshake(t *testing.T) {
	msg := func(b string) func(s *scripted) { return sendAll(typeHandshake, b) }
	var cases []confCase
	for typ := range byte(26) {
		switch typ {
		case msgHelloRequest, msgClientHello, msgNewSessionTicket, msgKeyUpdate:
			continue
		}
		cases = append(cases, confCase{name: fmt.Sprintf("handshake message %d", typ), send: msg(string([]byte{typ, 0, 0, 0})), want: sends(alertUnexpectedMessage)})
	}
	cases = append(cases,
		confCase{name: "ChangeCipherSpec", send: sendAll(typeChangeCipherSpec, "\x01"), want: sends(alertUnexpectedMessage)},
		confCase{name: "ChangeCipherSpec of 2 bytes", send: sendAll(typeChangeCipherSpec, "\x01\x01"), want: sends(alertUnexpectedMessage)},
		// Post-handshake authentication is never offered.
		confCase{name: "CertificateRequest", version: v13, role: asClient, send: msg("\x0d\x00\x00\x0b\x00\x00\x08\x00\x0d\x00\x04\x00\x02\x04\x03"), want: sends(alertUnexpectedMessage)},
		confCase{name: "KeyUpdate in TLS 1.2", version: v12, send: msg("\x18\x00\x00\x01\x00"), want: sends(alertUnexpectedMessage)},
	)
	runConformance(t, cases)
}

// Family 16: tickets, in the client role of TLS 1.3 only.
func TestConformanceTickets(t *testing.T) {
	ticket := func(body string) string {
		return string([]byte{msgNewSessionTicket, byte(len(body) >> 16), byte(len(body) >> 8), byte(len(body))}) + body
	}
	const head = "\x00\x00\x0e\x10\x01\x02\x03\x04"
	const good = head + "\x01n\x00\x06ticket\x00\x00"
	withExt := func(ext string) string {
		return head + "\x01n\x00\x06ticket" + string([]byte{byte(len(ext) >> 8), byte(len(ext))}) + ext
	}
	msg := func(recs ...string) func(s *scripted) { return sendAll(typeHandshake, recs...) }
	big := func(n int) string {
		return head + "\x00" + string([]byte{byte(n >> 8), byte(n)}) + string(pattern(n)) + "\x00\x00"
	}
	cases := []confCase{
		{name: "ticket", suites: true, send: msg(ticket(good)), want: goesOn},
		{name: "without a nonce", send: msg(ticket(head + "\x00\x00\x06ticket\x00\x00")), want: goesOn},
		{name: "two in a record", send: msg(ticket(good) + ticket(good)), want: goesOn},
		{name: "in pieces", send: msg(ticket(good)[:1], ticket(good)[1:4], ticket(good)[4:]), want: goesOn},
		{name: "one and a half", send: msg(ticket(good)+ticket(good)[:9], ticket(good)[9:]), want: goesOn},
		{name: "64 KiB in five records", send: func(s *scripted) {
			for m := ticket(big(65535)); len(m) > 0; m = m[min(len(m), maxPlaintext):] {
				s.send(typeHandshake, []byte(m[:min(len(m), maxPlaintext)]))
			}
		}, want: goesOn},
		{name: "32", send: times(32, msg(ticket(good))), want: goesOn},
		{name: "33", send: times(33, msg(ticket(good))), want: sends(alertUnexpectedMessage)},
		{name: "33 in a record", send: func(s *scripted) {
			var b []byte
			for range 33 {
				b = append(b, ticket(good)...)
			}
			s.send(typeHandshake, b)
		}, want: sends(alertUnexpectedMessage)},
		{name: "empty ticket", send: msg(ticket(head + "\x00\x00\x00\x00\x00")), want: sends(alertDecodeError)},
		{name: "something behind", send: msg(ticket(good + "x")), want: sends(alertDecodeError)},
		{name: "too long a message", send: msg("\x04\x02\x00\x00"), want: sends(alertIllegalParameter)},
		{name: "unknown extensions", send: msg(ticket(withExt("\x0a\x0a\x00\x00\xfe\x01\x00\x02xx"))), want: goesOn},
		{name: "early_data", send: msg(ticket(withExt("\x00\x2a\x00\x04\x00\x00\x10\x00"))), want: goesOn},
		{name: "early_data of 3 bytes", send: msg(ticket(withExt("\x00\x2a\x00\x03\x00\x00\x10"))), want: sends(alertDecodeError)},
		{name: "an extension twice", send: msg(ticket(withExt("\x00\x2a\x00\x04\x00\x00\x10\x00\x00\x2a\x00\x04\x00\x00\x10\x00"))), want: sends(alertIllegalParameter)},
		{name: "an extension cut short", send: msg(ticket(withExt("\x00\x2a\x00\x04\x00"))), want: sends(alertDecodeError)},
		{name: "flags", send: msg(ticket(withExt("\x00\x3e\x00\x02\x01\x02"))), want: goesOn},
		{name: "empty flags", send: msg(ticket(withExt("\x00\x3e\x00\x01\x00"))), want: sends(alertDecodeError)},
		{name: "flags that are not minimal", send: msg(ticket(withExt("\x00\x3e\x00\x03\x02\x02\x00"))), want: sends(alertIllegalParameter)},
	}
	for i := range len(good) {
		cases = append(cases, confCase{name: fmt.Sprintf("cut to %d bytes", i), send: msg(ticket(good[:i])), want: sends(alertDecodeError)})
	}
	for i := range cases {
		cases[i].version, cases[i].role = v13, asClient
	}
	cases = append(cases,
		confCase{name: "to a server", version: v13, role: asServer, send: msg(ticket(good)), want: sends(alertUnexpectedMessage)},
		confCase{name: "in TLS 1.2", version: v12, send: msg(ticket(good)), want: sends(alertUnexpectedMessage)},
	)
	runConformance(t, cases)
}
