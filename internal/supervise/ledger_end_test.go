package supervise

import (
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// A supervisor that is killed at any point of counting an end has counted it once when
// the next one has looked.
func TestEndIsCountedOnce(t *testing.T) {
	for name, code := range map[string]endCode{"reason": uint64(wire.ReasonHandler), "unknown": endUnknown, "lost": endLost} {
		t.Run(name, func(t *testing.T) {
			l, _ := newLedger(t, 4)
			for i := range 3 {
				l.put(i, entry{ID: uint64(i + 1), Phase: slotOwned, Owner: 7})
			}
			l.end(0, code)
			l.end(1, code)
			// Killed between the two stores of the second end.
			l.endCount(code).set(1)
			for range 2 { // and once more while the next one looks
				for i := range 3 {
					if e, ok, _ := l.get(i); ok {
						l.settleEnd(e)
					}
				}
			}
			if n := l.endCount(code).get(); n != 2 {
				t.Errorf("%d ends counted, want 2", n)
			}
			l.balance(1)
			if n := l.counter(cntAccepted); n != 3 {
				t.Errorf("%d accepted, with 2 ends and 1 session", n)
			}
		})
	}
}
