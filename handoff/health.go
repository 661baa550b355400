package handoff

import (
	"context"
	"fmt"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// healthTime bounds the health check that a PING asks for. The supervisor offers no
// sessions to a worker that has not answered for 3 s.
const healthTime = time.Second

// WithHealth lets the program say whether it is well. The supervisor asks every worker
// from time to time (heartbeat in its configuration); f then runs in a goroutine of its
// own, never twice at a time, and what it returns within a second is the answer: nil for
// well, an error for why not. Its text, up to 512 bytes, is in `ktlsvisor status`, and
// an upgrade on trial that is not well is taken back. A check that takes longer counts
// as not well.
//
// A worker is not killed for being unwell, only for not answering at all: the answer
// comes from the goroutine that does everything the supervisor asks for, so a handler
// that is stuck does not keep it from being given. A program that wants to be replaced
// when its handlers are stuck finds that out in f, and exits.
func WithHealth(f func(ctx context.Context) error) Option {
	return func(o *options) { o.health = f }
}

// ping answers a PING, after asking the program for its health.
func (w *worker) ping(nonce uint64) {
	pong := func(text string) {
		w.send(&wire.Message{Type: wire.TypePong, Nonce: nonce, Text: wire.Clip(text), Exposed: w.exposed})
	}
	if w.health == nil {
		pong("")
		return
	}
	if !w.checking.IsZero() {
		pong(fmt.Sprintf("its health check has not returned for %v", time.Since(w.checking).Round(time.Second)))
		return
	}
	w.checking = time.Now()
	answered := false
	once := func(text string) {
		if !answered {
			answered = true
			pong(text)
		}
	}
	late := time.AfterFunc(healthTime, func() {
		w.in.post(func() { once(fmt.Sprintf("its health check did not return within %v", healthTime)) })
	})
	ctx, cancel := context.WithTimeout(w.base, healthTime)
	go func() {
		defer cancel()
		err := guard(func() error { return w.health(ctx) })
		late.Stop()
		w.in.post(func() {
			w.checking = time.Time{}
			text := ""
			if err != nil {
				if text = err.Error(); text == "" {
					text = "its health check failed"
				}
			}
			once(text)
		})
	}()
}
