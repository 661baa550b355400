package ktls

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

func dupFD(fd int) (int, error) { return sys.Dup(fd) }

// What a peer may do to an established session, and how it ends. Both layers must
// agree, because what a record means is decided above them.
func TestPeerMisbehaves(t *testing.T) {
	const hs, al, ccs = typeHandshake, typeAlert, typeChangeCipherSpec
	type rec struct {
		typ  recordType
		data string
	}
	repeat := func(n int, r rec) []rec {
		var out []rec
		for range n {
			out = append(out, r)
		}
		return out
	}
	ku := func(v string) string { return "\x18\x00\x00\x01" + v }
	for _, tc := range []struct {
		name    string
		version uint16 // 0: both
		client  bool
		only    string // layer; "": both
		recs    []rec
		sent    Alert // by us; 0 with received: none
		got     Alert // the peer's, when we send none
	}{
		{name: "ChangeCipherSpec", recs: []rec{{ccs, "\x01"}}, sent: alertUnexpectedMessage},
		{name: "unknown type", recs: []rec{{24, "x"}}, sent: alertUnexpectedMessage},
		// The kernel calls these records that do not authenticate.
		{name: "type 0", version: tls.VersionTLS12, only: "software", recs: []rec{{0, "x"}}, sent: alertUnexpectedMessage},
		{name: "type 0, empty", version: tls.VersionTLS12, only: "software", recs: []rec{{0, ""}}, sent: alertUnexpectedMessage},
		{name: "alert too short", recs: []rec{{al, "\x01"}}, sent: alertDecodeError},
		{name: "alert too long", recs: []rec{{al, "\x01\x00\x00"}}, sent: alertDecodeError},
		{name: "alert of unknown level", recs: []rec{{al, "\x03\x00"}}, sent: alertIllegalParameter},
		{name: "fatal alert", recs: []rec{{al, "\x02\x50"}}, got: alertInternalError},
		{name: "empty handshake record", recs: []rec{{hs, ""}}, sent: alertUnexpectedMessage},
		{name: "empty alert record", recs: []rec{{al, ""}}, sent: alertUnexpectedMessage},
		{name: "Finished again", recs: []rec{{hs, "\x14\x00\x00\x20"}}, sent: alertUnexpectedMessage},
		{name: "CertificateRequest", client: true, recs: []rec{{hs, "\x0d\x00\x00\x20"}}, sent: alertUnexpectedMessage},
		{name: "warning in TLS 1.3 is an error", version: v13, recs: []rec{{al, "\x01\x64"}}, got: alertNoRenegotiation},
		{name: "user_canceled five times", version: v13, recs: repeat(5, rec{al, "\x01\x5a"}), sent: alertDecodeError},
		{name: "five warnings", version: tls.VersionTLS12, recs: repeat(5, rec{al, "\x01\x5a"}), sent: alertDecodeError},
		{name: "33 empty records", only: "software", // the kernel skips them itself
			recs: repeat(33, rec{typeData, ""}), sent: alertDecodeError},
		{name: "ClientHello in TLS 1.3", version: v13, recs: []rec{{hs, "\x01\x00\x00\x20"}}, sent: alertUnexpectedMessage},
		{name: "KeyUpdate in TLS 1.2", version: tls.VersionTLS12, recs: []rec{{hs, ku("\x00")}}, sent: alertUnexpectedMessage},
		{name: "KeyUpdate of request 2", version: v13, recs: []rec{{hs, ku("\x02")}}, sent: alertIllegalParameter},
		{name: "KeyUpdate too long", version: v13, recs: []rec{{hs, "\x18\x00\x00\x02\x00\x00"}}, sent: alertDecodeError},
		{name: "KeyUpdate with something behind", version: v13, recs: []rec{{hs, ku("\x00") + "\x18"}}, sent: alertUnexpectedMessage},
		// In the kernel's layer the first of these is a KeyUpdate already, see below.
		{name: "data inside a handshake message", version: v13, only: "software", recs: []rec{{hs, "\x18\x00"}, {typeData, "x"}}, sent: alertUnexpectedMessage},
		{name: "alert inside a handshake message", version: v13, only: "software", recs: []rec{{hs, "\x18\x00"}, {al, "\x01\x00"}}, sent: alertUnexpectedMessage},
		{name: "data inside a ticket", version: v13, client: true, recs: []rec{{hs, "\x04\x00"}, {typeData, "x"}}, sent: alertUnexpectedMessage},
		{name: "alert inside a ticket", version: v13, client: true, recs: []rec{{hs, "\x04\x00"}, {al, "\x01\x00"}}, sent: alertUnexpectedMessage},
		{name: "HelloRequest with content", version: tls.VersionTLS12, client: true, recs: []rec{{hs, "\x00\x00\x00\x01x"}}, sent: alertDecodeError},
		{name: "33 HelloRequests", version: tls.VersionTLS12, client: true, recs: repeat(33, rec{hs, "\x00\x00\x00\x00"}), sent: alertUnexpectedMessage},
		{name: "malformed ticket", version: v13, client: true, recs: []rec{{hs, "\x04\x00\x00\x02xx"}}, sent: alertDecodeError},
		{name: "handshake message of 16 MiB", version: v13, client: true, recs: []rec{{hs, "\x04\xff\xff\xff"}}, sent: alertIllegalParameter},
		{name: "ticket to a server", version: v13, recs: []rec{{hs, "\x04\x00\x00\x02xx"}}, sent: alertUnexpectedMessage},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bothLayers(t, func(t *testing.T, layer Layer) {
				if tc.only != "" && tc.only != layer.String() {
					return
				}
				for _, sc := range testSuites {
					if tc.version != 0 && tc.version != sc.version || sc.suite != gcm && sc.suite != tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256 {
						continue
					}
					s := newScriptedRole(t, layer, sc.version, sc.suite, tc.client)
					s.send(typeData, []byte("before"))
					for _, r := range tc.recs {
						s.send(r.typ, []byte(r.data))
					}
					s.wantRead("before")
					_, err := s.conn.Read(make([]byte, 100))
					var alert *AlertError
					if !errors.As(err, &alert) {
						t.Fatalf("Read: %v", err)
					}
					want := AlertError{Alert: tc.sent, Sent: true}
					if tc.sent == 0 {
						want = AlertError{Alert: tc.got}
					}
					if alert.Alert != want.Alert || alert.Sent != want.Sent {
						t.Fatalf("Read: %v, expected %v", err, &want)
					}
					if _, werr := s.conn.Write([]byte("x")); !errors.As(werr, &alert) {
						t.Errorf("Write after it: %v", werr)
					}
					if _, _, derr := s.conn.Detach(); !errors.As(derr, &alert) {
						t.Errorf("Detach after it: %v", derr)
					}
					if tc.sent != 0 {
						if err := s.lastAlert(); err != nil || s.gotAlert != tc.sent {
							t.Errorf("the peer got alert %v (%v), expected %v", s.gotAlert, err, tc.sent)
						}
					}
				}
			})
		})
	}
}

