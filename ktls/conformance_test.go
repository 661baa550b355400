package ktls

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// What happens to an established session when its peer sends any record at all, by
// families as in BoringSSL's test runner (docs/conformance.md): the same cases for both
// layers, both roles and both versions, and for every way to read. That a reader never
// hangs is part of each case.

// outcome is how a session ends.
type outcome struct {
	sent  Alert // a fatal alert by us, if not tolerated, got or err
	got   Alert // the peer's alert
	isGot bool
	err   error // io.EOF or ErrTruncated
	fine  bool  // goes on: data that follows arrives
}

func sends(a Alert) outcome { return outcome{sent: a} }
func gets(a Alert) outcome  { return outcome{got: a, isGot: true} }
func ends(err error) outcome {
	return outcome{err: err}
}

var goesOn = outcome{fine: true}

func (o outcome) String() string {
	switch {
	case o.fine:
		return "the session goes on"
	case o.err != nil:
		return o.err.Error()
	case o.isGot:
		return "the peer's alert " + o.got.String()
	}
	return "our alert " + o.sent.String()
}

// outcomeOf turns what a reader got into an outcome.
func outcomeOf(err error) (outcome, bool) {
	var alert *AlertError
	switch {
	case errors.As(err, &alert) && alert.Sent:
		return sends(alert.Alert), true
	case errors.As(err, &alert):
		return gets(alert.Alert), true
	case errors.Is(err, io.EOF):
		return ends(io.EOF), true
	case errors.Is(err, ErrTruncated):
		return ends(ErrTruncated), true
	}
	return outcome{}, false
}

type role uint8

const (
	bothRoles role = iota
	asServer       // our role
	asClient
)

// confCase is one thing a peer may do.
type confCase struct {
	name    string
	version uint16 // 0: both
	role    role
	suites  bool // every suite, not one of each version
	send    func(s *scripted)
	want    outcome
	// kernel is what becomes of it in the kernel layer where that is something else, and
	// why says what for. notKernel leaves it out: why again.
	kernel    *outcome
	notKernel bool
	why       string
}

func inKernel(o outcome) *outcome { return &o }

// ways are the ways to read a session to its end. Each returns what it read.
var ways = []struct {
	name  string
	early bool // begins before the peer sends
	read  func(c *Conn) ([]byte, error)
}{
	{"Read", false, readToEnd},
	{"Read that waits", true, readToEnd},
	{"short deadlines", true, func(c *Conn) ([]byte, error) {
		var all []byte
		b := make([]byte, 7)
		for end := time.Now().Add(testWait); ; {
			_ = c.SetReadDeadline(time.Now().Add(2 * time.Millisecond))
			n, err := c.Read(b)
			all = append(all, b[:n]...)
			if err != nil && (!errors.Is(err, os.ErrDeadlineExceeded) || time.Now().After(end)) {
				return all, err
			}
		}
	}},
	{"io.Copy", true, func(c *Conn) ([]byte, error) {
		var all []byte
		_, err := io.Copy(writerFunc(func(p []byte) (int, error) {
			all = append(all, p...)
			return len(p), nil
		}), c)
		if err == nil {
			err = io.EOF // as Read says it
		}
		return all, err
	}},
}

func readToEnd(c *Conn) ([]byte, error) {
	var all []byte
	b := make([]byte, 100)
	for {
		n, err := c.Read(b)
		all = append(all, b[:n]...)
		if err != nil {
			return all, err
		}
	}
}

func runConformance(t *testing.T, cases []confCase) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		if guest.InGuest() && layer == LayerSoftware {
			return // the same on every kernel, and an emulated machine is slow
		}
		turn := 0
		for _, tc := range cases {
			if layer == LayerKernel && tc.notKernel {
				continue
			}
			t.Run(tc.name, func(t *testing.T) {
				for _, sc := range testSuites {
					if tc.version != 0 && tc.version != sc.version ||
						!tc.suites && sc.suite != gcm && sc.suite != tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256 {
						continue
					}
					for _, client := range []bool{false, true} {
						if client && tc.role == asServer || !client && tc.role == asClient {
							continue
						}
						want := tc.want
						if layer == LayerKernel && tc.kernel != nil {
							want = *tc.kernel
						}
						turn++
						for i := range ways {
							if guest.InGuest() && i != turn%len(ways) {
								continue // each case by one way, each way with many cases
							}
							tc.run(t, layer, sc.version, sc.suite, client, i, want)
						}
					}
				}
			})
		}
	})
}

