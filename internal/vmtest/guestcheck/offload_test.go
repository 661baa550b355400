package guestcheck

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// From include/uapi/linux/tls.h and tcp.h.
const (
	tcpULP    = 31
	solTLS    = 282
	tlsTX     = 1
	tlsRX     = 2
	version13 = 0x0304
)

// suite is one cipher of the kernel; sizes in bytes. pack lays out the structure
// that setsockopt takes: header, iv, key, salt, record sequence.
type suite struct {
	name          string
	id            uint16
	iv, key, salt int
}

var suites = []suite{
	{name: "AES-128-GCM", id: 51, iv: 8, key: 16, salt: 4},
	{name: "AES-256-GCM", id: 52, iv: 8, key: 32, salt: 4},
	{name: "AES-128-CCM", id: 53, iv: 8, key: 16, salt: 4},
	{name: "ChaCha20-Poly1305", id: 54, iv: 12, key: 32, salt: 0},
}

// material returns distinguishable bytes, so that a field in the wrong place shows.
func material(n int, start byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = start + byte(i)
	}
	return b
}

func (s suite) pack(start byte, seq uint64) string {
	b := binary.NativeEndian.AppendUint16(nil, version13)
	b = binary.NativeEndian.AppendUint16(b, s.id)
	b = append(b, material(s.iv, start)...)
	b = append(b, material(s.key, start+64)...)
	b = append(b, material(s.salt, start+128)...)
	return string(binary.BigEndian.AppendUint64(b, seq))
}

func pair(t *testing.T) (a, b *net.TCPConn) {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	a, b = c.(*net.TCPConn), s.(*net.TCPConn)
	for _, c := range []*net.TCPConn{a, b} {
		if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
	}
	return a, b
}

func setsockopt(t *testing.T, c *net.TCPConn, level, opt int, value string) {
	t.Helper()
	if err := trySetsockopt(t, c, level, opt, value); err != nil {
		t.Fatalf("setsockopt(%d, %d, %d bytes): %v", level, opt, len(value), err)
	}
}

func trySetsockopt(t *testing.T, c *net.TCPConn, level, opt int, value string) error {
	t.Helper()
	rc, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var optErr error
	if err := rc.Control(func(fd uintptr) { optErr = syscall.SetsockoptString(int(fd), level, opt, value) }); err != nil {
		t.Fatal(err)
	}
	return optErr
}

// TestOffloadEcho sends through the kernel's record layer in both directions, for
// every cipher.
func TestOffloadEcho(t *testing.T) {
	guest.NeedKernelTLS(t)
	for _, s := range suites {
		t.Run(s.name, func(t *testing.T) {
			a, b := pair(t)
			for _, c := range []*net.TCPConn{a, b} {
				setsockopt(t, c, syscall.IPPROTO_TCP, tcpULP, "tls")
			}
			setsockopt(t, a, solTLS, tlsTX, s.pack(1, 0))
			setsockopt(t, b, solTLS, tlsRX, s.pack(1, 0))
			setsockopt(t, b, solTLS, tlsTX, s.pack(33, 7))
			setsockopt(t, a, solTLS, tlsRX, s.pack(33, 7))
			want := bytes.Repeat([]byte("0123456789abcdef"), 4096) // four full records
			go func() {
				buf := make([]byte, len(want))
				if _, err := io.ReadFull(b, buf); err == nil {
					_, _ = b.Write(buf)
				}
			}()
			if _, err := a.Write(want); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, len(want))
			if _, err := io.ReadFull(a, got); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Fatal("the echo differs")
			}
		})
	}
}

// TestOffloadRecord opens the kernel's record with the standard library, and has
// the kernel open one sealed here, so that the key layout is checked against
// something other than the kernel itself.
func TestOffloadRecord(t *testing.T) {
	guest.NeedKernelTLS(t)
	const seq = 5
	for _, s := range suites[:2] {
		t.Run(s.name, func(t *testing.T) {
			a, b := pair(t)
			setsockopt(t, a, syscall.IPPROTO_TCP, tcpULP, "tls")
			setsockopt(t, a, solTLS, tlsTX, s.pack(1, seq))
			setsockopt(t, a, solTLS, tlsRX, s.pack(33, seq))

			if _, err := a.Write([]byte("from the kernel")); err != nil {
				t.Fatal(err)
			}
			header := make([]byte, 5)
			if _, err := io.ReadFull(b, header); err != nil {
				t.Fatal(err)
			}
			body := make([]byte, binary.BigEndian.Uint16(header[3:]))
			if _, err := io.ReadFull(b, body); err != nil {
				t.Fatal(err)
			}
			plain, err := s.aead(t, 1).Open(nil, s.nonce(1, seq), body, header)
			if err != nil {
				t.Fatal(err)
			}
			if want := "from the kernel\x17"; string(plain) != want {
				t.Fatalf("the kernel's record holds %q, want %q", plain, want)
			}

			inner := []byte("to the kernel\x17")
			header = []byte{23, 3, 3, 0, byte(len(inner) + 16)}
			record := s.aead(t, 33).Seal(header, s.nonce(33, seq), inner, header)
			if _, err := b.Write(record); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 64)
			n, err := a.Read(got)
			if err != nil || string(got[:n]) != "to the kernel" {
				t.Fatalf("the kernel read %q, %v", got[:n], err)
			}
		})
	}
}

func (s suite) aead(t *testing.T, start byte) cipher.AEAD {
	t.Helper()
	block, err := aes.NewCipher(material(s.key, start+64))
	if err != nil {
		t.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	return aead
}

// nonce is the write IV (salt, iv) with the sequence number mixed in (RFC 8446, 5.3).
func (s suite) nonce(start byte, seq uint64) []byte {
	nonce := append(material(s.salt, start+128), material(s.iv, start)...)
	for i := range 8 {
		nonce[len(nonce)-1-i] ^= byte(seq >> (8 * i))
	}
	return nonce
}

// TestRekey sets a second transmit key, which kernels before 6.14 refuse.
func TestRekey(t *testing.T) {
	guest.NeedKernelTLS(t)
	a, _ := pair(t)
	s := suites[0]
	setsockopt(t, a, syscall.IPPROTO_TCP, tcpULP, "tls")
	setsockopt(t, a, solTLS, tlsTX, s.pack(1, 0))
	guest.NeedKernel(t, 6, 14, "a change of keys (KeyUpdate)")
	if err := trySetsockopt(t, a, solTLS, tlsTX, s.pack(2, 0)); err != nil {
		t.Fatalf("second TLS_TX: %v", err)
	}
}
