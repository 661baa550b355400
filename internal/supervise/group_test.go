package supervise

import (
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// join makes a session of f a member of a group that lives there.
func (u *unit) join(f *fake, ref wire.Ref, name string) {
	u.t.Helper()
	f.send(&wire.Message{Type: wire.TypeGroup, Refs: refs(ref), Group: name})
	if m := f.expect(wire.TypeGrouped); m.Refs[0] != ref || m.Group != name || m.Text != "" {
		u.t.Fatalf("GROUPED %+v", m)
	}
}

// members makes a group of n sessions at f.
func (u *unit) members(f *fake, n int, name string) []wire.Ref {
	u.t.Helper()
	var out []wire.Ref
	for range n {
		ref := u.owned(f, true)
		u.join(f, ref, name)
		out = append(out, ref)
	}
	return out
}

// comesHome takes a session to the home of the group "room", alone.
func (u *unit) comesHome(home, away *fake, ref wire.Ref) {
	u.t.Helper()
	fr := away.expect(wire.TypeFreeze)
	if fr.Group != "" || len(fr.Refs) != 1 || fr.Refs[0].ID != ref.ID {
		u.t.Fatalf("FREEZE %+v", fr)
	}
	away.send(parkedItem(fr.Refs[0], "rec"))
	it := home.expect(wire.TypeAdopt).Items[0]
	if it.Group != "room" || it.Ref != fr.Refs[0] {
		u.t.Fatalf("ADOPT %+v", it)
	}
	home.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(it.Ref)})
	home.expect(wire.TypeResume)
	away.expect(wire.TypeRelease)
	if _, e := u.owner(ref.ID); e.Group != "room" || e.Owner != home.w.ID {
		u.t.Errorf("the ledger says %+v", e)
	}
}

func parkGroup(name string, tries []wire.Ref, last bool) *wire.Message {
	m := &wire.Message{Type: wire.TypeParked, Group: name, Last: last}
	for _, r := range tries {
		m.Items = append(m.Items, wire.Item{Ref: r, Group: name, Cargo: wire.Cargo{Record: []byte("rec")}})
	}
	if last {
		m.Blobs = []wire.Blob{{Group: name, Data: []byte("shared")}}
	}
	return m
}

// A group moves as one: nothing is offered before all members are parked, nothing
// is committed before all are adopted, and its blob travels.
func TestGroupMovesAsOne(t *testing.T) {
	u, old, young, ms, fr := freezing(t, 3)
	if fr.Group != "room" || !fr.Last || len(fr.Refs) != 3 {
		t.Fatalf("FREEZE %+v", fr)
	}
	old.send(parkGroup("room", fr.Refs[:2], false))
	u.silent(young)
	old.send(parkGroup("room", fr.Refs[2:], true))
	ad := young.expect(wire.TypeAdopt)
	if ad.Group != "room" || !ad.Last || len(ad.Items) != 3 || len(ad.Blobs) != 1 || string(ad.Blobs[0].Data) != "shared" {
		t.Fatalf("ADOPT %+v", ad)
	}
	young.send(&wire.Message{Type: wire.TypeAdopted, Refs: fr.Refs[:2]})
	u.silent(young)
	for _, m := range ms {
		if owner, _ := u.owner(m.ID); owner != old.w.ID {
			t.Fatal("a member was committed before the others were adopted")
		}
	}
	young.send(&wire.Message{Type: wire.TypeAdopted, Refs: fr.Refs[2:]})
	if m := young.expect(wire.TypeResume); m.Group != "room" || !m.Last || len(m.Refs) != 3 {
		t.Fatalf("RESUME %+v", m)
	}
	old.expect(wire.TypeRelease)
	for _, m := range ms {
		if owner, _ := u.owner(m.ID); owner != young.w.ID {
			t.Error("a member stayed behind")
		}
	}
}

// One member that cannot be adopted keeps all of them where they were.
func TestGroupIsRefusedAsOne(t *testing.T) {
	u, old, young, ms, fr := freezing(t, 3)
	old.send(parkGroup("room", fr.Refs, true))
	young.expect(wire.TypeAdopt)
	young.send(&wire.Message{Type: wire.TypeAdopted, Refs: fr.Refs[:2]})
	young.send(&wire.Message{Type: wire.TypeRefused, Refused: []wire.Refused{{Ref: fr.Refs[2], Why: "no"}}})
	if m := young.expect(wire.TypeAbort); len(m.Refs) != 3 {
		t.Fatalf("ABORT %+v", m)
	}
	if m := old.expect(wire.TypeThaw); m.Group != "room" || !m.Last || len(m.Refs) != 3 {
		t.Fatalf("THAW %+v", m)
	}
	for _, m := range ms {
		if owner, e := u.owner(m.ID); owner != old.w.ID || e.Epoch != m.Epoch {
			t.Errorf("the ledger says %+v", e)
		}
	}
}

