package ktls

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

const (
	v13 = tls.VersionTLS13
	gcm = tls.TLS_AES_128_GCM_SHA256
)

// pattern is n bytes none of which can be mistaken for its neighbours.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	return b
}

// readAll reads n bytes of data with a buffer of the given size.
func readAll(t *testing.T, l recordLayer, n, size int) []byte {
	t.Helper()
	var all []byte
	buf := make([]byte, size)
	for len(all) < n {
		k, ctl, err := l.read(buf)
		if err != nil || ctl.typ != 0 {
			t.Fatalf("after %d of %d bytes: control record of type %d, error %v", len(all), n, ctl.typ, err)
		}
		all = append(all, buf[:k]...)
	}
	return all
}

func wantControl(t *testing.T, l recordLayer, size int, typ recordType, data string) {
	t.Helper()
	n, ctl, err := l.read(make([]byte, size))
	if err != nil || n != 0 || ctl.typ != typ || string(ctl.data) != data {
		t.Fatalf("read gave %d bytes, control record of type %d, %d bytes %.20q, error %v; expected type %d, %d bytes %.20q",
			n, ctl.typ, len(ctl.data), ctl.data, err, typ, len(data), data)
	}
}

func wantRecordError(t *testing.T, err error, alert Alert) {
	t.Helper()
	var rec *recordError
	if !errors.As(err, &rec) {
		t.Fatalf("error %v, expected a record error with alert %s", err, alert)
	}
	if rec.alert != alert {
		t.Fatalf("alert %s (%s), expected %s", rec.alert, rec.what, alert)
	}
}

// The kernel must open what was sealed by the RFCs, and seal what opens by them,
// from any sequence number on. Changing one byte of a key layout in cryptoinfo.go
// turns this red.
func TestKernelOpensWhatGoSealed(t *testing.T) {
	guest.NeedKernelTLS(t)
	for _, tc := range testSuites {
		t.Run(suiteTestName(tc.version, tc.suite), func(t *testing.T) {
			for _, seq := range []struct{ send, receive uint64 }{{0, 0}, {1, 1}, {2, 0}, {255, 65536}, {1<<32 - 1, 1 << 40}} {
				peer, l, _ := rawSession(t, tc.version, tc.suite, seq.send, seq.receive)
				for _, size := range []int{1, 100, maxPlaintext} {
					want := pattern(size)
					peer.send(typeData, want)
					if got := readAll(t, l, size, maxPlaintext); !bytes.Equal(got, want) {
						t.Fatalf("sequence %d: %d bytes arrived changed", seq.receive, size)
					}
				}
				for _, size := range []int{1, 100, maxPlaintext, 3*maxPlaintext + 5} {
					want := pattern(size)
					if n, err := l.write(want); n != size || err != nil {
						t.Fatalf("sequence %d: write took %d of %d: %v", seq.send, n, size, err)
					}
					if got := peer.wantData(size); !bytes.Equal(got, want) {
						t.Fatalf("sequence %d: %d bytes left changed", seq.send, size)
					}
				}
				if taken, err := l.writeControl(typeAlert, []byte{1, 0}, true); !taken || err != nil {
					t.Fatalf("close_notify: taken %v, %v", taken, err)
				}
				peer.want(typeAlert, "\x01\x00")
			}
		})
	}
}

// Control records come one by one, with their type, wherever they are between
// data, whatever the size of the reader's buffer.
func TestKernelControlRecords(t *testing.T) {
	guest.NeedKernelTLS(t)
	big := string(pattern(maxPlaintext))
	for _, tc := range testSuites {
		t.Run(suiteTestName(tc.version, tc.suite), func(t *testing.T) {
			for _, size := range []int{1, 3, 100, 2 * maxPlaintext} {
				peer, l, _ := rawSession(t, tc.version, tc.suite, 1, 1)
				peer.send(typeData, []byte("before"))
				peer.send(typeHandshake, []byte{0, 0, 0, 0})
				peer.send(typeHandshake, []byte{4, 0, 0, 0})
				peer.send(typeData, []byte("between"))
				peer.send(typeAlert, []byte{1, 90})
				if size != 1 { // byte by byte is slow under emulation and shows nothing more
					peer.send(typeHandshake, []byte(big))
				}
				peer.send(typeData, []byte("after"))
				peer.send(typeAlert, []byte{1, 0})
				_ = peer.c.CloseWrite()

				if got := string(readAll(t, l, 6, size)); got != "before" {
					t.Errorf("got %q", got)
				}
				wantControl(t, l, size, typeHandshake, "\x00\x00\x00\x00")
				wantControl(t, l, size, typeHandshake, "\x04\x00\x00\x00")
				if got := string(readAll(t, l, 7, size)); got != "between" {
					t.Errorf("got %q", got)
				}
				wantControl(t, l, size, typeAlert, "\x01\x5a")
				if size != 1 {
					wantControl(t, l, size, typeHandshake, big)
				}
				if got := string(readAll(t, l, 5, size)); got != "after" {
					t.Errorf("got %q", got)
				}
				wantControl(t, l, size, typeAlert, "\x01\x00")
				if _, _, err := l.read(make([]byte, size)); !errors.Is(err, io.EOF) {
					t.Errorf("after FIN: %v", err)
				}
			}
		})
	}
}

