package ktls

import (
	"crypto/tls"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// Everything that was taken reaches a slow peer although the socket is shut down
// at once after close_notify: the kernel itself would drop a sealed record that TCP
// had no room for. Also when the writer took the session over with such a record
// in it, and when nobody knows what came before.
func TestKernelDrainsBeforeShutdown(t *testing.T) {
	guest.NeedKernelTLS(t)
	for _, how := range []string{"same owner", "moved", "moved after close_notify", "crashed"} {
		for _, i := range []int{0, 3, 5} { // the three lengths of a record
			tc := testSuites[i]
			t.Run(how+" "+suiteTestName(tc.version, tc.suite), func(t *testing.T) {
				for range 5 {
					drainOnce(t, params{version: tc.version, suite: tc.suite}, how)
				}
			})
		}
	}
}

func drainOnce(t *testing.T, p params, how string) {
	// A small window makes TCP cut records into small segments, and a small buffer
	// then has no room for all of them.
	c, sock := tcpPairWindow(t, 4<<10)
	_ = sock.SetWriteBuffer(4 << 10)
	peer := keysFor(t, c, sock, p.version, p.suite, 1, 1)
	l, err := newKernelLayer(sock, p, peer.in.direction(), peer.out.direction())
	if err != nil {
		t.Fatal(err)
	}
	total, _ := l.write([]byte("first"))
	for {
		// Until nothing more is taken, so that the last record is stuck half way.
		_ = sock.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
		n, err := l.write(pattern(50_000))
		total += n
		if errors.Is(err, os.ErrDeadlineExceeded) && n == 0 {
			break
		} else if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
	}
	_ = sock.SetWriteDeadline(time.Now().Add(testWait))
	if how == "moved after close_notify" {
		for end := time.Now().Add(testWait); ; {
			taken, err := l.writeControl(typeAlert, []byte{1, 0}, false)
			if taken {
				break
			}
			if !errors.Is(err, errWouldBlock) || time.Now().After(end) {
				t.Fatalf("close_notify: %v", err)
			}
			// Room for the alert, not for all that is in front of it.
			if typ, p, err := peer.next(); err != nil || typ != typeData {
				t.Fatalf("type %d, %v", typ, err)
			} else {
				total -= len(p)
			}
		}
	}
	if how != "same owner" {
		st := layerState{alerted: how == "moved after close_notify"}
		l.export(&st)
		if st.wire == 0 {
			t.Error("the position in the stream was not exported")
		}
		if how == "crashed" {
			st.wire, st.wireSeq = 0, 0
		}
		if l, err = importKernelLayer(sock, p, &st); err != nil {
			t.Fatal(err)
		}
	}
	received := make(chan int)
	go func() {
		n := 0
		for {
			typ, data, err := peer.next()
			if err != nil || typ != typeData {
				if typ != typeAlert || err != nil {
					t.Errorf("the stream ended with type %d, %v, without close_notify", typ, err)
				}
				received <- n
				return
			}
			n += len(data)
		}
	}()
	if how == "moved after close_notify" {
		if err := l.flush(true); err != nil {
			t.Errorf("flush: %v", err)
		}
	} else if taken, err := l.writeControl(typeAlert, []byte{1, 0}, true); !taken || err != nil {
		t.Errorf("close_notify: taken %v, %v", taken, err)
	}
	if err := onFD(sock, sys.ShutdownBoth); err != nil {
		t.Error(err)
	}
	if n := <-received; n != total {
		t.Errorf("the peer got %d of %d bytes", n, total)
	}
}

// Closing a session whose peer is gone must not wait for room that never comes.
func TestKernelDrainEndsWithTheConnection(t *testing.T) {
	guest.NeedKernelTLS(t)
	peer, l, sock := rawSession(t, v13, gcm, 0, 0)
	_ = sock.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
	_, _ = l.write(pattern(8 << 20))
	_ = sock.SetWriteDeadline(time.Time{})
	_ = peer.c.SetLinger(0)
	_ = peer.c.Close() // RST
	start := time.Now()
	for {
		if _, err := l.writeControl(typeAlert, []byte{1, 0}, true); err != nil {
			break
		}
	}
	if took := time.Since(start); took >= drainLimit {
		t.Errorf("gave up after %v", took)
	}
}

// A warning ends nothing: a flush after it does not wait for the peer to read.
func TestKernelWarningDoesNotDrain(t *testing.T) {
	guest.NeedKernelTLS(t)
	_, l, sock := rawSession(t, tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, 1, 1)
	if taken, err := l.writeControl(typeAlert, []byte{levelWarning, byte(alertNoRenegotiation)}, true); !taken || err != nil {
		t.Fatalf("no_renegotiation: taken %v, %v", taken, err)
	}
	_ = sock.SetWriteBuffer(64 << 10)
	_ = sock.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	if _, err := l.write(pattern(8 << 20)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("write into a full socket: %v", err)
	}
	_ = sock.SetWriteDeadline(time.Now().Add(testWait))
	start := time.Now()
	if err := l.flush(true); err != nil || time.Since(start) > drainLimit/2 {
		t.Errorf("flush: %v after %v", err, time.Since(start))
	}
}
