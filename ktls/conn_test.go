package ktls

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// A Read that a deadline ends inside a record loses nothing, and the session can
// move at every byte of it.
func TestMoveAtEveryReceivedByte(t *testing.T) {
	eachSuite(t, func(t *testing.T, layer Layer, version, suite uint16) {
		s := newScripted(t, layer, version, suite)
		var stream []byte
		var want []byte
		for _, n := range []int{1, 40, 3} {
			stream = append(stream, s.seal(typeData, pattern(n))...)
			want = append(want, pattern(n)...)
		}
		step := 1
		if guest.InGuest() {
			step = 7 // an emulated machine is slow
		}
		var got []byte
		buf := make([]byte, 16)
		for i := 0; i < len(stream); i += step {
			s.sendRaw(stream[i:min(len(stream), i+step)])
			// Reads what is complete, and the rest of the record into the session.
			_ = s.conn.SetReadDeadline(time.Now().Add(3 * time.Millisecond))
			for {
				n, err := s.conn.Read(buf)
				got = append(got, buf[:n]...)
				if err != nil {
					if !errors.Is(err, os.ErrDeadlineExceeded) {
						t.Fatal(err)
					}
					break
				}
				if n == len(buf) {
					break // opened and unread bytes travel too
				}
			}
			s.move()
		}
		rest, err := io.ReadAll(io.LimitReader(s.conn, int64(len(want)-len(got))))
		if err != nil {
			t.Fatal(err)
		}
		if got = append(got, rest...); !bytes.Equal(got, want) {
			t.Errorf("got %d bytes, expected %d; equal: %v", len(got), len(want), false)
		}
		if _, err := s.conn.Write([]byte("reply")); err != nil {
			t.Fatal(err)
		}
		s.want(typeData, "reply")
	})
}

func TestUnreadAndQueue(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		s := newScripted(t, layer, v13, gcm)
		s.send(typeData, []byte("a line\nhalf"))
		buf := make([]byte, 100)
		n, err := s.conn.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		s.conn.Unread(buf[7:n])
		s.conn.Unread([]byte("first "))
		if got := s.conn.Buffered(); got != 10 {
			t.Errorf("Buffered: %d", got)
		}
		if err := s.conn.QueueWrite([]byte("out1 ")); err != nil {
			t.Fatal(err)
		}
		s.move()
		if got := s.conn.Buffered(); got != 10 {
			t.Errorf("Buffered after the move: %d", got)
		}
		if err := s.conn.QueueWrite([]byte("out2 ")); err != nil {
			t.Fatal(err)
		}
		if got := s.conn.Pending(); got != 10 {
			t.Errorf("Pending: %d", got)
		}
		s.wantRead("first half")
		if _, err := s.conn.Write([]byte("out3")); err != nil {
			t.Fatal(err)
		}
		if got := string(s.wantData(14)); got != "out1 out2 out3" {
			t.Errorf("peer got %q", got)
		}
		if err := s.conn.QueueWrite(make([]byte, MaxQueued)); err != nil {
			t.Errorf("QueueWrite of MaxQueued: %v", err)
		}
		if err := s.conn.QueueWrite([]byte("x")); !errors.Is(err, ErrQueueFull) {
			t.Errorf("QueueWrite above MaxQueued: %v", err)
		}
	})
}

// Close sends what is queued, close_notify and FIN, although another descriptor of
// the socket stays open.
func TestClose(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		s := newScripted(t, layer, v13, gcm)
		retained := duplicate(t, s.conn.sock)
		defer func() { _ = retained.Close() }()
		if err := s.conn.QueueWrite([]byte("bye")); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := s.conn.Read(make([]byte, 10)); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Read ended by Close: %v", err)
			}
		})
		if err := s.conn.Close(); err != nil {
			t.Error(err)
		}
		wg.Wait()
		s.want(typeData, "bye")
		s.want(typeAlert, "\x01\x00")
		s.wantFIN()
		for name, err := range map[string]error{
			"Close": s.conn.Close(), "CloseWrite": s.conn.CloseWrite(), "Flush": s.conn.Flush(),
			"SetDeadline": s.conn.SetDeadline(time.Now()), "QueueWrite": s.conn.QueueWrite([]byte("x")),
		} {
			if !errors.Is(err, net.ErrClosed) {
				t.Errorf("%s after Close: %v", name, err)
			}
		}
	})
}

