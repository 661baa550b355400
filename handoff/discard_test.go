package handoff

import (
	"errors"
	"io"
	"os"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// A session that turns out not to be ours leaves no descriptor behind, also when it has
// ended, and its connection stays open for whoever has it.
func TestDiscardOfEndedSession(t *testing.T) {
	w := startProc(t, echoHandler).w
	s := software(t)
	before := countFDs(t)
	fd, err := sys.Dup(s.fd)
	if err != nil {
		t.Fatal(err)
	}
	k, err := ktls.Import(newSocket(fd), s.facts, s.cargo.Record)
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Abort(49); err != nil {
		t.Fatal(err)
	}
	newConn(w, s.id, k).discard()
	if n := countFDs(t); n != before {
		t.Errorf("%d descriptors, %d before", n, before)
	}
	_ = s.tcp().SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if b, err := io.ReadAll(s.tcp()); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection ended, after %d bytes: %v", len(b), err)
	}
}