// lastAlert reads records until a fatal alert.
func (s *scripted) lastAlert() error {
	for {
		typ, p, err := s.next()
		if err != nil {
			return err
		}
		if typ == typeAlert && len(p) == 2 && p[0] == levelFatal {
			s.gotAlert = Alert(p[1])
			return nil
		}
	}
}

// What a peer may do without ending the session.
func TestPeerIsTolerated(t *testing.T) {
	eachSuite(t, func(t *testing.T, layer Layer, version, suite uint16) {
		s := newScripted(t, layer, version, suite)
		for range 3 { // the limits start anew after data
			for range maxEmpties {
				s.send(typeData, nil)
			}
			for range maxWarnings {
				s.send(typeAlert, []byte{levelWarning, byte(alertUserCanceled)})
			}
			s.send(typeData, []byte("data"))
			s.wantRead("data")
		}
		if version == tls.VersionTLS12 {
			hello := append([]byte{msgClientHello, 0, 0, 50}, make([]byte, 50)...)
			s.send(typeHandshake, hello[:7]) // in two records
			s.send(typeHandshake, hello[7:])
			s.send(typeData, []byte("more"))
			s.wantRead("more")
			s.want(typeAlert, string([]byte{levelWarning, byte(alertNoRenegotiation)}))
		}
		s.send(typeAlert, []byte{levelWarning, byte(alertCloseNotify)})
		s.wantEnd(io.EOF)
		s.wantEnd(io.EOF)
		// Half closed: writing goes on.
		if _, err := s.conn.Write([]byte("still here")); err != nil {
			t.Fatal(err)
		}
		s.want(typeData, "still here")
		s.move()
		s.wantEnd(io.EOF)
		if err := s.conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		s.want(typeAlert, "\x01\x00")
		s.wantFIN()
		if _, err := s.conn.Write([]byte("x")); err == nil {
			t.Error("Write after CloseWrite succeeded")
		}
	})
}

// Tickets and renegotiation in the client role.
func TestClientRoleControlRecords(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		s := newScriptedRole(t, layer, v13, gcm, true)
		ticket := "\x00\x00\x0e\x10\x01\x02\x03\x04\x01n\x00\x06ticket\x00\x00"
		msg := "\x04\x00\x00" + string(rune(len(ticket))) + ticket
		s.send(typeHandshake, []byte(msg+msg))
		s.send(typeHandshake, []byte(msg[:9]))
		s.send(typeHandshake, []byte(msg[9:]))
		s.send(typeData, []byte("after tickets"))
		s.wantRead("after tickets")

		s = newScriptedRole(t, layer, tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, true)
		s.send(typeHandshake, []byte{msgHelloRequest, 0, 0, 0})
		s.send(typeData, []byte("after HelloRequest"))
		s.wantRead("after HelloRequest")
		s.want(typeAlert, string([]byte{levelWarning, byte(alertNoRenegotiation)}))
	})
}