func (tc *confCase) run(t *testing.T, layer Layer, version, suite uint16, client bool, way int, want outcome) {
	w := ways[way]
	t.Helper()
	where := fmt.Sprintf("%s, client %v, by %s", suiteTestName(version, suite), client, w.name)
	s := newScriptedRole(t, layer, version, suite, client)
	defer func() { _ = s.conn.Close() }()
	_ = s.conn.SetDeadline(time.Now().Add(testWait))
	script := func() {
		s.send(typeData, []byte("before "))
		tc.send(s)
		if want.fine {
			s.send(typeData, []byte("after"))
			s.send(typeAlert, []byte{levelWarning, byte(alertCloseNotify)})
		}
	}
	type result struct {
		data string
		err  error
	}
	done := make(chan result, 1)
	read := func() {
		b, err := w.read(s.conn)
		done <- result{string(b), err}
	}
	if w.early {
		go read()
		script()
	} else {
		script()
		go read()
	}
	r := <-done
	if errors.Is(r.err, os.ErrDeadlineExceeded) {
		t.Fatalf("%s: the reader hangs, after %.40q; expected %v", where, r.data, want)
	}
	got, known := outcomeOf(r.err)
	text := "before "
	if want.fine {
		text, got.fine = "before after", got == ends(io.EOF)
		got.err = nil
	}
	if !known || got != want || r.data != text {
		t.Fatalf("%s: read %.40q and %v; expected %q and %v", where, r.data, r.err, text, want)
	}
	// It stays so.
	_ = s.conn.SetDeadline(time.Now().Add(testWait))
	if n, err := s.conn.Read(make([]byte, 10)); n != 0 || err == nil || err.Error() != r.err.Error() {
		t.Errorf("%s: Read again gave %d bytes and %v, first %v", where, n, err, r.err)
	}
	if want.err != nil || want.fine {
		return
	}
	if _, err := s.conn.Write([]byte("x")); err == nil {
		t.Errorf("%s: Write after it succeeded", where)
	}
	if _, _, err := s.conn.Detach(); err == nil {
		t.Errorf("%s: Detach after it succeeded", where)
	}
	if !want.isGot {
		if err := s.lastAlert(); err != nil || s.gotAlert != want.sent {
			t.Errorf("%s: the peer got alert %v (%v), expected %v", where, s.gotAlert, err, want.sent)
		}
	}
	_ = s.conn.Close()
	if typ, p, err := s.next(); err == nil {
		t.Errorf("%s: the peer got another record of type %d, % x", where, typ, p)
	}
}

// sendAll sends records of one type.
func sendAll(typ recordType, recs ...string) func(s *scripted) {
	return func(s *scripted) {
		for _, r := range recs {
			s.send(typ, []byte(r))
		}
	}
}

func times(n int, f func(s *scripted)) func(s *scripted) {
	return func(s *scripted) {
		for range n {
			f(s)
		}
	}
}

func inOrder(fs ...func(s *scripted)) func(s *scripted) {
	return func(s *scripted) {
		for _, f := range fs {
			f(s)
		}
	}
}

// sealInner seals a record of TLS 1.3 whose inner plaintext (content, type, padding) and
// header are the test's own.
func (s *scripted) sealInner(outer byte, version uint16, inner []byte) []byte {
	rec := binary.BigEndian.AppendUint16([]byte{outer, byte(version >> 8), byte(version)}, uint16(len(inner)+tagLen))
	rec = s.out.aead.Seal(rec, s.out.nonce(nil), inner, rec)
	s.out.seq++
	return rec
}

func sendInner(inner ...byte) func(s *scripted) {
	return func(s *scripted) { s.sendRaw(s.sealInner(byte(typeData), tls.VersionTLS12, inner)) }
}

func sendBytes(b ...byte) func(s *scripted) { return func(s *scripted) { s.sendRaw(b) } }

func padded(typ recordType, content, padding int) func(s *scripted) {
	b := append(make([]byte, content), byte(typ))
	return sendInner(append(b, make([]byte, padding)...)...)
}

const v12 = tls.VersionTLS12

