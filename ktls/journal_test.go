package ktls

import (
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// testArena is an arena whose owner and heir are both the test.
type testArena struct {
	mem   []byte
	a     *Arena
	place *Place
	n     uint64
}

func newTestArena(t testing.TB) *testArena {
	t.Helper()
	return newTestArenaOf(t, 16<<20, 64)
}

func newTestArenaOf(t testing.TB, size, slots int) *testArena {
	t.Helper()
	fd, mem := sharedArena(t, size, slots)
	sys.CloseAll([]int{fd})
	t.Cleanup(func() { _ = sys.Unmap(mem) }) // after the Conns that come later
	a, err := OpenArena(mem)
	if err != nil {
		t.Fatal(err)
	}
	return &testArena{mem: mem, a: a}
}

// sharedArena makes an arena. Descriptor and mapping are the caller's.
func sharedArena(t testing.TB, size, slots int) (fd int, mem []byte) {
	t.Helper()
	fd, err := sys.SharedMemfd("arena", int64(size))
	if err != nil {
		t.Fatal(err)
	}
	if mem, err = sys.MapShared(fd, size); err == nil {
		err = FormatArena(mem, slots)
	}
	if err != nil {
		t.Fatal(err)
	}
	return fd, mem
}

// journal begins the journal of c, in a place of its own.
func (ta *testArena) journal(t testing.TB, c *Conn) {
	t.Helper()
	ta.n++
	p, err := ta.a.Place(JournalKey{ID: 7, Epoch: ta.n})
	if err == nil {
		err = c.Journal(p)
	}
	if err != nil {
		t.Fatal(err)
	}
	ta.place = p
}

// recover is what the heir does after Detach, which leaves the journal as a kill at that
// moment would have.
func (ta *testArena) recover(t testing.TB, sock Socket, st *State) (facts, record []byte) {
	t.Helper()
	facts, err := st.MarshalFacts()
	if err != nil {
		t.Fatal(err)
	}
	st.Wipe()
	j, err := OpenJournals(ta.mem)
	if err != nil {
		t.Fatal(err)
	}
	rc, err := sock.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var r *Recovered
	if cerr := rc.Control(func(fd uintptr) { r, err = j.Recover(ta.place.Key(), facts, int(fd)) }); cerr != nil {
		err = cerr
	}
	if err != nil {
		t.Fatal(err)
	}
	ta.place.Free()
	ta.place = nil
	return facts, r.Record
}

// A place that was taken and not used yet, or is just being used, hides no other.
func TestJournalBehindAnUnusedPlace(t *testing.T) {
	ta := newTestArena(t)
	unused, err := ta.a.Place(JournalKey{ID: 1, Epoch: 1})
	if err != nil {
		t.Fatal(err)
	}
	s := newScripted(t, LayerSoftware, v13, gcm)
	ta.journal(t, s.conn)
	j, err := OpenJournals(ta.mem)
	if err != nil {
		t.Fatal(err)
	}
	if j.Len() != 1 {
		t.Errorf("%d journals found, expected 1", j.Len())
	}
	unused.Free()
}
