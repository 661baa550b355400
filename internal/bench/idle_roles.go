package bench

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// stockIdle is the reference: an echo server of crypto/tls as most are written, with
// a goroutine and a buffer of 4 KiB for each connection. It prints its address.
func stockIdle(_ []string, in *bufio.Scanner, out io.Writer) error {
	if _, err := sys.RaiseNofile(); err != nil {
		return err
	}
	creds, err := newCredentials()
	if err != nil {
		return err
	}
	ln, err := listen()
	if err != nil {
		return err
	}
	conf := creds.server(aes128TLS13)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				tc := tls.Server(c, conf)
				defer func() { _ = tc.Close() }()
				b := make([]byte, 4<<10)
				for {
					n, err := tc.Read(b)
					if err != nil {
						return
					}
					if _, err := tc.Write(b[:n]); err != nil {
						return
					}
				}
			}()
		}
	}()
	fmt.Fprintln(out, ln.Addr())
	for in.Scan() {
	}
	return in.Err()
}

// holdClients opens connections to args[0] and keeps them. The order is how many
// there shall be; the answer comes when each of them had a byte echoed. A client is
// only a socket afterwards: tls.Conn is dropped.
func holdClients(args []string, in *bufio.Scanner, out io.Writer) error {
	if len(args) != 1 {
		return errors.New("the address is missing")
	}
	if _, err := sys.RaiseNofile(); err != nil {
		return err
	}
	var held []net.Conn
	defer func() {
		for _, c := range held {
			_ = c.Close()
		}
	}()
	for in.Scan() {
		want, err := strconv.Atoi(in.Text())
		if err != nil {
			return err
		}
		more, err := openClients(args[0], want-len(held))
		for _, c := range more {
			held = append(held, c.NetConn())
		}
		if err != nil {
			fmt.Fprintln(out, "error", err)
			continue
		}
		fmt.Fprintln(out, len(held))
	}
	return in.Err()
}

// dialers is how many handshakes are in progress at once.
const dialers = 8

func openClients(addr string, n int) ([]*tls.Conn, error) {
	// The server's key was made for this run and is told to nobody.
	conf := &tls.Config{InsecureSkipVerify: true}
	var (
		mu    sync.Mutex
		conns []*tls.Conn
		errs  []error
		wg    sync.WaitGroup
	)
	work := make(chan struct{}, n)
	for range n {
		work <- struct{}{}
	}
	close(work)
	for range dialers {
		wg.Go(func() {
			for range work {
				c, err := openClient(addr, conf)
				mu.Lock()
				if err != nil {
					errs = append(errs, err)
				} else {
					conns = append(conns, c)
				}
				mu.Unlock()
				if err != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	return conns, errors.Join(errs...)
}

func openClient(addr string, conf *tls.Config) (*tls.Conn, error) {
	c, err := tls.Dial("tcp4", addr, conf)
	if err != nil {
		return nil, err
	}
	b := []byte{'x'}
	if _, err = c.Write(b); err == nil {
		_, err = io.ReadFull(c, b)
	}
	if err != nil {
		_ = c.NetConn().Close()
		return nil, err
	}
	return c, nil
}
