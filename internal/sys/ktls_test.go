package sys

import (
	"errors"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A receive and a send are in every session's data path, so neither may allocate.
func TestTLSCallsDoNotAllocate(t *testing.T) {
	a, b := streamPair(t)
	buf := make([]byte, 64)
	payload := []byte("sixteen bytes...")
	allocs := testing.AllocsPerRun(100, func() {
		if n, err := TLSSendData(a, payload); n != len(payload) || err != nil {
			t.Fatalf("send: %d, %v", n, err)
		}
		n, typ, _, err := TLSRecv(b, buf)
		if n != len(payload) || typ != NoRecordType || err != nil {
			t.Fatalf("receive: %d bytes, type %d, %v", n, typ, err)
		}
	})
	if allocs != 0 {
		t.Errorf("%v allocations per send and receive, expected none", allocs)
	}
}

func TestTLSCallsRefuseEmptyBuffers(t *testing.T) {
	a, _ := streamPair(t)
	if _, _, _, err := TLSRecv(a, nil); !errors.Is(err, unix.EINVAL) {
		t.Errorf("receive into nothing would look like the end of the stream: %v", err)
	}
	if _, err := TLSSendRecord(a, 21, nil); !errors.Is(err, unix.EINVAL) {
		t.Errorf("an empty record would not be sent: %v", err)
	}
	if err := SetTLSKeys(a, TLSSend, nil); !errors.Is(err, unix.EINVAL) {
		t.Errorf("empty crypto_info: %v", err)
	}
}

// TCPWritten must count exactly what was written, whatever the peer has read, and
// not count the FIN.
func TestTCPWritten(t *testing.T) {
	c, s := tcpPair(t)
	fd := rawFD(t, c)
	base, err := TCPWritten(fd)
	if err != nil {
		t.Fatal(err)
	}
	total := uint64(0)
	for i := 1; i <= 20; i++ {
		n, err := c.Write(make([]byte, i*997))
		if err != nil {
			t.Fatal(err)
		}
		total += uint64(n)
		if i%3 == 0 {
			if _, err := s.Read(make([]byte, 4096)); err != nil {
				t.Fatal(err)
			}
		}
		now, err := TCPWritten(fd)
		if err != nil {
			t.Fatal(err)
		}
		if now-base != total {
			t.Fatalf("after %d writes: counted %d, wrote %d", i, now-base, total)
		}
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	now, err := TCPWritten(fd)
	if err != nil {
		t.Fatal(err)
	}
	if now-base != total {
		t.Errorf("after the FIN: counted %d, wrote %d", now-base, total)
	}
}

func TestIsMPTCP(t *testing.T) {
	c, _ := tcpPair(t)
	if IsMPTCP(rawFD(t, c)) {
		t.Error("a plain TCP socket is taken for MPTCP")
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_MPTCP)
	if err != nil {
		t.Logf("this kernel makes no MPTCP socket: %v", err)
		return
	}
	defer func() { _ = unix.Close(fd) }()
	if !IsMPTCP(fd) {
		t.Error("an MPTCP socket is not recognised")
	}
	if HasTLS(fd) {
		t.Error("an MPTCP socket is said to have kernel TLS")
	}
}

func streamPair(t *testing.T) (a, b int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { CloseAll(fds[:]) })
	return fds[0], fds[1]
}

func tcpPair(t *testing.T) (client, server *net.TCPConn) {
	t.Helper()
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	client, err = net.DialTCP("tcp4", nil, l.Addr().(*net.TCPAddr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	_ = l.SetDeadline(time.Now().Add(5 * time.Second))
	server, err = l.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Close() })
	return client, server
}

// rawFD returns the connection's descriptor, good until the test ends because the
// connection is closed by a cleanup.
func rawFD(t *testing.T, c *net.TCPConn) (fd int) {
	t.Helper()
	rc, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := rc.Control(func(f uintptr) { fd = int(f) }); err != nil {
		t.Fatal(err)
	}
	return fd
}