// An empty control record gives 0 bytes and a type, which must not be taken for
// FIN; an empty data record is nothing at all.
func TestKernelEmptyRecords(t *testing.T) {
	guest.NeedKernelTLS(t)
	for _, tc := range testSuites {
		t.Run(suiteTestName(tc.version, tc.suite), func(t *testing.T) {
			peer, l, _ := rawSession(t, tc.version, tc.suite, 1, 1)
			peer.send(typeAlert, nil)
			wantControl(t, l, 10, typeAlert, "")
			peer.send(typeData, []byte("x"))
			peer.send(typeHandshake, nil)
			peer.send(typeData, nil)
			peer.send(typeData, []byte("y"))
			if got := string(readAll(t, l, 1, 10)); got != "x" {
				t.Errorf("got %q", got)
			}
			wantControl(t, l, 10, typeHandshake, "")
			if got := string(readAll(t, l, 1, 10)); got != "y" {
				t.Errorf("got %q", got)
			}
		})
	}
}

// Why this layer never calls read(2): it gives EIO at a control record, consumes
// nothing, and so the record is still there for recvmsg.
func TestKernelPlainReadTrap(t *testing.T) {
	guest.NeedKernelTLS(t)
	peer, l, sock := rawSession(t, v13, gcm, 0, 0)
	peer.send(typeHandshake, []byte{4, 0, 0, 0})
	peer.send(typeData, []byte("after"))
	buf := make([]byte, 100)
	for range 3 {
		if n, err := sock.Read(buf); n != 0 || !errors.Is(err, sys.EIO) {
			t.Fatalf("plain read of a control record gave %d, %v; this layer exists because it gives EIO", n, err)
		}
	}
	wantControl(t, l, 100, typeHandshake, "\x04\x00\x00\x00")
	if got := string(readAll(t, l, 5, 100)); got != "after" {
		t.Errorf("got %q", got)
	}
}

// A KeyUpdate comes whole, also byte by byte, and then nothing more: the records
// behind it are under a key the kernel does not have.
func TestKernelKeyUpdateRecord(t *testing.T) {
	guest.NeedKernelTLS(t)
	for _, size := range []int{1, 3, 100} {
		peer, l, _ := rawSession(t, v13, gcm, 0, 0)
		peer.send(typeData, []byte("before"))
		peer.send(typeHandshake, []byte{24, 0, 0, 1, 1})
		if got := string(readAll(t, l, 6, size)); got != "before" {
			t.Errorf("got %q", got)
		}
		wantControl(t, l, size, typeHandshake, "\x18\x00\x00\x01\x01")
		peer.out = newRawHalf(t, v13, gcm, 0)
		peer.send(typeData, []byte("after"))
		if n, _, err := l.read(make([]byte, size)); err == nil {
			t.Errorf("%d bytes came from under a key the kernel cannot have", n)
		}
		// The other direction is not touched.
		if _, err := l.write([]byte("bye")); err != nil {
			t.Error(err)
		}
		if taken, err := l.writeControl(typeAlert, []byte{1, 0}, true); !taken || err != nil {
			t.Errorf("close_notify: %v, %v", taken, err)
		}
		peer.want(typeData, "bye")
		peer.want(typeAlert, "\x01\x00")
	}
}

// FIN without close_notify is told from everything else, also in the middle of a
// record; whether it is an attack is for Conn to say.
func TestKernelTruncation(t *testing.T) {
	guest.NeedKernelTLS(t)
	for _, cut := range []int{0, 3, 5, 12} {
		peer, l, _ := rawSession(t, v13, gcm, 0, 0)
		peer.send(typeData, []byte("whole"))
		rec := peer.seal(typeData, []byte("cut"))
		peer.sendRaw(rec[:cut])
		_ = peer.c.CloseWrite()
		if got := string(readAll(t, l, 5, 100)); got != "whole" {
			t.Errorf("got %q", got)
		}
		if n, ctl, err := l.read(make([]byte, 100)); n != 0 || ctl.typ != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("cut after %d bytes: %d bytes, control %d, %v; expected EOF", cut, n, ctl.typ, err)
		}
	}
}

