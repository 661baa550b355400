package ktls

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// Whatever a dead worker left in its arena, reading it gives an error or something within
// the limits, and touches nothing outside of the arena.
func TestCommitsOfAHostileWorker(t *testing.T) {
	ta := newTestArenaOf(t, 1<<20, 4)
	a, mem := ta.a, ta.mem
	c, _ := connect(t, &Config{TLS: testServerTLS(t), Mode: ModeSoftware}, testClientTLS(t))
	c.Unread([]byte("some input"))
	key := JournalKey{7, 9}
	k, err := a.NewCommits(c, key, []byte("state"), false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	if done, err := c.Commit(2, []byte("next"), []byte("output"), false); !done || err != nil {
		t.Fatal(done, err)
	}
	record := (&record{V: recordVersion, ID: c.facts.ID, Layer: LayerKernel}).encode(nil)
	read := func() *Committed {
		l, err := OpenCommits(mem)
		if err != nil {
			return nil
		}
		got, err := l.Amend(key, record, nil)
		if err != nil {
			return nil
		}
		return got
	}
	good := read()
	if good == nil || string(good.State) != "next" || good.Again != 8 || good.Unsent != 6 || !good.Exact {
		t.Fatalf("read back %+v", good)
	}
	slot := append([]byte(nil), k.m...)
	r := rand.New(rand.NewPCG(1, 2))
	interesting := []uint64{0, 1, 0xff, 1 << 12, 1 << 20, 1<<32 - 1, 1 << 32, 1 << 62, 1<<64 - 1}
	survived := 0
	for range 20_000 {
		copy(k.m, slot)
		for range 1 + r.IntN(3) {
			at := 8 * r.IntN(slotSize/8)
			v := r.Uint64()
			if r.IntN(3) > 0 {
				v = interesting[r.IntN(len(interesting))]
			}
			binary.LittleEndian.PutUint64(k.m[at:], v)
		}
		if r.IntN(4) > 0 { // who wrote it knew how
			for _, at := range []int{commitEntry, commitEntry + commitEntryLen} {
				var e commitRecord
				e.load(k.m[at:])
				if e.id = key.ID; r.IntN(2) == 0 {
					e.epoch = key.Epoch
				}
				e.store(k.m[at:])
			}
			sys.StoreShared(k.m, stateCommit)
		}
		got := read()
		if got == nil {
			continue
		}
		survived++
		if len(got.State) > MaxCommitState || len(got.Record) > maxRecord || got.Again > MaxUncommitted+bigBuf || got.Unsent > MaxQueued+splicePipe {
			t.Fatalf("beyond the limits: state %d, record %d, again %d, unsent %d", len(got.State), len(got.Record), got.Again, got.Unsent)
		}
	}
	if survived == 0 {
		t.Error("nothing was ever taken: the test tests nothing")
	}
	copy(k.m, slot)
}
