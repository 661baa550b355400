package supervise

import (
	"bytes"
	"strings"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// The short way to the facts of a session gives what the long one gives.
func TestKTLSFacts(t *testing.T) {
	l, fd, err := createLedger(1)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	defer sys.CloseAll([]int{fd})
	if b, ok := l.ktlsFacts(0); ok {
		t.Errorf("an empty slot has facts: %x", b)
	}
	for _, f := range []facts{
		{Pool: "p", Facts: []byte("f"), Peer: "127.0.0.1:1"},
		{Pool: strings.Repeat("p", 40), Facts: bytes.Repeat([]byte{7}, 90), Peer: "[::1]:65535", SNI: "a.example", ALPN: "h2", Version: 0x304, Suite: 0x1301},
		{Pool: "p", Facts: bytes.Repeat([]byte{1}, 24), SNI: strings.Repeat("n", 60), Reason: "because", Version: 0x303},
		{Pool: "p", Overflow: true, Version: 0x304},
	} {
		put := l.putFacts
		if f.Overflow {
			put = l.putBigFacts
		}
		if err := put(0, &f); err != nil {
			t.Fatal(err)
		}
		want, err := l.facts(0, nil)
		if err != nil {
			t.Fatal(err)
		}
		got, ok := l.ktlsFacts(0)
		if ok != (len(want.Facts) > 0) || !bytes.Equal(got, want.Facts) {
			t.Errorf("%+v: got %x, %v", f, got, ok)
		}
	}
	good := bytes.Clone(l.slot(0)[factsOff:])
	for i := range good {
		l.slot(0)[factsOff+i] ^= 0x55 // damaged: nothing, and no panic
		b, ok := l.ktlsFacts(0)
		if f, err := l.facts(0, nil); ok && (err != nil || !bytes.Equal(b, f.Facts)) {
			t.Errorf("byte %d damaged: %x, %v", i, b, err)
		}
		l.slot(0)[factsOff+i] = good[i]
	}
}
