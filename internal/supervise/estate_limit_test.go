package supervise

import (
	"testing"

	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// What a dead worker's arena says of its sessions is bounded by the arena: slots that
// all name the same bytes do not fill the supervisor's memory.
func TestEstateHoldsNoMoreThanItsArena(t *testing.T) {
	e := &estate{mem: make([]byte, 1<<20)}
	sessions := 0
	for ; sessions < 100; sessions++ {
		if !e.holds(&heir{rec: &ktls.Recovered{Record: make([]byte, 100<<10)}, com: &ktls.Committed{State: make([]byte, 50<<10)}}) {
			break
		}
	}
	if sessions == 0 || sessions > 2<<20/(150<<10) {
		t.Errorf("%d sessions of 150 KiB out of an arena of 1 MiB", sessions)
	}
}
