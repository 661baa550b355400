package supervise

import (
	"strings"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// What is kept of the groups of one worker is bounded; what is beyond that is refused with a
// word, and what is kept already stays and can be replaced.
func TestStatesOfOneWorkersGroupsAreBounded(t *testing.T) {
	u := newUnit(t)
	home := u.worker(1)
	a, b := u.members(home, 1, "a")[0], u.members(home, 1, "b")[0]
	u.checkpoint(home, a, "a", "state", 1)
	refused := func(nonce uint64, name, state string, ref wire.Ref) {
		t.Helper()
		home.send(&wire.Message{Type: wire.TypeCheckpoint, Nonce: nonce, Group: name, Refs: refs(ref),
			Blobs: []wire.Blob{{Group: name, Data: []byte(state)}}})
		if m := home.expect(wire.TypeCheckpointed); m.Nonce != nonce || m.Text != errStateQuota.Error() {
			t.Fatalf("CHECKPOINTED %+v", m)
		}
	}
	more := func(q quota) {
		u.s.call(func() { home.w.kept.states += q.states; home.w.kept.bytes += q.bytes })
	}
	more(quota{maxStatesKept - 1, 0})
	refused(2, "b", "state", b)
	u.checkpoint(home, a, "a", "another", 3)
	more(quota{1 - maxStatesKept, maxStateKept - 4096})
	refused(4, "b", "", b)
	u.checkpoint(home, a, "a", "a third one", 5)
	refused(6, "a", strings.Repeat("x", 4097), a)
	if got := u.keptState(); string(got) != "a third one" {
		t.Errorf("%q is kept", got)
	}
	more(quota{0, 4096 - maxStateKept})
	u.checkpoint(home, b, "b", "state", 7)
}

// A state is in the quota of the worker that has the group: in its home's, by the next
// supervisor's count too, after a move in the new home's, and at the group's end in none.
func TestQuotaOfStatesFollowsTheGroup(t *testing.T) {
	u, old, young, ms, fr := freezing(t, 2)
	// FREEZE may cross a checkpoint.
	state := strings.Repeat("x", 5000)
	old.send(&wire.Message{Type: wire.TypeCheckpoint, Nonce: 1, Group: "room", Refs: refs(ms[0]), Blobs: []wire.Blob{{Group: "room", Data: []byte(state)}}})
	if m := old.expect(wire.TypeCheckpointed); m.Text != "" {
		t.Fatalf("CHECKPOINTED %+v", m)
	}
	is := func(f *fake, want quota) {
		t.Helper()
		u.s.call(func() {
			if w := u.workerOf(f); w.kept != want {
				t.Errorf("%v of %v are kept, want %v", w.kept, w, want)
			}
		})
	}
	is(old, quota{1, 8192})
	old.send(parkGroup("room", fr.Refs, true))
	ad := young.expect(wire.TypeAdopt)
	young.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(ad.Items[0].Ref, ad.Items[1].Ref)})
	young.expect(wire.TypeResume)
	old.expect(wire.TypeRelease)
	is(old, quota{})
	is(young, quota{1, 4096}) // what it was parked with
	u.checkpoint(young, ad.Items[0].Ref, "room", state, 1)
	is(young, quota{1, 8192})
	old.expect(wire.TypeStop)
	u.dies(old)
	u.crash()
	young.reply(wire.Held{Ref: ad.Items[0].Ref, Phase: wire.PhaseActive, Group: "room"}, wire.Held{Ref: ad.Items[1].Ref, Phase: wire.PhaseActive, Group: "room"})
	u.recovered()
	is(young, quota{1, 8192})
	for _, it := range ad.Items {
		young.send(&wire.Message{Type: wire.TypeClosed, Closed: []wire.Closed{{Ref: it.Ref, Reason: wire.ReasonPeer}}})
		young.expect(wire.TypeClosedAck)
	}
	is(young, quota{})
}
