package ktls

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

const (
	updateOnly    = "\x18\x00\x00\x01\x00"
	updateRequest = "\x18\x00\x00\x01\x01"
)

func suites13(t *testing.T, f func(t *testing.T, suite uint16)) {
	for _, tc := range testSuites {
		if tc.version == tls.VersionTLS13 {
			t.Run(suiteTestName(tc.version, tc.suite), func(t *testing.T) { f(t, tc.suite) })
		}
	}
}

// KeyUpdates of the peer, asked and unasked, whole and in pieces, with moves
// between and inside them.
func TestKeyUpdateReceived(t *testing.T) {
	whoeverChangesKeys(t, func(t *testing.T, newSession func(suite uint16) *scripted) {
		suites13(t, func(t *testing.T, suite uint16) { testKeyUpdateReceived(t, newSession(suite)) })
	})
}

func testKeyUpdateReceived(t *testing.T, s *scripted) {
	echo := func(text string) {
		t.Helper()
		s.send(typeData, []byte(text))
		s.wantRead(text)
		if _, err := s.conn.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
		s.want(typeData, text)
	}
	echo("generation 0")

	s.send(typeHandshake, []byte(updateOnly))
	s.rekeyOut()
	echo("peer's generation 1")

	s.send(typeHandshake, []byte(updateRequest))
	s.rekeyOut()
	s.send(typeData, []byte("x"))
	s.wantRead("x")
	s.want(typeHandshake, updateOnly)
	s.rekeyIn()
	echo("both")

	// In pieces, and the session moves between them.
	for i := range len(updateRequest) {
		s.send(typeHandshake, []byte(updateRequest[i:i+1]))
		if i < len(updateRequest)-1 {
			_ = s.conn.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
			if n, err := s.conn.Read(make([]byte, 10)); n != 0 || !isTimeout(err) {
				t.Fatalf("%d bytes, %v", n, err)
			}
			s.move()
		}
	}
	s.rekeyOut()
	s.send(typeData, []byte("y"))
	s.wantRead("y")
	s.want(typeHandshake, updateOnly)
	s.rekeyIn()
	echo("after pieces")
	s.move()
	echo("after a move")

	// Records under the new key in the same segment as the KeyUpdate, some of them
	// received before it was looked at.
	var burst []byte
	for range 10 {
		burst = append(burst, s.seal(typeData, []byte("old"))...)
		burst = append(burst, s.seal(typeHandshake, []byte(updateOnly))...)
		s.rekeyOut()
		burst = append(burst, s.seal(typeData, []byte("new"))...)
	}
	s.sendRaw(burst)
	for range 10 {
		s.wantRead("oldnew")
	}
	echo("after a burst")
}

// Requests that come before the answer is out get one answer.
func TestKeyUpdateAnswersAreCoalesced(t *testing.T) {
	s := newScripted(t, LayerSoftware, v13, gcm)
	s.conn.wmu.Lock() // a Write is in progress
	for range 5 {
		s.send(typeHandshake, []byte(updateRequest))
		s.rekeyOut()
	}
	s.send(typeData, []byte("x"))
	s.wantRead("x")
	s.conn.unlockWrite() // the writer pays when it ends
	s.want(typeHandshake, updateOnly)
	s.rekeyIn()
	if _, err := s.conn.Write([]byte("next")); err != nil {
		t.Fatal(err)
	}
	s.want(typeData, "next")
}

func TestKeyUpdateFlood(t *testing.T) {
	whoeverChangesKeys(t, func(t *testing.T, newSession func(suite uint16) *scripted) {
		s := newSession(gcm)
		for range maxHandshakes + 1 {
			s.send(typeHandshake, []byte(updateOnly))
			s.rekeyOut()
		}
		_, err := s.conn.Read(make([]byte, 1))
		var alert *AlertError
		if !errors.As(err, &alert) || alert.Alert != alertUnexpectedMessage {
			t.Fatal(err)
		}
		s.want(typeAlert, string([]byte{levelFatal, byte(alertUnexpectedMessage)}))
	})
}

// A peer that asks for new keys again and again and reads nothing gets one answer:
// what is kept for it does not grow, and the session can still move.
func TestKeyUpdatesOfPeerThatDoesNotRead(t *testing.T) {
	s := newScripted(t, LayerSoftware, v13, gcm)
	s.smallBuffers()
	_ = s.conn.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
	total, err := s.conn.Write(pattern(8 << 20))
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("Write to a peer that does not read: %v", err)
	}
	full := s.conn.Pending()
	rounds := 20_000
	if guest.InGuest() {
		rounds = 1_000 // emulated
	}
	for range rounds {
		s.send(typeHandshake, []byte(updateRequest))
		s.rekeyOut()
		s.send(typeData, []byte("x")) // or it would be a flood without data
		s.wantRead("x")
	}
	if n := s.conn.Pending(); n > full+100 {
		t.Fatalf("%d bytes are kept, %d before the requests", n, full)
	}
	s.move()
	got := make(chan int)
	go func() { got <- len(s.wantData(total)) }()
	if err := s.conn.Flush(); err != nil {
		t.Fatal(err)
	}
	if n := <-got; n != total {
		t.Errorf("the peer got %d of %d bytes", n, total)
	}
	s.want(typeHandshake, updateOnly)
	s.rekeyIn()
	if _, err := s.conn.Write([]byte("next")); err != nil {
		t.Fatal(err)
	}
	s.want(typeData, "next")
}

