package bench

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// handshake compares the CPU time of a full handshake in a server that is a process of
// its own: everything counts that the server causes there, collecting its garbage
// included, and nothing of the client, which is crypto/tls for both. Closing is no part
// of it: ktls has a shutdown there, since other processes may hold the socket. The rates
// are of both ends together.
func handshake(proto protocol, n, turns int) (Comparison, error) {
	work := map[library]func() (turn, error){}
	for _, lib := range libraries {
		server, err := startRole("handshakes", string(lib), strconv.Itoa(int(proto.version)))
		if err != nil {
			return Comparison{}, err
		}
		defer func() { _ = server.stop() }()
		line, err := server.answer()
		if err != nil {
			return Comparison{}, err
		}
		addr, conf, err := dialConfig(line, proto)
		if err != nil {
			return Comparison{}, err
		}
		work[lib] = func() (turn, error) {
			begin := time.Now()
			dialed := make(chan error, 1)
			go func() { dialed <- dial(addr, conf, n) }()
			line, err := server.order("%d", n)
			if err != nil {
				_ = server.stop() // the client may wait for a handshake that nobody makes
			}
			if err := errors.Join(err, <-dialed); err != nil {
				return turn{}, err
			}
			cpu, err := strconv.ParseInt(line, 10, 64)
			return turn{wall: time.Since(begin), cpu: time.Duration(cpu)}, err
		}
	}
	c, err := compare(turns, effort{rate: float64(n), cpu: float64(n)}, work)
	c.Name = fmt.Sprintf("handshake, %s, server", tls.VersionName(proto.version))
	c.Unit, c.CPUFor, c.CPUOf = "handshakes/s", "handshake", "the server's process"
	return c, err
}

// dialConfig reads what a server's first line says: its address and its certificate.
func dialConfig(line string, proto protocol) (addr string, conf *tls.Config, err error) {
	addr, cert, _ := strings.Cut(line, " ")
	der, err := base64.StdEncoding.DecodeString(cert)
	if err != nil {
		return "", nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return "", nil, err
	}
	creds := &credentials{roots: x509.NewCertPool()}
	creds.roots.AddCert(leaf)
	return addr, creds.client(proto), nil
}

func dial(addr string, conf *tls.Config, n int) error {
	conns := make([]*tls.Conn, 0, n)
	defer func() {
		for _, c := range conns {
			// A reset leaves no port in TIME_WAIT. It waits for the server to be done.
			_, _ = c.Read(make([]byte, 1))
			_ = c.NetConn().(*net.TCPConn).SetLinger(0)
			_ = c.NetConn().Close()
		}
	}()
	for range n {
		c, err := tls.Dial("tcp4", addr, conf)
		if err != nil {
			return err
		}
		conns = append(conns, c)
	}
	return nil
}

// serveHandshakes is the server: args are library and version. The order is how many
// handshakes to make, the answer their CPU time in nanoseconds.
func serveHandshakes(args []string, in *bufio.Scanner, out io.Writer) error {
	if len(args) != 2 {
		return errors.New("library and version are missing")
	}
	proto := aes128TLS13
	if args[1] == strconv.Itoa(tls.VersionTLS12) {
		proto = aes128TLS12
	}
	creds, err := newCredentials()
	if err != nil {
		return err
	}
	ln, err := listen()
	if err != nil {
		return err
	}
	defer func() { _ = ln.Close() }()
	s := newServer(library(args[0]), ktls.ModeSoftware, creds.server(proto))
	fmt.Fprintln(out, ln.Addr(), base64.StdEncoding.EncodeToString(creds.cert.Certificate[0]))
	for in.Scan() {
		n, err := strconv.Atoi(in.Text())
		if err != nil {
			return err
		}
		var conns []net.Conn
		t, err := timed(func() error {
			conns, err = s.serve(ln, n)
			return err
		})
		for _, c := range conns {
			_ = c.Close()
		}
		if err != nil {
			fmt.Fprintln(out, "error", err)
			continue
		}
		fmt.Fprintln(out, t.cpu.Nanoseconds())
	}
	return in.Err()
}

// serve makes n handshakes.
func (s *server) serve(ln *net.TCPListener, n int) (conns []net.Conn, err error) {
	for range n {
		c, err := ln.AcceptTCP()
		if err != nil {
			return conns, err
		}
		conn, err := s.handshake(c)
		if err != nil {
			_ = c.Close()
			return conns, err
		}
		conns = append(conns, conn)
	}
	return conns, nil
}
