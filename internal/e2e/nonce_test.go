package e2e

import (
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
	"github.com/ktlsvisor/ktlsvisor/internal/load"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// tap stands between clients and the unit and reads the records on their way, as a
// packet capture would. In TLS 1.2 with AES-GCM every record carries the part of its
// nonce that changes (RFC 5288 section 3): a peer does not notice when one comes twice,
// and then the key is as good as known.
type tap struct {
	ln net.Listener
	to string
	wg sync.WaitGroup

	mu     sync.Mutex
	nonces int
	err    error
	open   []net.Conn
}

func startTap(t *testing.T, to string) *tap {
	t.Helper()
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &tap{ln: ln, to: to}
	p.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			p.wg.Go(func() { p.serve(c) })
		}
	})
	t.Cleanup(func() {
		_ = ln.Close()
		p.mu.Lock()
		for _, c := range p.open {
			_ = c.Close()
		}
		p.mu.Unlock()
		p.wg.Wait()
	})
	return p
}

func (p *tap) serve(client net.Conn) {
	unit, err := net.Dial("tcp", p.to)
	if err != nil {
		p.fail(err)
		_ = client.Close()
		return
	}
	p.mu.Lock()
	p.open = append(p.open, client, unit)
	p.mu.Unlock()
	p.wg.Go(func() { p.pass(unit, client, nil) })
	p.pass(client, unit, map[uint64]bool{})
}

// pass copies record by record; seen are the nonces of this direction, nil to let it be.
func (p *tap) pass(dst, src net.Conn, seen map[uint64]bool) {
	defer func() { _ = dst.(*net.TCPConn).CloseWrite() }()
	sealed := false // ChangeCipherSpec has come
	rec := make([]byte, 5+1<<14+2048)
	for {
		if _, err := io.ReadFull(src, rec[:5]); err != nil {
			return
		}
		n := 5 + int(binary.BigEndian.Uint16(rec[3:]))
		if n > len(rec) {
			p.fail(fmt.Errorf("record of %d bytes", n))
			return
		}
		if _, err := io.ReadFull(src, rec[5:n]); err != nil {
			return
		}
		switch {
		case rec[0] == 20:
			sealed = true
		case sealed && seen != nil:
			nonce := binary.BigEndian.Uint64(rec[5:])
			if seen[nonce] {
				p.fail(fmt.Errorf("explicit nonce %d was used twice under one key", nonce))
			}
			seen[nonce] = true
			p.mu.Lock()
			p.nonces++
			p.mu.Unlock()
		}
		if _, err := dst.Write(rec[:n]); err != nil {
			return
		}
	}
}

func (p *tap) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil {
		p.err = err
	}
}

// noNonceTwice runs clients of TLS 1.2 with AES-GCM through a tap while everything is
// upgraded and killed. killWorker: the layer survives that.
func noNonceTwice(t *testing.T, clients int, killWorker bool) {
	t.Helper()
	u := start(t, visor.Options{})
	p := startTap(t, u.Addr)
	conf := insecure()
	conf.CipherSuites = []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256}
	f, err := load.Start(t.Context(), load.Options{Addr: p.ln.Addr().String(), TLS: conf, Sessions: clients,
		StallLimit: patience, Version: tls.VersionTLS12})
	if err != nil {
		t.Fatal(err)
	}
	fl := &fleet{Fleet: f, u: u, n: clients}
	t.Cleanup(func() { fl.stop() })
	for range 2 {
		fl.advance()
		u.settled(clients)
		u.run(0, "upgrade")
		fl.advance()
		u.settled(clients)
		if killWorker {
			f.Phase("kill -9 of a worker", true)
			victim := u.settled(clients).Pools[0].Workers[0]
			if err := u.KillProcess(victim.PID); err != nil {
				t.Fatal(err)
			}
			u.await("another worker", func(st *admin.Status) bool {
				return visor.Settled(st) && len(st.Pools[0].Workers) == 2 && !contains(visor.WorkerPIDs(st), victim.PID)
			})
			fl.advance()
		}
		u.killSupervisor()
	}
	fl.advance()
	if err := fl.stop().Err(); err != nil {
		t.Error(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil {
		t.Error(p.err)
	}
	if p.nonces < 20*clients {
		t.Errorf("only %d records were seen", p.nonces)
	}
	t.Logf("%d records of the service, every nonce once", p.nonces)
}

func TestNoNonceTwice(t *testing.T) { noNonceTwice(t, 20, false) }

func TestKernelLayerNoNonceTwice(t *testing.T) {
	guest.NeedKernelTLS(t)
	noNonceTwice(t, 8, true)
}
