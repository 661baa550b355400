package supervise

import (
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/ownership"
)

// A worker dies in a callback of a large group, which marks all members: the work of
// putting them in quarantine grows with their number, and not with its square. The
// ledger's goroutine does nothing else meanwhile.
func TestSuspectsOfALargeGroup(t *testing.T) {
	const members = 10_000
	p := &pool{name: "p"}
	w := &ownership.Worker{ID: 1}
	g := &ownership.Group{Home: w, Members: map[uint64]*ownership.Session{}}
	list := make([]*session, 0, members)
	for id := uint64(1); id <= members; id++ {
		ss := &session{pool: p}
		ss.ID, ss.Owner, ss.Group, ss.X = id, w, g, ss
		g.Members[id] = &ss.Session
		list = append(list, ss)
	}
	begun := time.Now()
	(&Supervisor{}).suspectGroups(list[:members-1])
	if took := time.Since(begun); took > time.Second { // it is some milliseconds
		t.Errorf("%d members took %v", members, took)
	}
	if n := len(p.ward.suspects); n != members {
		t.Errorf("%d suspects, want the whole group", n)
	}
}
