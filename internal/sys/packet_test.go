package sys

import (
	"errors"
	"io"
	"os"
	"testing"
	"time"
)

// packetConns returns both ends, which are closed with the test.
func packetConns(t *testing.T) (a, b *PacketConn) {
	t.Helper()
	x, y, err := PacketPair()
	if err != nil {
		t.Fatal(err)
	}
	if a, err = NewPacketConn(x); err != nil {
		CloseAll([]int{y})
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Close() })
	if b, err = NewPacketConn(y); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	if err := a.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return a, b
}

// A peer's last words count, whether or not it read ours.
func TestRecvAfterThePeerClosed(t *testing.T) {
	for _, unread := range []int{0, 1, 3} {
		a, b := packetConns(t)
		for range unread {
			if err := a.Send([]byte("unread"), nil); err != nil {
				t.Fatal(err)
			}
		}
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Send([]byte("CLOSED"), []int{int(r.Fd())}); err != nil {
			t.Fatal(err)
		}
		if err := b.Send([]byte("BYE"), nil); err != nil {
			t.Fatal(err)
		}
		_, _ = r.Close(), w.Close()
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 64)
		n, fds, err := a.Recv(buf)
		if err != nil || string(buf[:n]) != "CLOSED" || len(fds) != 1 {
			t.Errorf("%d unread: received %q, %d descriptors, %v; want CLOSED and 1", unread, buf[:n], len(fds), err)
		}
		CloseAll(fds)
		if n, _, err := a.Recv(buf); err != nil || string(buf[:n]) != "BYE" {
			t.Errorf("%d unread: received %q, %v; want BYE", unread, buf[:n], err)
		}
		for range 2 {
			if n, _, err := a.Recv(buf); !errors.Is(err, io.EOF) {
				t.Errorf("%d unread: after the last message: %q, %v; want EOF", unread, buf[:n], err)
			}
		}
	}
}