// Family 02: fatal and malformed alerts. Family 03: floods of warnings.
func TestConformanceAlerts(t *testing.T) {
	var cases []confCase
	for _, a := range []byte{10, 20, 21, 22, 40, 51, 80, 109, 200, 255} {
		cases = append(cases, confCase{name: fmt.Sprintf("fatal alert %d", a), send: sendAll(typeAlert, string([]byte{levelFatal, a})), want: gets(Alert(a))})
	}
	warning := sendAll(typeAlert, "\x01\x5a") // user_canceled
	empty := sendAll(typeData, "")
	cases = append(cases,
		confCase{name: "alert in two records", send: sendAll(typeAlert, "\x02", "\x16"), want: sends(alertDecodeError)},
		confCase{name: "two alerts in a record", send: sendAll(typeAlert, "\x02\x16\x02\x16"), want: sends(alertDecodeError)},
		confCase{name: "alert of 3 bytes", send: sendAll(typeAlert, "\x02\x16\x00"), want: sends(alertDecodeError)},
		confCase{name: "empty alert", send: sendAll(typeAlert, ""), want: sends(alertUnexpectedMessage)},
		confCase{name: "alert of level 0", send: sendAll(typeAlert, "\x00\x16"), want: sends(alertIllegalParameter)},
		confCase{name: "alert of level 42", send: sendAll(typeAlert, "\x2a\x16"), want: sends(alertIllegalParameter)},
		confCase{name: "close_notify of fatal level", send: sendAll(typeAlert, "\x02\x00"), want: ends(io.EOF)},
		confCase{name: "close_notify of level 42", send: sendAll(typeAlert, "\x2a\x00"), want: sends(alertIllegalParameter)},
		confCase{name: "4 warnings", send: times(4, warning), want: goesOn},
		confCase{name: "5 warnings", send: times(5, warning), want: sends(alertDecodeError)},
		// Each is counted by itself, and only data begins anew.
		confCase{name: "4 warnings between 32 empty records", send: times(4, inOrder(times(8, empty), warning)), want: goesOn},
		confCase{name: "5 warnings between empty records", send: times(5, inOrder(empty, warning)), want: sends(alertDecodeError)},
		confCase{name: "33 empty records between warnings", send: inOrder(times(3, inOrder(times(10, empty), warning)), times(3, empty)), want: sends(alertDecodeError),
			kernel: inKernel(goesOn), why: "the kernel passes over empty data records itself"},
		confCase{name: "warning in TLS 1.2", version: v12, send: sendAll(typeAlert, "\x01\x70"), want: goesOn},
	)
	runConformance(t, cases)
}

// Family 04: close_notify, shutdown, unclean ends of the stream.
func TestConformanceEnds(t *testing.T) {
	fin := func(s *scripted) { _ = s.c.CloseWrite() }
	cut := func(n int) func(s *scripted) {
		return func(s *scripted) {
			rec := s.seal(typeData, []byte("never seen"))
			end := n
			if end < 0 {
				end += len(rec)
			}
			s.sendRaw(rec[:end])
			fin(s)
		}
	}
	notify := sendAll(typeAlert, "\x01\x00")
	runConformance(t, []confCase{
		{name: "close_notify", send: notify, want: ends(io.EOF)},
		{name: "close_notify and FIN", send: inOrder(notify, fin), want: ends(io.EOF)},
		{name: "close_notify and data", send: inOrder(notify, sendAll(typeData, "too late")), want: ends(io.EOF)},
		{name: "close_notify and nonsense", send: inOrder(notify, sendBytes(1, 2, 3, 4, 5, 6, 7)), want: ends(io.EOF)},
		{name: "close_notify twice", send: inOrder(notify, notify), want: ends(io.EOF)},
		{name: "FIN", send: fin, want: ends(ErrTruncated)},
		{name: "FIN after an empty record", send: inOrder(sendAll(typeData, ""), fin), want: ends(ErrTruncated)},
		{name: "FIN in a header", send: cut(3), want: ends(ErrTruncated)},
		{name: "FIN after a header", send: cut(5), want: ends(ErrTruncated)},
		{name: "FIN in a record", send: cut(9), want: ends(ErrTruncated)},
		{name: "FIN a byte before its end", send: cut(-1), want: ends(ErrTruncated)},
		{name: "FIN after a fatal alert", send: inOrder(sendAll(typeAlert, "\x02\x50"), fin), want: gets(alertInternalError)},
		{name: "FIN in a ticket", version: v13, role: asClient, send: inOrder(sendAll(typeHandshake, "\x04\x00\x00"), fin), want: ends(ErrTruncated)},
		{name: "close_notify in a ticket", version: v13, role: asClient, send: inOrder(sendAll(typeHandshake, "\x04\x00\x00"), notify), want: sends(alertUnexpectedMessage)},
	})
}

