package ktls

import (
	"crypto/tls"
	"errors"
	"io"
	"syscall"
	"testing"
	"time"
)

var closeNotify = []byte{levelWarning, byte(alertCloseNotify)}

// How either side has ended the session, or is about to, when it moves.
var endMoments = []moment{
	{name: "peer's close_notify read, then we write", run: func(m *mover) {
		m.send(typeAlert, closeNotify)
		m.wantEOF()
		m.move()
		m.wantEOF()
		m.write([]byte("still here"))
		m.peerGets(func() {})
		m.closesWriting()
	}},
	{name: "peer's close_notify unread behind data", run: func(m *mover) {
		m.send(typeData, []byte("last words"))
		m.send(typeAlert, closeNotify)
		m.wantRead("last ")
		m.move()
		m.wantRead("words")
		m.wantEOF()
		m.closes()
	}},
	{name: "peer's close_notify comes while nobody owns it", run: func(m *mover) {
		m.moveWhile(func() {
			m.send(typeData, []byte("last words"))
			m.send(typeAlert, closeNotify)
			_ = m.c.CloseWrite()
		})
		m.wantRead("last words")
		m.wantEOF()
		m.closes()
	}},
	{name: "CLOSE_WAIT, unread", run: func(m *mover) {
		m.send(typeData, []byte("question"))
		m.send(typeAlert, closeNotify)
		_ = m.c.CloseWrite()
		m.finished()
		m.move()
		m.wantRead("question")
		m.wantEOF()
		m.write(pattern(50_000))
		m.closesWriting()
	}},
	{name: "CLOSE_WAIT, read, in the middle of the answer", run: func(m *mover) {
		m.send(typeData, []byte("question"))
		m.send(typeAlert, closeNotify)
		_ = m.c.CloseWrite()
		m.wantRead("question")
		m.wantEOF()
		m.fill()
		m.move()
		m.wantEOF()
		m.flush()
		m.write([]byte("the end"))
		m.closes()
	}},
	{name: "FIN without close_notify, unread", run: func(m *mover) {
		m.send(typeData, []byte("cut"))
		_ = m.c.CloseWrite()
		m.finished()
		m.move()
		m.wantRead("cut")
		m.wantEnd(ErrTruncated)
		m.closes()
	}},
	{name: "FIN without close_notify, read", run: func(m *mover) {
		_ = m.c.CloseWrite()
		m.wantEnd(ErrTruncated)
		m.move()
		m.wantEnd(ErrTruncated)
		m.write([]byte("they may still read"))
		m.closes()
	}},
	{name: "FIN inside a record", run: func(m *mover) {
		for i, cut := range []int{3, 5, 12} {
			if i > 0 {
				m.again()
			}
			m.send(typeData, []byte("whole"))
			m.sendRaw(m.seal(typeData, []byte("cut short"))[:cut])
			m.wantRead("whole")
			m.pull()
			m.moveWhile(func() { _ = m.c.CloseWrite() })
			m.wantEnd(ErrTruncated)
			m.move()
			m.wantEnd(ErrTruncated)
			m.closes()
		}
	}},
	{name: "FIN inside close_notify", run: func(m *mover) {
		rec := m.seal(typeAlert, closeNotify)
		m.sendRaw(rec[:len(rec)-1])
		m.pull()
		_ = m.c.CloseWrite()
		m.move()
		m.wantEnd(ErrTruncated)
		m.closes()
	}},
	{name: "reset before", run: func(m *mover) {
		m.peerResets()
		m.finished()
		m.move()
		m.wantReset()
	}},
	{name: "reset while nobody owns it", run: func(m *mover) {
		m.moveWhile(m.peerResets)
		m.finished()
		m.wantReset()
		if n, err := m.conn.Write([]byte("x")); err == nil {
			m.t.Errorf("Write after a reset took %d bytes", n)
		}
	}},
	{name: "reset, which a write meets first", run: func(m *mover) {
		m.send(typeData, []byte("read, not read"))
		m.wantRead("read, ")
		m.moveWhile(m.peerResets)
		m.finished()
		if n, err := m.conn.Write([]byte("x")); err == nil {
			m.t.Errorf("Write after a reset took %d bytes", n)
		}
		m.wantRead("not read")
		m.wantReset()
	}},
	{name: "reset with opened bytes unread", run: func(m *mover) {
		m.send(typeData, []byte("read, not read"))
		m.wantRead("read, ")
		m.peerResets()
		m.finished()
		m.move()
		m.wantRead("not read")
		m.wantReset()
	}},
	{name: "reset behind a record in the socket", run: func(m *mover) {
		m.send(typeData, []byte("delivered"))
		m.moveWhile(m.peerResets)
		m.finished()
		m.wantRead("delivered")
		m.wantReset()
	}},
	{name: "reset inside a record", run: func(m *mover) {
		m.sendRaw(m.seal(typeData, []byte("cut short"))[:9])
		m.pull()
		m.moveWhile(m.peerResets)
		m.finished()
		m.wantReset()
	}},
	{name: "reset with our output unsent", run: func(m *mover) {
		m.fill()
		m.moveWhile(m.peerResets)
		m.finished()
		if err := m.conn.Flush(); err == nil && m.conn.Pending() > 0 {
			m.t.Error("Flush after a reset reported no error")
		}
		if err := m.conn.Close(); err != nil {
			m.t.Errorf("Close: %v", err)
		}
	}},
	{name: "peer's fatal alert unread", run: func(m *mover) {
		m.send(typeData, []byte("before"))
		m.send(typeAlert, []byte{levelFatal, byte(alertInternalError)})
		m.wantRead("bef")
		m.move()
		m.wantRead("ore")
		_, err := m.conn.Read(make([]byte, 10))
		var alert *AlertError
		if !errors.As(err, &alert) || alert.Sent || alert.Alert != alertInternalError {
			m.t.Fatalf("Read: %v", err)
		}
	}},
	{name: "bad record unread", run: func(m *mover) {
		m.send(typeData, []byte("good"))
		m.wantRead("go")
		bad := m.seal(typeData, []byte("bad"))
		bad[len(bad)-1] ^= 1
		m.sendRaw(bad)
		m.move()
		m.wantRead("od")
		m.wantAlert(alertBadRecordMAC)
	}},
	{name: "bad record cut in half", run: func(m *mover) {
		bad := m.seal(typeData, []byte("bad"))
		bad[len(bad)-1] ^= 1
		m.sendRaw(bad[:11])
		m.pull()
		m.move()
		m.sendRaw(bad[11:])
		m.wantAlert(alertBadRecordMAC)
	}},
	{name: "our CloseWrite, the peer goes on", run: func(m *mover) {
		m.write([]byte("that is all"))
		m.closesWriting()
		m.send(typeData, []byte("one "))
		m.move()
		m.send(typeData, []byte("two "))
		m.wantRead("one tw")
		m.move()
		m.wantRead("o ")
		if n, err := m.conn.Write([]byte("x")); n != 0 || err == nil {
			m.t.Errorf("Write after CloseWrite: %d, %v", n, err)
		}
		m.send(typeAlert, closeNotify)
		m.wantEOF()
		if err := m.conn.CloseWrite(); err != nil {
			m.t.Errorf("CloseWrite again: %v", err)
		}
		if err := m.conn.Close(); err != nil {
			m.t.Errorf("Close: %v", err)
		}
	}},
	{name: "our CloseWrite into a full socket, finished by the next owner", run: func(m *mover) {
		m.fill()
		m.interruptedCloseWrite()
		m.move()
		m.closesWriting()
		m.send(typeData, []byte("the peer goes on"))
		m.wantRead("the peer goes on")
	}},
	{name: "our CloseWrite into a full socket, then Close", run: func(m *mover) {
		m.fill()
		m.interruptedCloseWrite()
		m.move()
		m.closes()
	}},
}

