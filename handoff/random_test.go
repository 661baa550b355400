package handoff

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// countingGroups notes which groups live here.
type countingGroups struct{ r *rooms }

func (g countingGroups) FreezeGroup(name string) ([]byte, error) {
	g.r.mu.Lock()
	defer g.r.mu.Unlock()
	if g.r.open[name] != nil {
		return nil, fmt.Errorf("frozen twice")
	}
	g.r.open[name] = &room{}
	return []byte("state of " + name), nil
}

func (g countingGroups) AdoptGroup(name string, blob []byte) error {
	g.r.mu.Lock()
	defer g.r.mu.Unlock()
	if string(blob) != "state of "+name {
		return fmt.Errorf("strange state %q", blob)
	}
	delete(g.r.open, name)
	return nil
}

// TestRandomMessages sends a worker every message in every order, with epochs that
// are right, late, repeated or from nowhere. Whatever came before: a supervisor that
// asks for the inventory and answers it as the protocol says has every session back
// in service, or has its state in hand.
func TestRandomMessages(t *testing.T) {
	for seed := range uint64(25) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { randomMessages(t, rand.New(rand.NewPCG(seed, 11))) })
	}
}

func randomMessages(t *testing.T, rnd *rand.Rand) {
	p := startProc(t, echoHandler, WithGroups(countingGroups{newRooms()}))
	before := countFDs(t)
	var all []*sess
	parked := map[wire.Ref]wire.Cargo{} // what PARKED said
	for range 4 {
		s := software(t)
		p.give(s)
		all = append(all, s)
	}
	base := lastEpoch.Load()
	epoch := func() wire.Epoch { return wire.NewEpoch(1, uint32(base)+uint32(rnd.IntN(12))) }
	take := func() map[uint64]wire.Held {
		inv := p.inventory()
		for _, m := range p.stash {
			for _, it := range m.Items {
				parked[it.Ref] = it.Cargo
			}
			if m.Type == wire.TypeClosed {
				t.Fatalf("a session ended: %+v", m.Closed)
			}
		}
		p.stash = nil
		return inv
	}
	inv := take()
	for range 150 {
		s := all[rnd.IntN(len(all))]
		m := &wire.Message{}
		for range 1 + rnd.IntN(3) {
			m.Refs = append(m.Refs, all[rnd.IntN(len(all))].ref(epoch()))
		}
		switch k := rnd.IntN(12); {
		case k < 5:
			m.Type = wire.TypeFreeze
			if rnd.IntN(2) == 0 {
				m.Group, m.Last = []string{"one", "two"}[rnd.IntN(2)], rnd.IntN(3) > 0
			}
		case k < 8:
			m.Type = wire.TypeThaw
			if h := inv[s.id]; rnd.IntN(2) == 0 && h.Attempt != 0 {
				m.Refs = []wire.Ref{s.ref(h.Attempt)}
			}
		case k < 9:
			m.Type = wire.TypeResume
		case k < 10:
			m.Type = wire.TypeAbort
		case k < 11: // the real end of a move, and another worker gives it back
			inv = take()
			h := inv[s.id]
			cargo, ok := parked[s.ref(h.Attempt)]
			if h.Phase != wire.PhaseParked || !ok {
				continue
			}
			p.refs(wire.TypeRelease, s.ref(h.Attempt))
			if inv = take(); inv[s.id].ID != 0 {
				t.Fatalf("session %d is still here after RELEASE: %+v", s.id, inv[s.id])
			}
			base = uint64(uint32(h.Attempt)) + 1
			lastEpoch.Store(max(lastEpoch.Load(), base+12))
			s.cargo = cargo
			p.give(s)
			inv = take()
			continue
		default:
			inv = take()
			continue
		}
		p.send(m)
	}
	// A new supervisor.
	inv = take()
	if len(inv) != len(all) {
		t.Fatalf("inventory of %d sessions, want %d: %+v", len(inv), len(all), inv)
	}
	for _, h := range inv {
		ref := wire.Ref{ID: h.ID, Epoch: h.Epoch}
		switch h.Phase {
		case wire.PhaseFreezing, wire.PhaseParked:
			p.refs(wire.TypeThaw, wire.Ref{ID: h.ID, Epoch: h.Attempt})
		case wire.PhaseAdopted:
			p.refs(wire.TypeResume, ref)
		case wire.PhaseActive:
		default:
			t.Fatalf("%+v", h)
		}
	}
	for _, s := range all {
		s.say("in service", "in service")
	}
	for _, h := range take() {
		if h.Phase != wire.PhaseActive || h.Attempt != 0 {
			t.Errorf("at the end: %+v", h)
		}
	}
	for _, s := range all {
		_ = s.cli.CloseWrite()
		p.expect(wire.TypeClosed)
		s.close()
	}
	if after := countFDs(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}