// A member that ends while the group is under way does not hold the others up.
func TestMemberEndsDuringGroupMove(t *testing.T) {
	_, old, young, ms, fr := freezing(t, 2)
	var staying, leaving wire.Ref
	for i, r := range fr.Refs {
		if r.ID == ms[0].ID {
			leaving, staying = ms[0], fr.Refs[1-i]
		}
	}
	old.send(&wire.Message{Type: wire.TypeClosed, Closed: []wire.Closed{{Ref: leaving, Reason: wire.ReasonPeer}}})
	old.send(parkGroup("room", refs(staying), true))
	if m := young.expect(wire.TypeAdopt); len(m.Items) != 1 || m.Items[0].Ref != staying {
		t.Fatalf("ADOPT %+v", m)
	}
	old.expect(wire.TypeClosedAck)
}

// A session that joins a group at another worker is moved there, alone, and is a
// member from the commit on.
func TestJoinElsewhereMovesTheSession(t *testing.T) {
	u := newUnit(t)
	home := u.worker(1)
	u.members(home, 1, "room")
	away := u.worker(1)
	ref := u.owned(away, true)
	away.send(&wire.Message{Type: wire.TypeGroup, Refs: refs(ref), Group: "room"})
	u.comesHome(home, away, ref)
	u.s.call(func() {
		if n := len(u.s.m.Groups()[u.pool.groupKey("room")].Members); n != 2 {
			t.Errorf("%d members, want 2", n)
		}
	})
}

// Who wants to join while the group moves is answered when it has arrived.
func TestJoinWaitsForAMovingGroup(t *testing.T) {
	u, old, young, _, fr := freezing(t, 1)
	newcomer := u.owned(young, true)
	young.send(&wire.Message{Type: wire.TypeGroup, Refs: refs(newcomer), Group: "room"})
	u.silent(young)
	old.send(parkGroup("room", fr.Refs, true))
	young.expect(wire.TypeAdopt)
	young.send(&wire.Message{Type: wire.TypeAdopted, Refs: fr.Refs})
	young.expect(wire.TypeResume)
	if m := young.expect(wire.TypeGrouped); m.Refs[0] != newcomer || m.Text != "" {
		t.Fatalf("GROUPED %+v", m)
	}
}

// The old worker dies in the middle of a group's move.
func TestGroupsOwnerDies(t *testing.T) {
	u, old, young, _, fr := freezing(t, 2)
	old.send(parkGroup("room", fr.Refs, true))
	young.expect(wire.TypeAdopt)
	old.kill()
	u.until(func() bool { return u.s.workers[old.w.ID] == nil })
	young.send(&wire.Message{Type: wire.TypeAdopted, Refs: fr.Refs})
	young.expect(wire.TypeResume)
	if c := u.counters(); c.lost+c.interrupted != 0 {
		t.Errorf("counters %+v", c)
	}
}

// A wish to join that comes while a successor is about to start is not lost when
// that fails.
func TestJoinDuringFailedSuccession(t *testing.T) {
	u := newUnit(t)
	w := u.worker(1)
	ref := u.owned(w, true)
	u.s.call(func() { u.s.quiescing = true })
	w.send(&wire.Message{Type: wire.TypeGroup, Refs: refs(ref), Group: "room"})
	u.silent(w)
	u.s.call(u.s.goOn)
	if m := w.expect(wire.TypeGrouped); m.Refs[0] != ref || m.Text != "" {
		t.Fatalf("GROUPED %+v", m)
	}
}

// Whoever waits to join a group whose home was to go is answered also when it is to go no
// more, or when it can no longer be reached.
func TestJoinWaitsForAHomeThatStays(t *testing.T) {
	for name, end := range map[string]func(u *unit, home *fake){
		"it stays": func(u *unit, home *fake) {
			u.s.call(func() { u.s.serve(u.pool, 1, u.pool.command) })
		},
		"it is detached": func(u *unit, home *fake) {
			home.send(&wire.Message{Type: wire.TypeAdopt}) // nonsense
		},
	} {
		t.Run(name, func(t *testing.T) {
			u := newUnit(t)
			home := u.worker(1)
			u.members(home, 1, "room")
			u.sure(home)
			away := u.worker(1)
			ref := u.owned(away, true)
			u.s.call(func() { // there is nobody yet to whom its sessions could go
				home.w.state, u.pool.serving = workerRetiring, 2
			})
			away.send(&wire.Message{Type: wire.TypeGroup, Refs: refs(ref), Group: "room"})
			u.until(func() bool { return len(u.s.waiters) == 1 })
			end(u, home)
			if name == "it stays" {
				away.expect(wire.TypeFreeze)
				return
			}
			if m := away.expect(wire.TypeGrouped); m.Text == "" {
				t.Errorf("GROUPED %+v, want a refusal", m)
			}
		})
	}
}
