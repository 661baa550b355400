package ktls

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/crypto/cryptobyte"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// FuzzHandshake lets the fuzzer do to a real handshake what a network and a hostile
// peer can: cut records and segments, hold bytes back until more follow, damage,
// repeat and insert. Harmless changes must end in a session, whatever the cuts; and
// every session that comes out must have the right counts, which the first records
// show, and must have got every byte that was sent right behind the handshake.
func FuzzHandshake(f *testing.F) {
	for _, client := range []bool{false, true} {
		for _, old := range []bool{false, true} {
			for _, script := range []string{
				"", "\x02\x05\x02\x05\x02\x05", "\x03\x03\x03\x03\x03", "\x07\x01\x07\x04\x07\x06",
				"\x02\x00\x02\x00\x03\x03\x07\x03", "\x04\x07\x10", "\x05\x00\x05\x01", "\x00\x06", "\x00\x00\x06", "\x00\x00\x00\x05\x03",
			} {
				f.Add([]byte(script), client, old)
			}
		}
	}
	f.Fuzz(func(t *testing.T, script []byte, client, old bool) {
		if guest.InGuest() {
			return // nothing in it is about the kernel, and handshakes are slow there
		}
		c, s := tcpPair(t)
		_ = c.SetLinger(0) // a fuzzer would use up all ports
		m := &mangler{TCPConn: c, script: script[:min(len(script), 100)]}
		server, clientTLS := testServerTLS(t), testClientTLS(t)
		if old {
			clientTLS.MaxVersion = tls.VersionTLS12
		}
		_ = c.SetDeadline(time.Now().Add(300 * time.Millisecond)) // some changes make both sides wait
		tc := tls.Client(m, clientTLS)
		if client {
			tc = tls.Server(m, server)
		}
		const behind = "right behind the handshake"
		done := make(chan error, 1)
		go func() {
			err := tc.Handshake()
			if err == nil {
				_, err = tc.Write([]byte(behind))
			}
			err = errors.Join(err, m.flush())
			if err != nil {
				_ = c.Close()
			}
			done <- err
		}()
		start := Server
		cfg := &Config{TLS: server, Mode: ModeSoftware, HandshakeTimeout: testWait}
		if client {
			start, cfg.TLS = Client, clientTLS
		}
		// A damaged length makes one side wait for what the other has no reason to send.
		patience := time.AfterFunc(500*time.Millisecond, func() { _ = c.CloseWrite() })
		conn, err := start(context.Background(), s, cfg)
		perr := <-done
		slow := !patience.Stop()
		if err != nil {
			var he *HandshakeError
			if !errors.As(err, &he) || he.Timeout() {
				t.Fatalf("%v", err)
			}
			if !m.harmful && !slow && !errors.Is(perr, os.ErrDeadlineExceeded) {
				t.Fatalf("a handshake of which only the cuts were changed: %v (peer: %v)", err, perr)
			}
			return
		}
		defer func() { _ = conn.Close() }()
		_ = conn.SetDeadline(time.Now().Add(testWait))
		if slow {
			return
		}
		if perr != nil {
			if _, err := io.Copy(io.Discard, conn); err == nil {
				t.Errorf("a clean end of a session whose peer failed: %v", perr)
			}
			return
		}
		wait := testWait
		if m.harmful {
			wait = 200 * time.Millisecond // the end of a record may never come
		}
		_, _ = c.SetDeadline(time.Now().Add(wait)), conn.SetDeadline(time.Now().Add(wait))
		m.script = nil
		got := make([]byte, len(behind))
		if _, err = io.ReadFull(conn, got); err == nil && string(got) != behind {
			t.Fatalf("%q came behind the handshake", got)
		}
		if err == nil {
			conn = move(t, conn)
			defer func() { _ = conn.Close() }()
			_ = conn.SetDeadline(time.Now().Add(wait))
			err = talk(conn, tc)
		}
		// What was damaged behind the handshake may end the session, but nothing else.
		if err != nil && !m.harmful || errors.Is(err, io.EOF) {
			t.Fatalf("after the handshake: %v", err)
		}
	})
}

// talk is exchange for a session that may end.
func talk(c *Conn, peer net.Conn) error {
	buf := make([]byte, 4)
	for range 2 {
		if _, err := peer.Write([]byte("ping")); err != nil {
			return err
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			return err
		}
		if _, err := c.Write([]byte("pong")); err != nil {
			return err
		}
		if _, err := io.ReadFull(peer, buf); err != nil {
			return err
		}
	}
	return nil
}

