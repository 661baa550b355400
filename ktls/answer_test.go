package ktls

import (
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// A peer that asks for new keys several times in a row, each time in a record of its
// own that is read before the next is sent, gets one answer, in front of the data
// that follows (RFC 8446 section 4.6.3); and gets it too if none follows.
func TestKeyUpdateAnswerWaitsForMore(t *testing.T) {
	// With a relay, whoever has the secrets decides when the answer goes out.
	bothLayers(t, func(t *testing.T, layer Layer) {
		if layer == LayerKernel {
			guest.NeedKernel(t, 6, 14, "a change of keys")
		}
		newSession := func() *scripted {
			if layer == LayerKernel {
				return newChanging(t, gcm, false)
			}
			return newScripted(t, layer, v13, gcm)
		}
		const requests = 5
		// More answers than one are right when the requests took long. That they always
		// do is what must not be.
		for attempt := 1; ; attempt++ {
			s := newSession()
			began := time.Now()
			for range requests {
				s.send(typeHandshake, []byte(updateRequest))
				s.rekeyOut()
				s.send(typeData, []byte("x"))
				s.wantRead("x")
			}
			if _, err := s.conn.Write([]byte("y")); err != nil {
				t.Fatal(err)
			}
			slow := time.Since(began) > answerDelay/2
			answers := 0
			for {
				typ, p, err := s.next()
				if err != nil {
					t.Fatal(err)
				}
				if typ == typeData && string(p) == "y" {
					break
				}
				if typ != typeHandshake || string(p) != updateOnly {
					t.Fatalf("record of type %d: %q", typ, p)
				}
				answers++
				s.rekeyIn()
			}
			if answers == 1 {
				break
			}
			if !slow || attempt == 5 {
				t.Fatalf("%d answers to %d requests", answers, requests)
			}
		}

		s := newSession()
		s.send(typeHandshake, []byte(updateRequest))
		s.rekeyOut()
		s.send(typeData, []byte("x"))
		s.wantRead("x")
		// Nobody reads or writes here any more.
		s.want(typeHandshake, updateOnly)
		s.rekeyIn()
	})
}

// A session that ends or moves before its answer is due leaves nobody behind who
// would still send it.
func TestKeyUpdateAnswerAfterTheEnd(t *testing.T) {
	for _, move := range []bool{false, true} {
		s := newScripted(t, LayerSoftware, v13, gcm)
		s.send(typeHandshake, []byte(updateRequest))
		s.rekeyOut()
		s.send(typeData, []byte("x"))
		s.wantRead("x")
		old := s.conn
		if move {
			s.move()
		} else if err := old.Close(); err != nil {
			t.Fatal(err)
		}
		deadline := time.Now().Add(testWait)
		for old.answering.Load() {
			if time.Now().After(deadline) {
				t.Fatal("the timer never ended")
			}
			time.Sleep(time.Millisecond)
		}
		if !move {
			continue
		}
		// The next owner sends it, once.
		if _, err := s.conn.Write([]byte("y")); err != nil {
			t.Fatal(err)
		}
		s.want(typeHandshake, updateOnly)
		s.rekeyIn()
		s.want(typeData, "y")
	}
}
