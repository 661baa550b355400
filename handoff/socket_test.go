package handoff

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// socketPair is a socket as a worker gets it, and its peer.
func socketPair(t *testing.T) (*socket, *net.TCPConn) {
	t.Helper()
	ln, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	peer, err := net.DialTCP("tcp4", nil, ln.Addr().(*net.TCPAddr))
	if err != nil {
		t.Fatal(err)
	}
	c, err := ln.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	rc, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	fd := -1
	if cerr := rc.Control(func(p uintptr) { fd, err = sys.Dup(int(p)) }); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	_ = c.Close()
	s := newSocket(fd)
	t.Cleanup(func() { _ = s.Close(); _ = peer.Close() })
	return s, peer
}

func (s *socket) recv(p []byte) (n int, err error) {
	rerr := s.Read(func(fd uintptr) bool {
		n, _, _, err = sys.TLSRecv(int(fd), p) // a plain recvmsg on a plain socket
		return !errors.Is(err, sys.EAGAIN)
	})
	return n, errors.Join(rerr, err)
}

func (s *socket) isRegistered() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.file != nil
}

// The poller is asked for only when something has to be waited for, and then waiting
// works.
func TestSocketRegistersLate(t *testing.T) {
	s, peer := socketPair(t)
	b := make([]byte, 16)
	if err := s.SetReadDeadline(past); err != nil {
		t.Fatal(err)
	}
	if _, err := s.recv(b); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read with a deadline in the past: %v", err)
	}
	if err := s.SetDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if _, err := peer.Write([]byte("one")); err != nil {
		t.Fatal(err)
	}
	if err := s.Control(func(fd uintptr) {
		for !sys.HasInput(fd) { // it is on the loopback already, or about to be
		}
	}); err != nil {
		t.Fatal(err)
	}
	if n, err := s.recv(b); err != nil || string(b[:n]) != "one" {
		t.Fatalf("%q, %v", b[:n], err)
	}
	if s.isRegistered() {
		t.Error("registered although nothing had to be waited for")
	}
	got := make(chan string)
	go func() {
		n, err := s.recv(b)
		if err != nil {
			t.Error(err)
		}
		got <- string(b[:n])
	}()
	for !s.isRegistered() {
		time.Sleep(time.Millisecond)
	}
	if _, err := peer.Write([]byte("two")); err != nil {
		t.Fatal(err)
	}
	if v := <-got; v != "two" {
		t.Errorf("waited and got %q", v)
	}
	if err := s.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.recv(b); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a deadline after registration: %v", err)
	}
}

// A deadline that was set before the wait began ends it.
func TestSocketDeadlineBeforeWait(t *testing.T) {
	s, _ := socketPair(t)
	if err := s.SetReadDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.recv(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) || !s.isRegistered() {
		t.Errorf("%v, registered %v", err, s.isRegistered())
	}
}

// Close ends a wait, is final, and never lets a call use a number that may be another
// descriptor's by then.
func TestSocketClose(t *testing.T) {
	s, peer := socketPair(t)
	ended := make(chan error)
	go func() {
		_, err := s.recv(make([]byte, 1))
		ended <- err
	}()
	for !s.isRegistered() {
		time.Sleep(time.Millisecond)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, os.ErrClosed) && !errors.Is(err, net.ErrClosed) {
		t.Errorf("the wait ended with %v", err)
	}
	for what, err := range map[string]error{"Control": s.Control(func(uintptr) {}), "SetDeadline": s.SetDeadline(past), "Close": s.Close(),
		"Read": s.Read(func(uintptr) bool { return true })} {
		if !errors.Is(err, net.ErrClosed) && !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s after Close: %v", what, err)
		}
	}
	if n, err := peer.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("the peer reads %d, %v", n, err)
	}

	s, peer = socketPair(t)
	in, out := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Control(func(fd uintptr) {
			close(in)
			<-out
			if err := sys.SetNonblock(int(fd)); err != nil {
				t.Errorf("the descriptor was closed under a call: %v", err)
			}
		}); err != nil {
			t.Error(err)
		}
	})
	<-in
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	close(out)
	wg.Wait()
	if n, err := peer.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("closed by the last call: the peer reads %d, %v", n, err)
	}
}
