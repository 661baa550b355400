package ktls

import (
	"bytes"
	"errors"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"
)

// A Write that a deadline ends says how much it took, and those bytes reach the
// peer once, in order, whether flushed here or after a move.
func TestWriteInterrupted(t *testing.T) {
	eachSuite(t, func(t *testing.T, layer Layer, version, suite uint16) {
		for _, moves := range []bool{false, true} {
			s := newScripted(t, layer, version, suite)
			s.smallBuffers()
			data := pattern(1 << 20) // much more than the socket takes
			taken := 0
			for range 3 {
				_ = s.conn.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
				n, err := s.conn.Write(data[taken:])
				taken += n
				if !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatalf("Write of %d bytes to a peer that does not read: %d, %v", len(data), taken, err)
				}
				if moves {
					s.move()
				}
			}
			if layer == LayerSoftware && s.conn.Pending() == 0 {
				t.Error("nothing is pending after an interrupted Write")
			}
			if err := s.conn.QueueWrite([]byte("queued")); err != nil {
				t.Fatal(err)
			}
			if moves {
				s.move()
			}
			_ = s.conn.SetWriteDeadline(time.Now().Add(testWait))
			var wg sync.WaitGroup
			wg.Go(func() {
				if err := s.conn.Flush(); err != nil {
					t.Errorf("Flush: %v", err)
				}
				if _, err := s.conn.Write([]byte("end")); err != nil {
					t.Errorf("Write: %v", err)
				}
			})
			want := append(append([]byte(nil), data[:taken]...), "queuedend"...)
			if got := s.wantData(len(want)); !bytes.Equal(got, want) {
				t.Error("the peer got other bytes than were taken")
			}
			wg.Wait()
			if s.conn.Pending() != 0 {
				t.Errorf("%d bytes pending after Flush", s.conn.Pending())
			}
		}
	})
}

// A deadline in the past stops a Write before it takes anything.
func TestWriteAfterDeadline(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		s := newScripted(t, layer, v13, gcm)
		_ = s.conn.SetDeadline(past)
		n, err := s.conn.Read(make([]byte, 10))
		if n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Read: %d, %v", n, err)
		}
		n, err = s.conn.Write([]byte("late"))
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Write: %d, %v", n, err)
		}
		_ = s.conn.SetDeadline(time.Time{})
		want := "late"[:n] + "more"
		if _, err := s.conn.Write([]byte("more")); err != nil {
			t.Fatal(err)
		}
		if got := string(s.wantData(len(want))); got != want {
			t.Errorf("peer got %q, expected %q", got, want)
		}
	})
}

// Close does not wait for a writer that is stuck, and does not hang itself.
func TestCloseWhileWriterIsStuck(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		s := newScripted(t, layer, v13, gcm)
		s.smallBuffers()
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := s.conn.Write(make([]byte, 16<<20))
			if !errors.Is(err, net.ErrClosed) {
				t.Errorf("stuck Write: %v", err)
			}
		})
		for s.conn.wmu.TryLock() { // until the writer has it
			s.conn.wmu.Unlock()
			runtime.Gosched()
		}
		start := time.Now()
		_ = s.conn.Close()
		if d := time.Since(start); d > closeTimeout+3*time.Second {
			t.Errorf("Close took %v", d)
		}
		wg.Wait()
	})
}
