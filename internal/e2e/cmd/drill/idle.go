package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// idlers are clients that do nothing until the end, when each has a byte echoed.
type idlers struct {
	mu    sync.Mutex
	conns []*tls.Conn
}

const idleDialers = 16

func startIdle(addr string, n int, conf *tls.Config) (*idlers, error) {
	if _, err := sys.RaiseNofile(); err != nil {
		return nil, err
	}
	i := &idlers{}
	conf = conf.Clone()
	// Session tickets would be 9,000 times the same.
	conf.ClientSessionCache = nil
	err := i.each(idleDialers, n, func(int) error {
		c, err := tls.DialWithDialer(&net.Dialer{Timeout: 30 * time.Second}, "tcp", addr, conf)
		if err != nil {
			return err
		}
		i.mu.Lock()
		defer i.mu.Unlock()
		i.conns = append(i.conns, c)
		return nil
	})
	if err != nil {
		i.close()
		return nil, fmt.Errorf("idle clients: %w", err)
	}
	return i, nil
}

// each calls f n times, workers of them at a time.
func (i *idlers) each(workers, n int, f func(k int) error) error {
	work := make(chan int, n)
	for k := range n {
		work <- k
	}
	close(work)
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		errs []error
	)
	for range workers {
		wg.Go(func() {
			for k := range work {
				if err := f(k); err != nil {
					mu.Lock()
					errs = append(errs, err)
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	if len(errs) > 3 {
		errs = append(errs[:3], fmt.Errorf("and %d more", len(errs)-3))
	}
	return errors.Join(errs...)
}

// check has a byte echoed on every connection.
func (i *idlers) check() error {
	err := i.each(idleDialers, len(i.conns), func(k int) error {
		c := i.conns[k]
		_ = c.SetDeadline(time.Now().Add(30 * time.Second))
		b := []byte{byte(k)}
		if _, err := c.Write(b); err != nil {
			return err
		}
		if n, err := c.Read(b); err != nil || n != 1 || b[0] != byte(k) {
			return fmt.Errorf("%d bytes, %x instead of %x, %w", n, b, byte(k), err)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("%w: idle clients: %w", errLost, err)
	}
	return nil
}

func (i *idlers) close() {
	for _, c := range i.conns {
		_ = c.NetConn().Close()
	}
}