func TestDetach(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		s := newScripted(t, layer, v13, gcm)
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := s.conn.Read(make([]byte, 10)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("Read: %v", err)
			}
		})
		for s.conn.rmu.TryLock() { // until the reader has it
			s.conn.rmu.Unlock()
			runtime.Gosched()
		}
		_ = s.conn.SetDeadline(past)
		sock, st, err := s.conn.Detach()
		if err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		if st.Layer() != layer {
			t.Errorf("layer %v", st.Layer())
		}
		if _, err := s.conn.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Read after Detach: %v", err)
		}
		if _, err := s.conn.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Write after Detach: %v", err)
		}
		if err := s.conn.Close(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Close after Detach: %v", err)
		}
		if _, _, err := s.conn.Detach(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Detach after Detach: %v", err)
		}
		// The connection is untouched: whoever gave it away can take it back.
		facts, _ := st.MarshalFacts()
		rec, err := st.MarshalRecord()
		if err != nil {
			t.Fatal(err)
		}
		st.Wipe()
		if layer == LayerSoftware {
			if _, err := st.MarshalRecord(); err == nil {
				t.Error("MarshalRecord after Wipe succeeded")
			}
		}
		if _, err := st.MarshalSecrets(); !errors.Is(err, ErrNoSecrets) {
			t.Errorf("MarshalSecrets after Wipe: %v", err)
		}
		s.conn, err = Import(sock, facts, rec)
		if err != nil {
			t.Fatal(err)
		}
		_ = s.conn.SetDeadline(time.Now().Add(testWait))
		s.send(typeData, []byte("still"))
		s.wantRead("still")
	})
}

// Reads of every size give the same bytes.
func TestReadSizes(t *testing.T) {
	eachSuite(t, func(t *testing.T, layer Layer, version, suite uint16) {
		s := newScripted(t, layer, version, suite)
		var want []byte
		for _, n := range []int{1, maxPlaintext, 15, 16, 17, 1000, maxPlaintext - 1} {
			want = append(want, pattern(n)...)
		}
		for _, size := range []int{7, 1000, maxPlaintext, maxPlaintext + 1, maxPlaintext + 17, 64 << 10} {
			var wg sync.WaitGroup
			wg.Go(func() {
				for _, n := range []int{1, maxPlaintext, 15, 16, 17, 1000, maxPlaintext - 1} {
					s.send(typeData, pattern(n))
				}
			})
			var got []byte
			buf := make([]byte, size)
			for len(got) < len(want) {
				n, err := s.conn.Read(buf)
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, buf[:n]...)
			}
			wg.Wait()
			if !bytes.Equal(got, want) {
				t.Errorf("reads of %d bytes gave other bytes", size)
			}
		}
	})
}

// In steady state neither direction allocates.
func TestSoftwareDoesNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Log("the race detector's own allocations make this meaningless; it runs without")
		return
	}
	for _, tc := range testSuites {
		s := newScripted(t, LayerSoftware, tc.version, tc.suite)
		rec := make([]byte, 4096)
		buf := make([]byte, 100)
		payload := pattern(100)
		// One record sealed ahead for each run: the peer's own sealing allocates.
		const runs = 200
		var recs [][]byte
		for range 2*runs + 2 {
			recs = append(recs, s.seal(typeData, payload))
		}
		i := 0
		allocs := testing.AllocsPerRun(runs, func() {
			if _, err := s.c.Write(recs[i]); err != nil {
				t.Fatal(err)
			}
			i++
			if _, err := io.ReadFull(s.conn, buf); err != nil {
				t.Fatal(err)
			}
			if _, err := s.conn.Write(buf); err != nil {
				t.Fatal(err)
			}
			if _, err := s.c.Read(rec); err != nil {
				t.Fatal(err)
			}
		})
		if allocs >= 1 {
			t.Errorf("%s: %v allocations per record pair", suiteTestName(tc.version, tc.suite), allocs)
		}
	}
}

