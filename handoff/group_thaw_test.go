package handoff

import (
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// scribbler takes a group's state back and writes over what it was given.
type scribbler struct{ took chan string }

func (scribbler) FreezeGroup(string) ([]byte, error) { return nil, nil }

func (s scribbler) AdoptGroup(_ string, blob []byte) error {
	was := string(blob)
	clear(blob)
	s.took <- was
	return nil
}

// A group that comes back gets its state as it was, and may do with it as it likes: PARKED
// has that too, and is still on its way, or with a host in the same process.
func TestGroupStateComesBackAlone(t *testing.T) {
	app := scribbler{make(chan string, 1)}
	near, far := channels(t)
	t.Cleanup(func() { _, _ = near.Close(), far.Close() })
	w := newWorker(t.Context(), far, nil, newOptions([]Option{WithGroups(app)}))
	t.Cleanup(w.cancel)
	s := &session{id: 7, phase: phaseParked, attempt: newEpoch(), conn: &Conn{w: w}, kept: &kept{}}
	b := &batch{group: "room", members: map[uint64]*session{s.id: s}, stage: batchParked, called: true,
		blob: []byte("state"), thawed: map[uint64]bool{}}
	w.sessions[s.id], s.batch, w.batches["room"] = s, b, b
	w.sendBatch(b)
	w.thaw(&wire.Message{Type: wire.TypeThaw, Group: "room", Refs: []wire.Ref{{ID: s.id, Epoch: s.attempt}}})
	if got := <-app.took; got != "state" {
		t.Errorf("the application got %q back", got)
	}
	if m := w.out.list[0]; m.Type != wire.TypeParked || string(m.Blobs[0].Data) != "state" {
		t.Errorf("%s has %q by now", m.Type, m.Blobs[0].Data)
	}
}
