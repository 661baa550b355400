package bench

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"runtime"
	"syscall"
	"time"
)

// Handshake compares the CPU time that a full handshake costs the server: that of
// its thread alone, so that the client, which is crypto/tls in both cases, does not
// count. The rates are of both ends together.
func Handshake(version uint16, n, turns int) (Comparison, error) {
	creds, err := newCredentials()
	if err != nil {
		return Comparison{}, err
	}
	ln, err := listen()
	if err != nil {
		return Comparison{}, err
	}
	defer func() { _ = ln.Close() }()
	client := creds.client(version)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	work := map[library]func() error{}
	for _, lib := range libraries {
		s := newServer(lib, creds.server(version))
		work[lib] = func() error {
			dialed := make(chan error, 1)
			go func() { dialed <- dial(ln.Addr().String(), client, n) }()
			for range n {
				if err := s.serve(ln); err != nil {
					return errors.Join(err, ln.Close(), <-dialed)
				}
			}
			s.closing.Wait()
			return <-dialed
		}
	}
	name := fmt.Sprintf("handshake, %s, server", tls.VersionName(version))
	c, err := compareBy(threadTime, name, turns, float64(n), float64(n), work)
	c.Unit, c.CPUFor = "handshakes/s", "handshake of the server"
	return c, err
}

func dial(addr string, conf *tls.Config, n int) error {
	for range n {
		c, err := tls.Dial("tcp4", addr, conf)
		if err != nil {
			return err
		}
		// A reset leaves no port in TIME_WAIT. It waits for the server to be done.
		_, _ = c.Read(make([]byte, 1))
		_ = c.NetConn().(*net.TCPConn).SetLinger(0)
		_ = c.NetConn().Close()
	}
	return nil
}

// serve makes one handshake and has the connection closed.
func (s *server) serve(ln *net.TCPListener) error {
	c, err := ln.AcceptTCP()
	if err != nil {
		return err
	}
	conn, err := s.handshake(c)
	if err != nil {
		_ = c.Close()
		return err
	}
	s.closing.Go(func() { _ = conn.Close() }) // on another thread, so it does not count
	return nil
}

// threadTime is what the calling thread has used so far.
func threadTime() (time.Duration, error) { return usedBy(syscall.RUSAGE_THREAD) }