// Tickets of a wrong form end the session with the alert for what is wrong.
func TestMalformedTickets(t *testing.T) {
	const head, ticket = "\x00\x00\x0e\x10\x01\x02\x03\x04\x01n", "\x00\x06ticket"
	bothLayers(t, func(t *testing.T, layer Layer) {
		for name, tc := range map[string]struct {
			body string
			want Alert
		}{
			"no ticket":           {head + "\x00\x00\x00\x00", alertDecodeError},
			"cut off":             {head + ticket, alertDecodeError},
			"more than it says":   {head + ticket + "\x00\x00\x00", alertDecodeError},
			"half an extension":   {head + ticket + "\x00\x03\x00\x2a\x00", alertDecodeError},
			"extension too long":  {head + ticket + "\x00\x04\x00\x2a\x00\x01", alertDecodeError},
			"an extension, again": {head + ticket + "\x00\x0c\x2a\x2a\x00\x00\xff\x01\x00\x00\x2a\x2a\x00\x00", alertIllegalParameter},
		} {
			t.Run(name, func(t *testing.T) {
				s := newScriptedRole(t, layer, v13, gcm, true)
				s.send(typeHandshake, append([]byte{msgNewSessionTicket, 0, 0, byte(len(tc.body))}, tc.body...))
				var alert *AlertError
				if _, err := s.conn.Read(make([]byte, 1)); !errors.As(err, &alert) || !alert.Sent || alert.Alert != tc.want {
					t.Fatalf("Read: %v", err)
				}
				s.want(typeAlert, string([]byte{levelFatal, byte(tc.want)}))
			})
		}
		s := newScriptedRole(t, layer, v13, gcm, true)
		body := head + ticket + "\x00\x08\x2a\x2a\x00\x00\xff\x01\x00\x00"
		s.send(typeHandshake, append([]byte{msgNewSessionTicket, 0, 0, byte(len(body))}, body...))
		s.send(typeData, []byte("fine"))
		s.wantRead("fine")
	})
}

// FIN without close_notify is a truncation, wherever in a record it comes.
func TestTruncation(t *testing.T) {
	eachSuite(t, func(t *testing.T, layer Layer, version, suite uint16) {
		for _, cut := range []int{0, 1, 4, 5, 20} {
			s := newScripted(t, layer, version, suite)
			s.send(typeData, []byte("whole"))
			s.sendRaw(s.seal(typeData, []byte("cut short"))[:cut])
			_ = s.c.CloseWrite()
			s.wantRead("whole")
			s.wantEnd(ErrTruncated)
			s.wantEnd(io.ErrUnexpectedEOF)
			s.move()
			s.wantEnd(ErrTruncated)
			if _, err := s.conn.Write([]byte("last words")); err != nil {
				t.Error(err)
			}
			s.want(typeData, "last words")
		}
	})
}

// Records that are wrong before anything is opened, or do not open.
func TestBadRecords(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		for _, tc := range []struct {
			name string
			make func(s *scripted) []byte
			want Alert
		}{
			{"changed", func(s *scripted) []byte { r := s.seal(typeData, []byte("x")); r[len(r)-1] ^= 1; return r }, alertBadRecordMAC},
			{"of another version", func(s *scripted) []byte { r := s.seal(typeData, []byte("x")); r[2] = 4; return r }, alertProtocolVersion},
			{"too long", func(s *scripted) []byte { return append([]byte{23, 3, 3, 0xff, 0xff}, make([]byte, 16)...) }, alertRecordOverflow},
			{"again", func(s *scripted) []byte {
				r := s.seal(typeData, []byte("x"))
				return append(r, r...)
			}, alertBadRecordMAC},
			{"out of order", func(s *scripted) []byte {
				a := s.seal(typeData, []byte("x"))
				b := s.seal(typeData, []byte("x"))
				return append(b, a...)
			}, alertBadRecordMAC},
		} {
			for _, sc := range testSuites {
				s := newScripted(t, layer, sc.version, sc.suite)
				s.sendRaw(tc.make(s))
				_, err := io.Copy(io.Discard, s.conn)
				var alert *AlertError
				if !errors.As(err, &alert) || alert.Alert != tc.want || !alert.Sent {
					t.Errorf("record %s: %v, expected %v", tc.name, err, tc.want)
					continue
				}
				s.want(typeAlert, string([]byte{levelFatal, byte(tc.want)}))
				if err := s.conn.Close(); err != nil {
					t.Error(err)
				}
				s.wantFINOrReset()
			}
		}
	})
}

