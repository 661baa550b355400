package handoff

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

func pingNonce(p *proc, nonce uint64) string {
	p.t.Helper()
	p.send(&wire.Message{Type: wire.TypePing, Nonce: nonce})
	m := p.expect(wire.TypePong)
	if m.Nonce != nonce {
		p.t.Fatalf("PONG %d for PING %d", m.Nonce, nonce)
	}
	return m.Text
}

// The program's word of its health is in PONG.
func TestHealthInPong(t *testing.T) {
	var word atomic.Pointer[error]
	say := func(err error) { word.Store(&err) }
	say(nil)
	p := startProc(t, func(context.Context, *Conn) error { return nil },
		WithHealth(func(context.Context) error {
			if err := *word.Load(); err == nil || err.Error() != "panic" {
				return err
			}
			panic("oh")
		}))
	if text := pingNonce(p, 1); text != "" {
		t.Errorf("a healthy worker says %q", text)
	}
	say(errors.New("no database"))
	if text := pingNonce(p, 2); text != "no database" {
		t.Errorf("PONG says %q", text)
	}
	say(errors.New("panic"))
	if text := pingNonce(p, 3); !strings.Contains(text, "oh") {
		t.Errorf("PONG says %q after a panic", text)
	}
	say(errors.New("\xff"))
	if text := pingNonce(p, 4); text != "\uFFFD" {
		t.Errorf("PONG says %q", text)
	}
	say(nil)
	if text := pingNonce(p, 5); text != "" {
		t.Errorf("a worker that is well again says %q", text)
	}
}

// A check that hangs makes the worker unwell, not silent, and there is one at a time.
func TestHealthCheckThatHangs(t *testing.T) {
	release, runs := make(chan struct{}), atomic.Int32{}
	p := startProc(t, func(context.Context, *Conn) error { return nil },
		WithHealth(func(context.Context) error { runs.Add(1); <-release; return nil }))
	for nonce := range uint64(3) {
		if text := pingNonce(p, nonce+1); !strings.Contains(text, "health check") {
			t.Errorf("PONG says %q", text)
		}
	}
	if runs.Load() != 1 {
		t.Errorf("%d checks at a time", runs.Load())
	}
	close(release)
	for nonce := uint64(10); ; nonce++ { // until its return has been noticed
		if pingNonce(p, nonce) == "" {
			break
		}
	}
	if runs.Load() != 2 {
		t.Errorf("%d checks, want 2", runs.Load())
	}
}