// An idle session holds no buffer, and a half record a small one.
func TestIdleSessionHoldsNoBuffer(t *testing.T) {
	s := newScripted(t, LayerSoftware, v13, gcm)
	l := s.conn.layer.(*softLayer)
	held := func() int {
		if l.rx.buf == nil {
			return 0
		}
		return len(l.rx.buf.b)
	}
	idle := func() {
		_ = s.conn.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		if _, err := s.conn.Read(make([]byte, 100)); !isTimeout(err) {
			t.Fatal(err)
		}
	}
	idle()
	if held() != 0 {
		t.Errorf("idle: %d bytes", held())
	}
	rec := s.seal(typeData, pattern(maxPlaintext))
	s.sendRaw(rec[:100])
	idle()
	if held() != smallBuf {
		t.Errorf("with 100 bytes of a record: %d bytes", held())
	}
	s.sendRaw(rec[100:10000])
	idle()
	if held() != midBuf {
		t.Errorf("with 10000 bytes of a record: %d bytes", held())
	}
	s.sendRaw(rec[10000:])
	_ = s.conn.SetReadDeadline(time.Now().Add(testWait))
	s.wantRead(string(pattern(maxPlaintext)))
	idle()
	if held() != 0 || l.tx.buf != nil {
		t.Errorf("idle again: %d bytes", held())
	}
}

// One goroutine reads, one writes, both at full speed.
func TestBothWaysAtOnce(t *testing.T) {
	eachSuite(t, func(t *testing.T, layer Layer, version, suite uint16) {
		s := newScripted(t, layer, version, suite)
		total := 1 << 20
		if guest.InGuest() {
			total = 100 << 10 // emulated crypto is slow
		}
		want := pattern(total)
		var wg sync.WaitGroup
		wg.Go(func() {
			for off := 0; off < total; off += 10000 {
				s.send(typeData, want[off:min(total, off+10000)])
			}
		})
		wg.Go(func() {
			if n, err := s.conn.Write(want); n != total || err != nil {
				t.Errorf("Write: %d, %v", n, err)
			}
		})
		wg.Go(func() {
			got := make([]byte, total)
			if _, err := io.ReadFull(s.conn, got); err != nil || !bytes.Equal(got, want) {
				t.Errorf("Read: %v, equal: %v", err, bytes.Equal(got, want))
			}
		})
		if got := s.wantData(total); !bytes.Equal(got, want) {
			t.Error("the peer got other bytes")
		}
		wg.Wait()
	})
}

func TestModeText(t *testing.T) {
	for _, m := range []Mode{ModeAuto, ModeKernel, ModeSoftware, ModeOff} {
		b, err := m.MarshalText()
		if err != nil {
			t.Fatal(err)
		}
		var back Mode
		if err := back.UnmarshalText(b); err != nil || back != m || m.String() != string(b) {
			t.Errorf("%v: %q, %v, %v", m, b, back, err)
		}
	}
	var m Mode
	if err := m.UnmarshalText([]byte("hardware")); err == nil {
		t.Error("an unknown mode was accepted")
	}
	if _, err := Mode(9).MarshalText(); err == nil {
		t.Error("an unknown mode was written")
	}
	if _, err := Server(context.Background(), func() *net.TCPConn { _, s := tcpPair(t); return s }(), &Config{TLS: testServerTLS(t), Mode: ModeOff}); !errors.Is(err, ErrModeOff) {
		t.Errorf("Server in mode off: %v", err)
	}
}
