package ownership

import (
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// Members of a group that are not at its home, after a move that was committed in part,
// move to it one by one, each with a commit and a RESUME of its own. That of one, and
// another that is still parked, must not look to the next machine like a group's move that
// was committed in part: its new owner has been told to go on, and says nothing at the
// moment.
func TestAStrayThatMovedDoesNotGoBack(t *testing.T) {
	key := GroupKey{Name: "g"}
	s1, s2, s3 := &Session{ID: 1, Epoch: 10}, &Session{ID: 2, Epoch: 11}, &Session{ID: 3, Epoch: 12}
	live := map[uint64]*Session{1: s1, 2: s2, 3: s3}
	find := func(id uint64) *Session { return live[id] }
	m := New(9, find, func(uint64) (uint64, wire.Epoch) { return 0, 0 })
	old, home := &Worker{ID: 1}, &Worker{ID: 3}
	m.Restore(s3, home, &key)
	m.Restore(s1, old, &key)
	m.Restore(s2, old, &key)

	said := []wire.Held{}
	for _, s := range []*Session{s1, s2} {
		h := held(s.ID, s.Epoch, wire.PhaseActive, 0)
		if try := m.Freeze(s, &key); try != nil {
			if v := m.Parked(old, wire.Ref{ID: s.ID, Epoch: try.Epoch}); v != Fine {
				t.Fatal(v)
			}
			h.Phase, h.Attempt = wire.PhaseParked, try.Epoch
		}
		said = append(said, h)
	}
	e1 := s1.Try.Epoch
	if m.Offer(s1, home) == nil || m.Adopted(home, wire.Ref{ID: 1, Epoch: e1}) != Fine || s1.Owner != home {
		t.Fatal("session 1 was not moved")
	}
	messages(m) // RESUME is sent, RELEASE has not been read

	m = New(10, find, func(id uint64) (uint64, wire.Epoch) {
		if id == 1 {
			return 1, 10
		}
		return 0, 0
	})
	for _, s := range live {
		s.Try, s.Group, s.Owner = nil, nil, nil
	}
	s1.Epoch = e1
	old, home = &Worker{ID: 1, Awaited: true}, &Worker{ID: 3, Awaited: true}
	m.Restore(s3, home, &key)
	m.Restore(s1, home, &key)
	m.Restore(s2, old, &key)
	m.Reconcile(map[*Worker][]wire.Held{old: said})
	if s1.Owner != home {
		t.Errorf("worker %d has it, and worker %d was told to go on with it", s1.Owner.ID, home.ID)
	}
	// Once the one is through, the other can follow.
	m.Reconcile(map[*Worker][]wire.Held{home: {held(1, e1, wire.PhaseActive, 0), held(3, 12, wire.PhaseActive, 0)}})
	if m.Freeze(s2, &key) == nil {
		t.Error("the other stray stays for ever")
	}
}

// What a worker says of a session that it does not own, or of an earlier ownership, ends
// and moves nothing, whoever passes it on.
func TestWrongWorkerChangesNothing(t *testing.T) {
	s := &Session{ID: 1, Epoch: 10}
	m := New(9, func(uint64) *Session { return s }, func(uint64) (uint64, wire.Epoch) { return 0, 0 })
	owner, other := &Worker{ID: 1}, &Worker{ID: 2}
	m.Restore(s, owner, nil)
	try := m.Freeze(s, nil)
	if try == nil {
		t.Fatal("it cannot be moved")
	}
	ref := wire.Ref{ID: 1, Epoch: try.Epoch}
	for what, v := range map[string]Verdict{
		"CLOSED by another":              m.Closed(other, wire.Ref{ID: 1, Epoch: 10}, wire.ReasonPeer),
		"CLOSED of an earlier ownership": m.Closed(owner, wire.Ref{ID: 1, Epoch: 9}, wire.ReasonPeer),
		"PARKED by another":              m.Parked(other, ref),
	} {
		if v != Wrong {
			t.Errorf("%s: verdict %d", what, v)
		}
	}
	if v := m.Adopted(other, ref); v != Late {
		t.Errorf("ADOPTED by whom nobody asked: verdict %d", v)
	}
	if s.Ended || s.Owner != owner || s.Epoch != 10 || s.Try != try || try.Step != Freezing {
		t.Errorf("session %+v, attempt %+v", s, try)
	}
}