// wantEOF is a clean end, which lasts.
func (m *mover) wantEOF() {
	m.t.Helper()
	for range 2 {
		if n, err := m.conn.Read(make([]byte, 10)); n != 0 || err != io.EOF { //nolint:errorlint // io.Reader promises EOF itself
			m.t.Fatalf("Read gave %d bytes and %v, expected io.EOF", n, err)
		}
	}
}

// wantAlert is a session that ends because of what the peer did.
func (m *mover) wantAlert(a Alert) {
	m.t.Helper()
	_, err := m.conn.Read(make([]byte, 10))
	var alert *AlertError
	if !errors.As(err, &alert) || !alert.Sent || alert.Alert != a {
		m.t.Fatalf("Read: %v, expected alert %v", err, a)
	}
	m.want(typeAlert, string([]byte{levelFatal, byte(a)}))
}

func (m *mover) interruptedCloseWrite() {
	m.t.Helper()
	_ = m.conn.SetWriteDeadline(past)
	if err := m.conn.CloseWrite(); !isTimeout(err) {
		m.t.Fatalf("CloseWrite into a full socket: %v", err)
	}
	_ = m.conn.SetWriteDeadline(never)
}

// A session whose connection is gone, as only its writing side has heard, stays where
// it is: a new owner would take the end of the stream for a FIN.
func TestDetachAfterResetInAnAnswer(t *testing.T) {
	s := newScripted(t, LayerSoftware, tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256)
	s.send(typeHandshake, []byte{msgClientHello, 0, 0, 0}) // which is refused
	s.send(typeData, []byte("last words"))
	m := &mover{scripted: s}
	m.peerResets()
	m.finished()
	_ = s.conn.SetDeadline(time.Now().Add(testWait))
	s.wantRead("last")
	_, _, err := s.conn.Detach()
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("Detach: %v", err)
	}
	s.wantRead(" words")
	m.wantReset()
}