// Each bad record is final, names its alert, and that alert can still be sent,
// whichever direction hears of it first.
func TestKernelBadRecords(t *testing.T) {
	guest.NeedKernelTLS(t)
	flip := func(i int) func([]byte) []byte {
		return func(rec []byte) []byte {
			if i < 0 {
				i += len(rec)
			}
			rec[i] ^= 1
			return rec
		}
	}
	for _, tc := range []struct {
		name   string
		break_ func([]byte) []byte
		alert  Alert
	}{
		{"tag", flip(-1), alertBadRecordMAC},
		{"content", flip(20), alertBadRecordMAC},
		{"version", flip(2), alertProtocolVersion},
		{"too long", func(rec []byte) []byte { rec[3], rec[4] = 0xff, 0xff; return rec }, alertRecordOverflow},
		{"shorter than a tag", func([]byte) []byte { return []byte{23, 3, 3, 0, 5, 1, 2, 3, 4, 5} }, alertBadRecordMAC},
		{"plain text", func([]byte) []byte { return []byte("GET / HTTP/1.1\r\nHost: example.com\r\n\r\n") }, alertProtocolVersion},
	} {
		for _, writerFirst := range []bool{false, true} {
			name := tc.name
			if writerFirst {
				name += ", a write is first"
			}
			t.Run(name, func(t *testing.T) {
				peer, l, sock := rawSession(t, v13, gcm, 0, 0)
				peer.send(typeData, []byte("good"))
				if got := string(readAll(t, l, 4, 100)); got != "good" {
					t.Fatalf("got %q", got)
				}
				peer.sendRaw(tc.break_(peer.seal(typeData, pattern(50))))
				reply := ""
				if writerFirst {
					// The kernel may or may not have looked at the record yet: no write may
					// fail because of it, and none may hide it from the reader.
					waitReadable(t, sock)
					for range 3 {
						if _, err := l.write([]byte("reply")); err != nil {
							t.Fatalf("write: %v", err)
						}
						reply += "reply"
					}
				}
				_, _, err := l.read(make([]byte, 100))
				wantRecordError(t, err, tc.alert)
				if taken, err := l.writeControl(typeAlert, []byte{2, byte(tc.alert)}, false); !taken || err != nil {
					t.Errorf("alert: taken %v, %v", taken, err)
				}
				if got := string(peer.wantData(len(reply))); got != reply {
					t.Errorf("peer got %q", got)
				}
				peer.want(typeAlert, string([]byte{2, byte(tc.alert)}))
			})
		}
	}
}

// waitReadable waits until the poller reports the socket as readable or failed.
func waitReadable(t *testing.T, sock *net.TCPConn) {
	t.Helper()
	rc, err := sock.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	first := true
	_ = sock.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	_ = rc.Read(func(uintptr) bool {
		defer func() { first = false }()
		return !first
	})
	_ = sock.SetReadDeadline(time.Now().Add(testWait))
}

// A deadline loses nothing: neither a record of which half has arrived, nor output
// of which the socket took a part.
func TestKernelDeadlines(t *testing.T) {
	guest.NeedKernelTLS(t)
	for _, tc := range testSuites {
		t.Run(suiteTestName(tc.version, tc.suite), func(t *testing.T) {
			peer, l, sock := rawSession(t, tc.version, tc.suite, 1, 1)
			rec := peer.seal(typeData, []byte("in two halves"))
			peer.sendRaw(rec[:10])
			_ = sock.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
			if _, _, err := l.read(make([]byte, 100)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatalf("read of half a record: %v", err)
			}
			_ = sock.SetReadDeadline(time.Now().Add(testWait))
			peer.sendRaw(rec[10:])
			if got := string(readAll(t, l, 13, 100)); got != "in two halves" {
				t.Errorf("got %q", got)
			}

			out := pattern(4 << 20) // more than both socket buffers hold
			_ = sock.SetWriteBuffer(64 << 10)
			_ = sock.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
			n, err := l.write(out)
			if !errors.Is(err, os.ErrDeadlineExceeded) || n == 0 || n == len(out) {
				t.Fatalf("write into a full socket took %d of %d: %v", n, len(out), err)
			}
			_ = sock.SetWriteDeadline(time.Now().Add(testWait))
			got := make(chan []byte)
			go func() { got <- peer.wantData(n + 4) }()
			if k, err := l.write([]byte("more")); k != 4 || err != nil {
				t.Errorf("write after the deadline: %d, %v", k, err)
			}
			want := append(out[:n:n], "more"...)
			if !bytes.Equal(<-got, want) {
				t.Error("the peer did not get exactly what write said it took")
			}
		})
	}
}

