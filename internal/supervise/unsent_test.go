package supervise

import (
	"fmt"
	"syscall"
	"testing"
)

// A worker that is dead when it is sent something has died, and broke no protocol; one that
// lives and takes no message is given up all the same.
func TestWorkerThatTakesNoMessage(t *testing.T) {
	for name, dies := range map[string]bool{"dies": true, "lives": false} {
		t.Run(name, func(t *testing.T) {
			u := newUnit(t)
			f := u.worker(1)
			u.s.call(func() { u.s.unsent(f.w, f.w.ch, fmt.Errorf("send PING: %w", syscall.EPIPE)) })
			if dies {
				f.kill()
			}
			u.until(func() bool { return u.s.workers[f.w.ID] == nil })
			u.s.call(func() {
				if broke := f.w.broke != nil; broke == dies {
					t.Errorf("broke the protocol: %v", f.w.broke)
				}
			})
		})
	}
}
