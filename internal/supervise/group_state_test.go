package supervise

import (
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// checkpoint has the state of a group kept.
func (u *unit) checkpoint(f *fake, ref wire.Ref, name, state string, nonce uint64) {
	u.t.Helper()
	f.send(&wire.Message{Type: wire.TypeCheckpoint, Nonce: nonce, Group: name, Refs: refs(ref),
		Blobs: []wire.Blob{{Group: name, Data: []byte(state)}}})
	if m := f.expect(wire.TypeCheckpointed); m.Nonce != nonce || m.Text != "" {
		u.t.Fatalf("CHECKPOINTED %+v", m)
	}
}

// kernelMembers makes a group of n sessions at f that outlive f.
func (u *unit) kernelMembers(f *fake, n int, name string) (out []wire.Ref) {
	u.t.Helper()
	for range n {
		ref := u.owned(f, false)
		u.join(f, ref, name)
		out = append(out, ref)
	}
	return out
}

// The home of a group dies: the last checkpoint comes to the next home with the members,
// and to the one after that when it is refused.
func TestCheckpointOfAGroupOutlivesItsHome(t *testing.T) {
	u, pass := poisonable(t)
	u.s.call(func() { u.pool.cfg.Poison = 0 })
	home := u.worker(1)
	ms := u.kernelMembers(home, 3, "room")
	u.checkpoint(home, ms[0], "room", "first", 1)
	u.checkpoint(home, ms[2], "room", "second", 2)
	next := u.worker(1)
	home.kill()

	ad := next.expect(wire.TypeAdopt)
	if len(ad.Items) != 3 || len(ad.Blobs) != 1 || ad.Blobs[0].Group != "room" || string(ad.Blobs[0].Data) != "second" {
		t.Fatalf("ADOPT %+v", ad)
	}
	next.send(&wire.Message{Type: wire.TypeRefused, Refused: []wire.Refused{{Ref: ad.Items[0].Ref, Why: "not now"}}})
	next.expect(wire.TypeAbort)
	pass(retryAfter)
	ad = next.expect(wire.TypeAdopt)
	if len(ad.Items) != 3 || len(ad.Blobs) != 1 || string(ad.Blobs[0].Data) != "second" {
		t.Fatalf("ADOPT once more: %+v", ad)
	}
	var list []wire.Ref
	for _, it := range ad.Items {
		list = append(list, it.Ref)
	}
	next.send(&wire.Message{Type: wire.TypeAdopted, Refs: list})
	next.expect(wire.TypeResume)
}

// A state that nobody takes does not keep the group from being served.
func TestCheckpointThatNobodyTakes(t *testing.T) {
	u, pass := poisonable(t)
	u.s.call(func() { u.pool.cfg.Poison = 0 })
	home := u.worker(1)
	ms := u.kernelMembers(home, 1, "room")
	u.checkpoint(home, ms[0], "room", "bad", 1)
	next := u.worker(1)
	home.kill()
	for range maxStateOffers {
		ad := next.expect(wire.TypeAdopt)
		if len(ad.Blobs) != 1 {
			t.Fatalf("ADOPT %+v", ad)
		}
		next.send(&wire.Message{Type: wire.TypeRefused, Refused: []wire.Refused{{Ref: ad.Items[0].Ref, Why: "no"}}})
		next.expect(wire.TypeAbort)
		pass(retryAfter)
	}
	if ad := next.expect(wire.TypeAdopt); len(ad.Blobs) != 0 || len(ad.Items) != 1 {
		t.Fatalf("ADOPT %+v", ad)
	}
}

// A state is kept as long as its group, and only for members.
func TestCheckpointEndsWithItsGroup(t *testing.T) {
	u := newUnit(t)
	home := u.worker(1)
	ms := u.members(home, 1, "room")
	other := u.owned(home, true)
	home.send(&wire.Message{Type: wire.TypeCheckpoint, Nonce: 9, Group: "room", Refs: refs(other),
		Blobs: []wire.Blob{{Group: "room", Data: []byte("forged")}}})
	if m := home.expect(wire.TypeCheckpointed); m.Nonce != 9 || m.Text == "" {
		t.Fatalf("a session that is no member: %+v", m)
	}
	u.checkpoint(home, ms[0], "room", "state", 10)
	held := func() int {
		list, err := u.s.keeper.List(t.Context(), keeper.KindGroup)
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	if n := held(); n != 1 {
		t.Fatalf("%d states are kept", n)
	}
	home.send(&wire.Message{Type: wire.TypeClosed, Closed: []wire.Closed{{Ref: ms[0], Reason: wire.ReasonPeer}}})
	home.expect(wire.TypeClosedAck)
	u.until(func() bool { return held() == 0 })
}
