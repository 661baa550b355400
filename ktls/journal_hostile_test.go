package ktls

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// FuzzRecover: an arena with anything in it gives an error or a record that Import
// takes, whatever the socket says, and never a panic or a look outside.
func FuzzRecover(f *testing.F) {
	f.Add(uint64(1), []byte{0, 0, 0, 1}, uint64(3), uint64(5))
	f.Fuzz(func(t *testing.T, seed uint64, writes []byte, read, written uint64) {
		s := newScripted(t, LayerSoftware, v13, gcm)
		ta := newTestArena(t)
		ta.journal(t, s.conn)
		s.sendRaw(s.seal(typeData, []byte("hello"))[:10])
		_, _ = s.conn.Write([]byte("something"))
		_, st, err := s.conn.Detach()
		if err != nil {
			t.Fatal(err)
		}
		facts, err := st.MarshalFacts()
		if err != nil {
			t.Fatal(err)
		}
		slot := ta.place.m
		rng := rand.New(rand.NewPCG(seed, 1))
		for len(writes) > 1 {
			at := int(binary.BigEndian.Uint16(writes)) % slotSize
			slot[at] = byte(rng.Uint32())
			writes = writes[2:]
		}
		// Checksums that fit, as somebody who means it would have them.
		var h slotHead
		_ = h.load(slot)
		binary.LittleEndian.PutUint64(slot[slotSum:], headSum(slot))
		for r := range 3 {
			gen := sys.LoadShared(slot[slotGens+8*r:])
			var w words
			_ = w.load(slot, ta.place.key.ID, register(r))
			if gen > 0 {
				w.store(slot, ta.place.key.ID, register(r), gen)
			}
		}
		j, err := OpenJournals(ta.mem)
		if err != nil {
			return
		}
		for key := range j.slots {
			r, err := j.recover(key, facts, sys.TCPPosition{Read: read, Written: written})
			if err != nil {
				continue
			}
			var rec decodedRecord
			if err := rec.decode(r.Record); err != nil {
				t.Fatalf("a record that nobody takes: %v", err)
			}
			fs, err := decodeFacts(facts)
			if err == nil {
				err = rec.check(fs)
			}
			if err != nil {
				t.Fatalf("a record that nobody takes: %v", err)
			}
		}
	})
}

// An arena without room: the session goes on without a journal, and nobody takes what
// the journal said last for its state.
func TestArenaFull(t *testing.T) {
	ta := newTestArenaOf(t, minArena+arenaPage, 1)
	s := newScripted(t, LayerSoftware, v13, gcm)
	ta.journal(t, s.conn)
	if _, err := ta.a.Place(JournalKey{1, 1}); !errors.Is(err, ErrArenaFull) {
		t.Errorf("a second place of one: %v", err)
	}
	for i := range 3 {
		s.send(typeData, []byte("in"))
		s.wantRead("in")
		if _, err := s.conn.Write([]byte("out")); err != nil {
			t.Fatal(err)
		}
		s.want(typeData, "out")
		if i == 0 && s.conn.Journaled() {
			t.Error("an arena of 64 KiB has room for a buffer of that size")
		}
	}
	if ta.a.Lost() != 2 {
		t.Errorf("%d sessions counted as without a journal, expected 2", ta.a.Lost())
	}
	s.move()
	j, err := OpenJournals(ta.mem)
	if err != nil {
		t.Fatal(err)
	}
	if j.Len() != 0 {
		t.Error("a journal that ended is found")
	}
	ta.place.Free()
}

// A session at rest holds no chunk, memory that nobody needs goes back, and a place that
// was freed holds no secret.
func TestArenaIsGivenBack(t *testing.T) {
	ta := newTestArena(t)
	var all []*scripted
	var places []*Place
	for range 8 {
		s := newScripted(t, LayerSoftware, v13, gcm)
		ta.journal(t, s.conn)
		all, places = append(all, s), append(places, ta.place)
		s.send(typeData, []byte("in"))
		s.wantRead("in")
		if _, err := s.conn.Write(pattern(20_000)); err != nil {
			t.Fatal(err)
		}
		s.wantData(20_000)
	}
	warm := 0
	for i := range ta.a.classes {
		warm += len(ta.a.classes[i].warm)
	}
	if used := ta.a.nextPage - chunksAt(64)/arenaPage; warm == 0 || used > 17+25 {
		t.Errorf("%d free chunks, %d pages used by eight sessions at rest", warm, used)
	}
	for range 2 { // what was free all the time between the two
		if err := ta.a.Trim(); err != nil {
			t.Fatal(err)
		}
	}
	for i := range ta.a.classes {
		if n := len(ta.a.classes[i].warm); n > 0 {
			t.Errorf("%d free chunks of %d bytes have memory", n, chunkSizes[i])
		}
	}
	for i, s := range all { // chunks come back from the cold
		s.send(typeData, []byte("again"))
		s.wantRead("again")
		if err := s.conn.Close(); err != nil {
			t.Fatal(err)
		}
		places[i].Free()
		if !bytes.Equal(places[i].m[slotKeys:slotRegs], make([]byte, slotRegs-slotKeys)) {
			t.Error("a secret is left in a place that was freed")
		}
	}
}