// mangler is a TCP connection that does to what crypto/tls writes what a script says,
// one byte for each record.
type mangler struct {
	*net.TCPConn
	script    []byte
	held      []byte
	protected bool // ChangeCipherSpec went out
	harmful   bool // more than cuts were made
}

func (m *mangler) take() byte {
	if len(m.script) == 0 {
		return 0
	}
	b := m.script[0]
	m.script = m.script[1:]
	return b
}

func (m *mangler) flush() error {
	p := m.held
	m.held = nil
	if len(p) == 0 {
		return nil
	}
	_, err := m.TCPConn.Write(p)
	return err
}

// Read waits for the peer, so nothing may be held back any more.
func (m *mangler) Read(p []byte) (int, error) {
	if err := m.flush(); err != nil {
		return 0, err
	}
	return m.TCPConn.Read(p)
}

func (m *mangler) Write(p []byte) (int, error) {
	for b := p; len(b) > 0; {
		n := recordHeaderLen + int(b[3])<<8 + int(b[4])
		if err := m.record(bytes.Clone(b[:n])); err != nil {
			return 0, err
		}
		b = b[n:]
	}
	return len(p), nil
}

func (m *mangler) record(rec []byte) error {
	hold := false
	defer func(typ byte) {
		m.protected = m.protected || typ == byte(typeChangeCipherSpec)
	}(rec[0])
	switch m.take() % 8 {
	case 2: // in two records, where that is allowed
		if body := rec[recordHeaderLen:]; rec[0] == byte(typeHandshake) && !m.protected && len(body) > 1 {
			k := 1 + int(m.take())%(len(body)-1)
			first := append([]byte{rec[0], rec[1], rec[2], byte(k >> 8), byte(k)}, body[:k]...)
			rest := append([]byte{rec[0], rec[1], rec[2], byte((len(body) - k) >> 8), byte(len(body) - k)}, body[k:]...)
			rec = append(first, rest...)
		}
	case 3:
		hold = true
	case 4:
		m.harmful = true
		at := int(m.take()) % len(rec)
		rec[at] ^= 1 + m.take()%255
	case 5:
		m.harmful = true
		extra := []string{
			"\x14\x03\x03\x00\x01\x01", "\x16\x03\x03\x00\x00", "\x17\x03\x03\x00\x00",
			"\x15\x03\x03\x00\x02\x01\x00", "\x16\x03\x03\x00\x04\x00\x00\x00\x00", "\x17\x03\x03\x00\x13ciphertext, perhaps", "\x18\x03\x03\x00\x01x",
		}
		m.held = append(m.held, extra[int(m.take())%len(extra)]...)
	case 6:
		m.harmful = true
		rec = append(rec, rec...)
	case 7: // in two segments
		k := int(m.take()) % len(rec)
		m.held = append(m.held, rec[:k]...)
		if err := m.flush(); err != nil {
			return err
		}
		rec = rec[k:]
	}
	m.held = append(m.held, rec...)
	if hold {
		return nil
	}
	return m.flush()
}

// FuzzHello checks the reader of a ServerHello, which gets it in records of any size,
// against one that has it whole.
func FuzzHello(f *testing.F) {
	hello := "\x02\x00\x00\x46\x03\x03" + string(pattern(32)) + "\x20" + string(pattern(32)) + "\x13\x01\x00\x00\x00"
	f.Add([]byte(hello), []byte{1, 3, 30, 1})
	f.Add([]byte(hello[:38]), []byte{})
	f.Add([]byte("\x02\x00\x00\x26\x03\x03"+string(pattern(32))+"\x00\xc0\x2b\x00"), []byte{38, 1, 1, 1})
	f.Fuzz(func(t *testing.T, msg, cuts []byte) {
		var h helloReader
		rest := msg
		for _, n := range cuts {
			k := min(int(n), len(rest))
			h.add(rest[:k])
			rest = rest[k:]
			if h.done() {
				break // nothing more is given to it
			}
		}
		if !h.done() {
			h.add(rest)
		}
		var id cryptobyte.String
		var suite uint16
		random := make([]byte, 32)
		whole := cryptobyte.String(msg)
		ok := whole.Skip(6) && whole.CopyBytes(random) && whole.ReadUint8LengthPrefixed(&id) && whole.ReadUint16(&suite)
		if ok != h.done() {
			t.Fatalf("done %v, of a message that has everything: %v", h.done(), ok)
		}
		if !ok {
			suite = 0
		}
		if h.suite() != suite || ok && !bytes.Equal(h.random(), random) {
			t.Fatalf("suite %#x and random %x, expected %#x and %x", h.suite(), h.random(), suite, random)
		}
	})
}
