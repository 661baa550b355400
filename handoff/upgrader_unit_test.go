package handoff

import (
	"errors"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// When the offer of a group fails in the middle, the new process is told to let go of
// what it has of it: otherwise it would refuse these sessions ever after, and not end.
func TestUpgraderGroupOfferedInPart(t *testing.T) {
	pair := func() (near *line, far *wire.Channel) {
		ch, far := channels(t)
		near = newLine(ch)
		t.Cleanup(func() { near.finish(time.Second); _ = far.Close() })
		return near, far
	}
	h := &host{options: &options{log: hclog.NewNullLogger()}, in: newInbox(), vault: newVault(), inc: 1,
		residents: map[uint64]*resident{}, groups: map[string]*hostGroup{}}
	local, worker := pair()
	down, newOne := pair()
	h.local, h.down = local, down
	g := &giving{h: h, down: down, later: map[uint64]time.Time{}, units: map[*unit]struct{}{}, unread: map[uint64]*unconfirmed{}}
	h.giving = g
	var members []*resident
	for id := uint64(1); id <= 2; id++ {
		r := &resident{id: id, owned: true}
		h.residents[id] = r
		h.enterGroup(r, "room")
		members = append(members, r)
	}
	u := g.newUnit("room", members...)
	u.stage = unitOffered
	var records [][]byte
	for _, m := range u.members {
		m.item.Cargo.Record = []byte{1}
		records = append(records, m.item.Cargo.Record)
	}
	refs := u.refs()
	g.send("room", refs[1:], []luggage{{fd: -1, err: errors.New("out of descriptors")}}, true)
	for i, r := range records {
		if r[0] != 0 {
			t.Errorf("the record of member %d, which was not sent, is not wiped", i)
		}
	}

	for _, want := range []struct {
		far *wire.Channel
		typ wire.Type
	}{{newOne, wire.TypeAbort}, {worker, wire.TypeThaw}} {
		_ = want.far.Conn().SetReadDeadline(time.Now().Add(5 * time.Second))
		m, err := want.far.Recv()
		if err != nil {
			t.Fatalf("no %s: %v", want.typ, err)
		}
		if m.Type != want.typ || len(m.Refs) != 2 || m.Refs[0] != refs[0] || m.Refs[1] != refs[1] {
			t.Errorf("%s of %v, want %s of %v", m.Type, m.Refs, want.typ, refs)
		}
	}
}
