package ktls

import (
	"bytes"
	"errors"
	"io"
	"net"
	"runtime"
	"testing"
)

// What writers do that wait for other keys. None of it depends on the record layer, so
// it is tested in the software layer.

type noRelay struct{}

func (noRelay) KeyUpdateReceived(uint64, bool) {}
func (noRelay) KeyUpdateWanted(bool)           {}

func newWaiting(t *testing.T) (*scripted, *relayed) {
	t.Helper()
	s := newScripted(t, LayerSoftware, v13, gcm)
	s.conn.rel = &relayed{relay: noRelay{}, change: make(chan struct{})}
	return s, s.conn.rel
}

// until waits for something that another goroutine is about to do.
func until(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for range 1 << 22 {
		if cond() {
			return
		}
		runtime.Gosched()
	}
	t.Fatalf("not within the limit: %s", what)
}

// letOthersRun gives other goroutines the time to get where nothing can be seen of them.
// A test is red only if they did, and never because they did not.
func letOthersRun() {
	for range 1 << 14 {
		runtime.Gosched()
	}
}

func (c *Conn) writerWaits() bool {
	if !c.wmu.TryLock() {
		return false
	}
	defer c.wmu.Unlock()
	if !c.turn.TryLock() {
		return true // a writer is in its section, and has given up wmu
	}
	c.turn.Unlock()
	return false
}

// Queued output of which a part is sent is exported, or sent by Close, without that part.
func TestQueueWhileItsWriterWaitsForKeys(t *testing.T) {
	const total = 3 * writeChunk
	for _, how := range []string{"Detach", "Close"} {
		t.Run(how, func(t *testing.T) {
			s, r := newWaiting(t)
			s.smallBuffers()
			if err := s.conn.QueueWrite(make([]byte, total)); err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			go func() { done <- s.conn.Flush() }()
			got := 0
			for got < writeChunk {
				_, p, err := s.next()
				if err != nil {
					t.Fatal(err)
				}
				if got == 0 { // the writer is on its way, and the buffers are too small for the rest
					r.do(func() { r.debts++ })
				}
				got += len(p)
			}
			until(t, "the writer waits for its turn", s.conn.writerWaits)
			if how == "Detach" {
				sock, st, err := s.conn.Detach()
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = sock.Close() })
				got += len(st.record.Queued)
			} else {
				closed := make(chan error, 1)
				go func() { closed <- s.conn.Close() }()
				for {
					typ, p, err := s.next()
					if errors.Is(err, io.EOF) {
						break
					}
					if err != nil {
						t.Fatal(err)
					}
					if typ == typeData {
						got += len(p)
					}
				}
				<-closed
			}
			if got != total {
				t.Errorf("%d bytes in all, want %d", got, total)
			}
			if err := <-done; !errors.Is(err, net.ErrClosed) {
				t.Errorf("Flush: %v", err)
			}
		})
	}
}

// A pause takes the first byte of the queued output itself, to close a record.
func TestPauseWhileTheQueueIsSent(t *testing.T) {
	s, r := newWaiting(t)
	s.smallBuffers()
	out := make([]byte, 3*writeChunk)
	for i := range out {
		out[i] = byte(i % 251)
	}
	if err := s.conn.QueueWrite(out); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.conn.Flush() }()
	var got []byte
	read := func(n int) {
		for len(got) < n {
			_, p, err := s.next()
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, p...)
		}
	}
	read(1)
	r.do(func() { r.debts++ }) // the buffers are too small for the rest of the writer's piece
	read(writeChunk)
	until(t, "the writer waits for its turn", s.conn.writerWaits)
	letOthersRun()
	if err := s.conn.Pause(); err != nil {
		t.Fatal(err)
	}
	r.do(func() { r.paid = r.debts })
	s.conn.Continue()
	read(len(out))
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if n := s.conn.Pending(); !bytes.Equal(got, out) || n != 0 {
		t.Errorf("%d bytes, %d still to send: not what was queued", len(got), n)
	}
}

// A pause that begins when a writer has just been told to go on holds that writer.
func TestPauseOvertakesAWriter(t *testing.T) {
	s, r := newWaiting(t)
	r.do(func() { r.debts++ })
	done := make(chan error, 1)
	go func() { // the part of a Write that follows another
		s.conn.lockWrite()
		defer s.conn.unlockWrite()
		_, err := s.conn.send([]byte("x"))
		done <- err
	}()
	until(t, "the writer waits for its turn", s.conn.writerWaits)
	letOthersRun()
	s.conn.wmu.Lock()
	r.do(func() { r.paid = r.debts }) // the writer wakes, and cannot have wmu
	letOthersRun()
	r.do(func() { r.paused = true }) // as Pause does, with wmu
	s.conn.wmu.Unlock()
	letOthersRun()
	until(t, "the writer waits again", s.conn.writerWaits)
	select {
	case err := <-done:
		t.Fatalf("written in a pause: %v", err)
	default:
	}
	s.conn.Continue()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// A session at its end sends no KeyUpdate any more: whoever waits for one is told.
func TestNobodyWaitsForKeysAfterTheEnd(t *testing.T) {
	for name, f := range map[string]func(c *Conn) error{
		"Write":     func(c *Conn) error { _, err := c.Write([]byte("x")); return err },
		"KeyUpdate": func(c *Conn) error { return c.KeyUpdate(false) },
	} {
		t.Run(name, func(t *testing.T) {
			s, r := newWaiting(t)
			if name == "Write" {
				r.do(func() { r.debts++ })
			}
			done := make(chan error, 1)
			go func() { done <- f(s.conn) }()
			until(t, "the writer waits", s.conn.writerWaits)
			_ = s.conn.fail(alertUnexpectedMessage, "a record out of place")
			if err := s.conn.Pause(); err == nil {
				t.Fatal("a pause of a session that has ended")
			}
			var alert *AlertError
			if err := <-done; !errors.As(err, &alert) {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
}