// wantFINOrReset: data that Close left unread makes TCP answer with a reset.
func (s *scripted) wantFINOrReset() {
	s.t.Helper()
	var nerr *net.OpError
	if _, _, err := s.next(); !errors.Is(err, io.EOF) && !errors.As(err, &nerr) {
		s.t.Errorf("peer: %v, expected the end", err)
	}
}

// A bad record of which a Write took the only report is not moved along: the socket
// has forgotten it, and the next owner would wait for ever.
func TestDetachAfterBadRecordInWrite(t *testing.T) {
	guest.NeedKernelTLS(t)
	s := newScripted(t, LayerKernel, v13, gcm)
	rec := s.seal(typeData, []byte("bad"))
	rec[2] ^= 1 // the version: the kernel looks at headers before anybody reads
	s.sendRaw(rec)
	l := s.conn.layer.(*kernelLayer)
	n := 0
	for end := time.Now().Add(testWait); l.broken() == nil; time.Sleep(time.Millisecond) {
		if _, err := s.conn.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if n++; time.Now().After(end) {
			t.Fatal("no Write was told of the record")
		}
	}
	var alert *AlertError
	if _, _, err := s.conn.Detach(); !errors.As(err, &alert) || alert.Alert != alertProtocolVersion {
		t.Fatalf("Detach: %v, expected protocol_version", err)
	}
	s.wantData(n)
	s.want(typeAlert, string([]byte{levelFatal, byte(alertProtocolVersion)}))
	s.wantEnd(alert)
}

// Padding and the limits of a record's content in TLS 1.3.
func TestInnerPlaintext(t *testing.T) {
	inner := func(s *scripted, content []byte, typ recordType, padding int) {
		// seal appends the type it is given, so all of it is made here and the last
		// zero byte of the padding is that type.
		b := append(append([]byte(nil), content...), byte(typ))
		b = append(b, make([]byte, padding)...)
		s.sendRaw(s.seal(recordType(b[len(b)-1]), b[:len(b)-1]))
	}
	s := newScripted(t, LayerSoftware, v13, gcm)
	inner(s, []byte("padded"), typeData, 1000)
	s.wantRead("padded")
	inner(s, pattern(maxPlaintext), typeData, 0)
	s.wantRead(string(pattern(maxPlaintext)))
	inner(s, []byte("to the brim"), typeData, maxPlaintext-len("to the brim"))
	s.wantRead("to the brim")
	inner(s, nil, typeData, maxPlaintext) // empty and padded
	inner(s, []byte("next"), typeData, 0)
	s.wantRead("next")

	for name, tc := range map[string]struct {
		send func(s *scripted)
		want Alert
	}{
		"only padding":             {func(s *scripted) { s.sendRaw(s.seal(0, make([]byte, 10))) }, alertUnexpectedMessage},
		"nothing at all":           {func(s *scripted) { s.sendRaw(s.seal(0, nil)) }, alertUnexpectedMessage},
		"too much content":         {func(s *scripted) { inner(s, make([]byte, maxPlaintext+1), typeData, 0) }, alertRecordOverflow},
		"too much with padding":    {func(s *scripted) { inner(s, []byte("x"), typeData, maxPlaintext) }, alertRecordOverflow},
		"unprotected alert":        {func(s *scripted) { s.sendRaw([]byte{21, 3, 3, 0, 2, 1, 0}) }, alertUnexpectedMessage},
		"unprotected ccs":          {func(s *scripted) { s.sendRaw([]byte{20, 3, 3, 0, 1, 1}) }, alertUnexpectedMessage},
		"shorter than a tag":       {func(s *scripted) { s.sendRaw([]byte{23, 3, 3, 0, 3, 1, 2, 3}) }, alertBadRecordMAC},
		"plain HTTP":               {func(s *scripted) { s.sendRaw([]byte("GET / HTTP/1.0\r\n\r\n")) }, alertUnexpectedMessage},
		"empty ciphertext":         {func(s *scripted) { s.sendRaw([]byte{23, 3, 3, 0, 0}) }, alertBadRecordMAC},
		"ciphertext over its size": {func(s *scripted) { s.sendRaw([]byte{23, 3, 3, 0x41, 0x01}) }, alertRecordOverflow},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScripted(t, LayerSoftware, v13, gcm)
			tc.send(s)
			_, err := s.conn.Read(make([]byte, 100))
			var alert *AlertError
			if !errors.As(err, &alert) || alert.Alert != tc.want {
				t.Fatalf("%v, expected %v", err, tc.want)
			}
			s.want(typeAlert, string([]byte{levelFatal, byte(tc.want)}))
		})
	}
}
