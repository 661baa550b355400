package supervise

import (
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
)

// Orders about the same session that come to the keeper together are carried out one after
// the other: the connection is ended, and whoever looked is told what was so when its turn
// came.
func TestLookingAndEndingInOneBatch(t *testing.T) {
	for name, want := range map[string]bool{"look, end": true, "end, look": false} {
		t.Run(name, func(t *testing.T) {
			u := newUnit(t)
			u.worker(1).play()
			id := u.session(true)
			u.allOwned()
			batch := u.stalled()
			u.s.retain.put(keeper.Entry{Key: keeper.Key{Kind: keeper.KindGroup, ID: 1}}, nil) // what comes next waits together
			open := make(chan bool, 2)
			look := func() { u.s.retain.inspect(id, func(o bool) { open <- o }) }
			if want {
				look()
				u.s.retain.shutdown(id)
			} else {
				u.s.retain.shutdown(id)
				look()
			}
			look() // it is closed by now
			batch()
			if got := <-open; got != want {
				t.Errorf("open: %v", got)
			}
			if got := <-open; got {
				t.Error("open after the end")
			}
			u.peerSeesEnd(id)
		})
	}
}
