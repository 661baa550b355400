package bench

import (
	"bufio"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// download compares the sending of a file: io.Copy to the session, which is sendfile
// in the kernel layer. The client is a process of its own, and crypto/tls for both, so
// that CPU time is the server's alone.
func download(mode ktls.Mode, proto protocol, size, turns int) (Comparison, error) {
	f, err := os.CreateTemp("", "bench")
	if err != nil {
		return Comparison{}, err
	}
	defer func() { _ = f.Close() }()
	_ = os.Remove(f.Name())
	if _, err := f.Write(make([]byte, size)); err != nil {
		return Comparison{}, err
	}
	creds, err := newCredentials()
	if err != nil {
		return Comparison{}, err
	}
	ln, err := listen()
	if err != nil {
		return Comparison{}, err
	}
	defer func() { _ = ln.Close() }()
	work := map[library]func() (turn, error){}
	for _, lib := range libraries {
		client, err := startRole("fetch", ln.Addr().String(), strconv.Itoa(int(proto.version)), base64.StdEncoding.EncodeToString(creds.cert.Certificate[0]))
		if err != nil {
			return Comparison{}, err
		}
		defer func() { _ = client.stop() }()
		tcp, err := ln.AcceptTCP()
		if err != nil {
			return Comparison{}, err
		}
		conn, err := newServer(lib, mode, creds.server(proto)).handshake(tcp)
		if err != nil {
			_ = tcp.Close()
			return Comparison{}, err
		}
		defer func() { _ = conn.Close() }()
		work[lib] = func() (turn, error) { return timed(func() error { return sendFile(conn, f, size, client) }) }
	}
	c, err := compare(turns, effort{rate: float64(size) / 1e6, cpu: float64(size)}, work)
	c.Name = fmt.Sprintf("download of a file, %s", proto)
	c.Unit, c.CPUFor, c.CPUOf = "MB/s", "byte", "the server's process"
	return c, err
}

func sendFile(conn net.Conn, f *os.File, size int, client *child) error {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	got := make(chan error, 1)
	go func() {
		_, err := client.order("%d", size)
		got <- err
	}()
	n, err := io.Copy(conn, f)
	if err == nil && n != int64(size) {
		err = fmt.Errorf("%d bytes were sent, not %d", n, size)
	}
	if err != nil {
		_ = conn.Close() // lets the client go
	}
	return errors.Join(err, <-got)
}

// fetch is the client: args are address, version and certificate. The order is how
// many bytes to read.
func fetch(args []string, in *bufio.Scanner, out io.Writer) error {
	if len(args) != 3 {
		return errors.New("address, version and certificate are missing")
	}
	proto := aes128TLS13
	if args[1] == strconv.Itoa(tls.VersionTLS12) {
		proto = aes128TLS12
	}
	addr, conf, err := dialConfig(strings.Join([]string{args[0], args[2]}, " "), proto)
	if err != nil {
		return err
	}
	c, err := tls.Dial("tcp4", addr, conf)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	for in.Scan() {
		n, err := strconv.Atoi(in.Text())
		if err == nil {
			err = drain(c, n)
		}
		if err != nil {
			fmt.Fprintln(out, "error", err)
			continue
		}
		fmt.Fprintln(out, n)
	}
	return in.Err()
}
