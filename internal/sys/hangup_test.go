package sys

import (
	"net"
	"testing"
	"time"
)

func TestWaitHangup(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	f, err := s.(*net.TCPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	rc, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	wait := func(limit time.Duration) (gone bool) {
		t.Helper()
		if cerr := rc.Control(func(fd uintptr) { gone, err = WaitHangup(int(fd), limit) }); cerr != nil || err != nil {
			t.Fatal(cerr, err)
		}
		return gone
	}
	if _, err := c.Write([]byte("unread")); err != nil {
		t.Fatal(err)
	}
	if wait(10 * time.Millisecond) {
		t.Error("data was taken for the end")
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if !wait(10 * time.Second) {
		t.Error("FIN was not noticed")
	}
	if n, err := s.Read(make([]byte, 10)); n != 6 || err != nil {
		t.Errorf("what was unread is gone: %d, %v", n, err)
	}
}