// A server's socket whose peer has already finished sending takes keys when the
// protocol was attached before, and says what is wrong when it was not.
func TestKernelCloseWait(t *testing.T) {
	guest.NeedKernelTLS(t)
	peer, sock := unkeyedSession(t, v13, gcm, 1, 0)
	tx, rx := peer.in.direction(), peer.out.direction()
	peer.send(typeData, []byte("question"))
	peer.send(typeAlert, []byte{1, 0})
	_ = peer.c.CloseWrite()
	awaitCloseWait(t, sock)
	l, err := newKernelLayer(sock, params{version: v13, suite: gcm}, tx, rx)
	if err != nil {
		t.Fatal(err)
	}
	if got := string(readAll(t, l, 8, 100)); got != "question" {
		t.Errorf("got %q", got)
	}
	wantControl(t, l, 100, typeAlert, "\x01\x00")
	if _, err := l.write([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	peer.want(typeData, "answer")

	c, s := tcpPair(t)
	_ = c.CloseWrite()
	awaitCloseWait(t, s)
	if err := attachKernel(s); !errors.Is(err, ErrNoKernelTLS) || !strings.Contains(err.Error(), "finished already") {
		t.Errorf("attach after the peer's FIN: %v", err)
	}
}

// awaitCloseWait waits until the peer's FIN has arrived: the stream's end is then
// readable, behind whatever is in front of it.
func awaitCloseWait(t *testing.T, sock *net.TCPConn) {
	t.Helper()
	for end := time.Now().Add(testWait); time.Now().Before(end); time.Sleep(time.Millisecond) {
		done := false
		if err := onFD(sock, func(fd int) (err error) { done, err = sys.PeerFinished(fd); return err }); err != nil {
			t.Fatal(err)
		}
		if done {
			return
		}
	}
	t.Fatal("the peer's FIN did not arrive")
}

// Half and whole records that arrived before the keys were set are not lost.
func TestKernelRecordsBeforeKeys(t *testing.T) {
	guest.NeedKernelTLS(t)
	for _, tc := range testSuites {
		peer, sock := unkeyedSession(t, tc.version, tc.suite, 1, 1)
		tx, rx := peer.in.direction(), peer.out.direction()
		peer.send(typeData, []byte("whole "))
		rec := peer.seal(typeData, []byte("half"))
		peer.sendRaw(rec[:7])
		waitReadable(t, sock)
		l, err := newKernelLayer(sock, params{version: tc.version, suite: tc.suite}, tx, rx)
		if err != nil {
			t.Fatal(err)
		}
		if got := string(readAll(t, l, 6, 100)); got != "whole " {
			t.Errorf("got %q", got)
		}
		peer.sendRaw(rec[7:])
		if got := string(readAll(t, l, 4, 100)); got != "half" {
			t.Errorf("got %q", got)
		}
	}
}

func TestKernelDoesNotAllocate(t *testing.T) {
	guest.NeedKernelTLS(t)
	peer, l, _ := rawSession(t, v13, gcm, 0, 0)
	const records = 50
	buf := make([]byte, 100)
	for range records + 1 {
		peer.send(typeData, pattern(len(buf)))
	}
	allocs := testing.AllocsPerRun(records, func() {
		if n, _, err := l.read(buf); n != len(buf) || err != nil {
			t.Fatalf("read: %d, %v", n, err)
		}
		if n, err := l.write(buf); n != len(buf) || err != nil {
			t.Fatalf("write: %d, %v", n, err)
		}
	})
	if allocs != 0 {
		t.Errorf("%v allocations per record each way, expected none", allocs)
	}
}

func TestAttachWithoutKernelTLSIsExplained(t *testing.T) {
	_, s := tcpPair(t)
	err := attachKernel(s)
	if err != nil && (!errors.Is(err, ErrNoKernelTLS) || !strings.Contains(err.Error(), "modprobe tls")) {
		t.Errorf("%v: expected ErrNoKernelTLS and what to do", err)
	}
	if err == nil {
		if err := attachKernel(s); err != nil {
			t.Errorf("attached a second time: %v", err)
		}
	}
}
