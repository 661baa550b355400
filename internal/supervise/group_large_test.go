package supervise

import (
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// A group of thousands moves as a unit, with its shared state.
func TestGroupOfThousands(t *testing.T) {
	n := 2500
	if testing.Short() {
		n = 300
	}
	u := newUnitOf(t, n+8)
	old := u.worker(1)
	ms := u.members(old, n, "room")
	old.play()
	young := u.worker(2)
	blobs, resumed := make(chan string, 8), 0
	p := young.play()
	p.set(func() {
		p.seen = func(m *wire.Message) {
			for _, b := range m.Blobs {
				if resumed > 0 {
					b.Group = "late " + b.Group
				}
				blobs <- b.Group + ": " + string(b.Data)
			}
			if m.Type == wire.TypeResume {
				resumed += len(m.Refs)
			}
		}
	})
	u.s.call(func() { u.s.serve(u.pool, 2, []string{"/nonexistent"}) })
	u.until(func() bool { return len(young.w.Sessions) == n && u.s.m.Idle() })
	if b := <-blobs; b != "room: shared" {
		t.Errorf("shared state %q", b)
	}
	for _, ref := range ms {
		if owner, e := u.owner(ref.ID); owner != young.w.ID || e.Group != "room" {
			t.Fatalf("session %d: owner %d, group %q", ref.ID, owner, e.Group)
		}
	}
	if c := u.counters(); c.moved != uint64(n) || c.lost+c.interrupted != 0 {
		t.Errorf("counters %+v", c)
	}
}