// Families 05 and 14: renegotiation, which is refused and does not end a session.
func TestConformanceRenegotiation(t *testing.T) {
	const request = "\x00\x00\x00\x00"
	hello := append([]byte{msgClientHello, 0, 1, 0}, make([]byte, 256)...)
	msg := func(b ...string) func(s *scripted) { return sendAll(typeHandshake, b...) }
	data := sendAll(typeData, "x")
	runConformance(t, []confCase{
		{name: "HelloRequest", version: v12, role: asClient, send: msg(request), want: goesOn},
		{name: "HelloRequest in pieces", version: v12, role: asClient, send: msg("\x00", "\x00\x00", "\x00"), want: goesOn},
		{name: "two HelloRequests in a record", version: v12, role: asClient, send: msg(request + request), want: goesOn},
		{name: "half a HelloRequest and data", version: v12, role: asClient, send: inOrder(msg("\x00\x00"), data), want: sends(alertUnexpectedMessage)},
		{name: "HelloRequest with content", version: v12, role: asClient, send: msg("\x00\x00\x00\x01\x00"), want: sends(alertDecodeError)},
		{name: "HelloRequest and a ServerHello", version: v12, role: asClient, send: msg(request + "\x02\x00\x00\x20"), want: sends(alertUnexpectedMessage)},
		{name: "32 HelloRequests", version: v12, role: asClient, send: times(32, msg(request)), want: goesOn},
		{name: "33 HelloRequests", version: v12, role: asClient, send: times(33, msg(request)), want: sends(alertUnexpectedMessage)},
		{name: "33 HelloRequests in a record", version: v12, role: asClient, send: func(s *scripted) { s.send(typeHandshake, make([]byte, 4*33)) }, want: sends(alertUnexpectedMessage)},
		{name: "HelloRequest to a server", version: v12, role: asServer, send: msg(request), want: sends(alertUnexpectedMessage)},
		{name: "HelloRequest in TLS 1.3", version: v13, send: msg(request), want: sends(alertUnexpectedMessage)},
		{name: "ClientHello", version: v12, role: asServer, send: msg(string(hello)), want: goesOn},
		{name: "ClientHello in pieces", version: v12, role: asServer, send: msg(string(hello[:2]), string(hello[2:100]), string(hello[100:])), want: goesOn},
		{name: "half a ClientHello and data", version: v12, role: asServer, send: inOrder(msg(string(hello[:100])), data), want: sends(alertUnexpectedMessage)},
		{name: "half a ClientHello and ChangeCipherSpec", version: v12, role: asServer, send: inOrder(msg(string(hello[:100])), sendAll(typeChangeCipherSpec, "\x01")), want: sends(alertUnexpectedMessage)},
		{name: "33 ClientHellos", version: v12, role: asServer, send: times(33, msg("\x01\x00\x00\x00")), want: sends(alertUnexpectedMessage)},
		{name: "a ClientHello of 16 MiB", version: v12, role: asServer, send: msg("\x01\xff\xff\xff"), want: sends(alertIllegalParameter)},
		{name: "ClientHello to a client", version: v12, role: asClient, send: msg(string(hello)), want: sends(alertUnexpectedMessage)},
		{name: "ClientHello in TLS 1.3", version: v13, send: msg(string(hello)), want: sends(alertUnexpectedMessage)},
		{name: "empty handshake record", send: msg(""), want: sends(alertUnexpectedMessage)},
	})
}

// The answer to a renegotiation is one warning, however often it is asked.
func TestConformanceNoRenegotiationAnswer(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		for _, client := range []bool{false, true} {
			s := newScriptedRole(t, layer, v12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, client)
			_ = s.conn.SetDeadline(time.Now().Add(testWait))
			msg := []byte{msgClientHello, 0, 0, 0}
			if client {
				msg[0] = msgHelloRequest
			}
			s.send(typeHandshake, msg)
			s.send(typeData, []byte("x"))
			s.wantRead("x")
			s.want(typeAlert, string([]byte{levelWarning, byte(alertNoRenegotiation)}))
			if _, err := s.conn.Write([]byte("goes on")); err != nil {
				t.Fatal(err)
			}
			s.want(typeData, "goes on")
		}
	})
}

// Family 06: floods of empty records.
func TestConformanceEmptyRecords(t *testing.T) {
	const why = "the kernel passes over empty data records itself, at a bounded cost for each"
	empty := sendAll(typeData, "")
	runConformance(t, []confCase{
		{name: "32", send: times(32, empty), want: goesOn},
		{name: "33", send: times(33, empty), want: sends(alertDecodeError), kernel: inKernel(goesOn), why: why},
		{name: "1000", send: times(1000, empty), want: sends(alertDecodeError), kernel: inKernel(goesOn), why: why},
		{name: "33, padded", version: v13, send: times(33, padded(typeData, 0, 100)), want: sends(alertDecodeError), kernel: inKernel(goesOn), why: why},
	})
}
