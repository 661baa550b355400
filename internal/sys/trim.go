package sys

import (
	"runtime/debug"
	"time"
)

// Trim gives memory back to the kernel when a wave of work is over: Go keeps what it
// needed at the height for minutes, or for ever if nothing is allocated any more. The
// caller's one goroutine owns it; the zero value is ready.
type Trim struct {
	work  int       // since the last time
	moved bool      // since the last Tick
	after time.Time // not before
	busy  chan time.Duration
}

const (
	trimWork  = 256 // not worth it for less
	trimShare = 100 // it may take one part in so many of the time
	trimPause = 2 * time.Second
)

// Did notes n pieces of work: sessions that came, went or changed.
func (t *Trim) Did(n int) {
	t.work += n
	t.moved = t.moved || n > 0
}

// Due says whether calling Tick may be of use.
func (t *Trim) Due() bool { return t.work >= trimWork || t.busy != nil }

// Tick is to be called every second or so; it does something when there was work
// before and none since the last Tick.
func (t *Trim) Tick() {
	if t.busy != nil {
		select {
		case took := <-t.busy:
			t.busy = nil
			t.after = time.Now().Add(max(trimPause, took*trimShare))
		default:
			return
		}
	}
	moved := t.moved
	t.moved = false
	if moved || t.work < trimWork || time.Now().Before(t.after) {
		return
	}
	t.work = 0
	busy := make(chan time.Duration, 1)
	t.busy = busy
	go func() {
		begin := time.Now()
		debug.FreeOSMemory()
		busy <- time.Since(begin)
	}()
}