// An answer that is owed when the session moves is sent by the next owner.
func TestKeyUpdateOwedTravels(t *testing.T) {
	s := newScripted(t, LayerSoftware, v13, gcm)
	s.conn.wmu.Lock()
	s.send(typeHandshake, []byte(updateRequest))
	s.rekeyOut()
	s.send(typeData, []byte("x"))
	s.wantRead("x")
	s.conn.wmu.Unlock() // without unlockWrite: nobody paid
	s.move()
	if err := s.conn.Flush(); err != nil {
		t.Fatal(err)
	}
	s.want(typeHandshake, updateOnly)
	s.rekeyIn()
	if _, err := s.conn.Write([]byte("next")); err != nil {
		t.Fatal(err)
	}
	s.want(typeData, "next")
}

func TestKeyUpdateSent(t *testing.T) {
	whoeverChangesKeys(t, func(t *testing.T, newSession func(suite uint16) *scripted) {
		suites13(t, func(t *testing.T, suite uint16) {
			s := newSession(suite)
			if err := s.conn.KeyUpdate(false); err != nil {
				t.Fatal(err)
			}
			s.want(typeHandshake, updateOnly)
			s.rekeyIn()
			if err := s.conn.KeyUpdate(true); err != nil {
				t.Fatal(err)
			}
			s.want(typeHandshake, updateRequest)
			s.rekeyIn()
			s.move()
			if _, err := s.conn.Write([]byte("third key")); err != nil {
				t.Fatal(err)
			}
			s.want(typeData, "third key")
		})
	})
	s := newScripted(t, LayerSoftware, tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256)
	if err := s.conn.KeyUpdate(false); err == nil {
		t.Error("KeyUpdate in TLS 1.2 succeeded")
	}
	if _, err := s.conn.Write([]byte("alive")); err != nil {
		t.Fatal(err)
	}
	s.want(typeData, "alive")
}

// Before the limit of use, the key is changed where it can be and the session
// closed where it cannot.
func TestKeyLimitSending(t *testing.T) {
	whoeverChangesKeys(t, func(t *testing.T, newSession func(suite uint16) *scripted) {
		s := newSession(gcm)
		s.conn.limit = 3 * usage(maxPlaintext)
		want := pattern(10 * maxPlaintext)
		var wg sync.WaitGroup
		wg.Go(func() {
			for i := range 10 {
				if _, err := s.conn.Write(want[i*maxPlaintext : (i+1)*maxPlaintext]); err != nil {
					t.Error(err)
				}
			}
		})
		var got []byte
		updates := 0
		for len(got) < len(want) {
			typ, p, err := s.next()
			if err != nil {
				t.Fatal(err)
			}
			if typ == typeHandshake {
				updates++
				s.rekeyIn()
				continue
			}
			got = append(got, p...)
		}
		wg.Wait()
		if !bytes.Equal(got, want) || updates != 3 {
			t.Errorf("%d KeyUpdates for ten records, expected 3; bytes equal: %v", updates, bytes.Equal(got, want))
		}
	})

	bothLayers(t, func(t *testing.T, layer Layer) {
		s := newScripted(t, layer, tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256)
		s.conn.limit = usage(100) + usage(50)
		if _, err := s.conn.Write(pattern(100)); err != nil {
			t.Fatal(err)
		}
		if _, err := s.conn.Write(pattern(100)); !errors.Is(err, ErrKeyLimit) {
			t.Fatalf("Write over the limit: %v", err)
		}
		s.wantData(100)
		s.want(typeAlert, "\x01\x00")
		s.wantEnd(ErrKeyLimit)
	})
}

func TestKeyLimitReceiving(t *testing.T) {
	whoeverChangesKeys(t, func(t *testing.T, newSession func(suite uint16) *scripted) {
		s := newSession(gcm)
		s.conn.limit = 4 * usage(100)
		for range 5 { // the fifth is over the limit; the peer is asked once
			s.send(typeData, pattern(100))
			s.wantRead(string(pattern(100)))
		}
		_ = s.conn.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		if _, err := s.conn.Read(make([]byte, 1)); !isTimeout(err) {
			t.Fatal(err)
		}
		_ = s.conn.SetReadDeadline(time.Now().Add(testWait))
		s.want(typeHandshake, updateRequest)
		s.rekeyIn()
		s.send(typeHandshake, []byte(updateOnly))
		s.rekeyOut()
		for range 4 {
			s.send(typeData, pattern(100))
			s.wantRead(string(pattern(100)))
		}
	})

	bothLayers(t, func(t *testing.T, layer Layer) {
		s := newScripted(t, layer, tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256)
		s.conn.limit = usage(100)
		s.send(typeData, pattern(200))
		s.wantRead(string(pattern(200)))
		s.wantEnd(ErrKeyLimit)
		s.want(typeAlert, "\x01\x00")
	})
}

// Without the next keys a KeyUpdate ends the session with close_notify, in
// whatever form it comes.
func TestKernelKeyUpdateEndsCleanly(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		if layer == LayerSoftware {
			return
		}
		for _, msg := range []string{updateOnly, updateRequest} {
			s := newScripted(t, layer, v13, gcm)
			s.send(typeData, []byte("before"))
			s.send(typeHandshake, []byte(msg))
			s.wantRead("before")
			s.wantEnd(ErrKeyUpdateUnsupported)
			if _, err := s.conn.Write([]byte("x")); !errors.Is(err, ErrKeyUpdateUnsupported) {
				t.Errorf("Write: %v", err)
			}
			s.want(typeAlert, "\x01\x00")
			if err := s.conn.Close(); err != nil {
				t.Error(err)
			}
			s.wantFINOrReset()
		}
		s := newScripted(t, layer, v13, gcm)
		s.send(typeHandshake, []byte(updateOnly[:2]))
		s.send(typeHandshake, []byte(updateOnly[2:]))
		s.wantEnd(ErrKeyUpdateUnsupported)
		s.want(typeAlert, "\x01\x00")
	})
}

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}

var _ io.ReadWriteCloser = (*Conn)(nil)
