package supervise

import (
	"sync"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// player answers for a fake worker as a good one does: it adopts what it is offered
// and parks what it is asked for.
type player struct {
	f *fake

	mu       sync.Mutex
	refuse   bool // turn down what is offered
	stubborn bool // reach no safe point
	had      map[uint64]bool
	refs     map[uint64]wire.Ref // what it owns, and serves
	parked   map[uint64]wire.Ref // what it owns, and does not serve until THAW
	seen     func(*wire.Message) // every message
	holds    []wire.Held         // what it tells a successor
}

// play starts to answer for f; nothing may be expected of it any more. It ends with
// the channel.
func (f *fake) play() *player {
	p := &player{f: f, had: map[uint64]bool{}, refs: map[uint64]wire.Ref{}, parked: map[uint64]wire.Ref{}}
	_ = f.ch.Conn().SetReadDeadline(time.Time{})
	go func() {
		for {
			m, err := f.ch.Recv()
			if err != nil {
				return
			}
			m.CloseSockets()
			if !p.answer(m) {
				return
			}
		}
	}()
	return p
}

// answer answers one message; a channel has one sender at a time. False: it ended.
func (p *player) answer(m *wire.Message) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.seen != nil {
		p.seen(m)
	}
	r := p.reply(m)
	return r == nil || p.f.ch.Send(r) == nil
}

func (p *player) reply(m *wire.Message) *wire.Message {
	switch m.Type {
	case wire.TypeAdopt:
		r := &wire.Message{Type: wire.TypeAdopted}
		for _, it := range m.Items {
			if p.refuse {
				r.Type = wire.TypeRefused
				r.Refused = append(r.Refused, wire.Refused{Ref: it.Ref, Why: "not me"})
				continue
			}
			r.Refs = append(r.Refs, it.Ref)
		}
		return r
	case wire.TypeResume:
		for _, ref := range m.Refs {
			p.had[ref.ID], p.refs[ref.ID] = true, ref
		}
	case wire.TypeRelease:
		for _, ref := range m.Refs {
			delete(p.refs, ref.ID)
			delete(p.parked, ref.ID)
		}
	case wire.TypeThaw:
		for _, ref := range m.Refs {
			if own, ok := p.parked[ref.ID]; ok {
				p.refs[ref.ID] = own
				delete(p.parked, ref.ID)
			}
		}
	case wire.TypeFreeze:
		if p.stubborn {
			return nil
		}
		for _, ref := range m.Refs {
			if own, ok := p.refs[ref.ID]; ok {
				p.parked[ref.ID] = own
				delete(p.refs, ref.ID)
			}
		}
		if m.Group != "" {
			return parkGroup(m.Group, m.Refs, m.Last)
		}
		r := &wire.Message{Type: wire.TypeParked}
		for _, ref := range m.Refs {
			r.Items = append(r.Items, parkedItem(ref, "p").Items...)
		}
		return r
	case wire.TypeInventory:
		return &wire.Message{Type: wire.TypeInventoryReply, Nonce: m.Nonce, Held: p.holds, Last: true}
	case wire.TypePing:
		return &wire.Message{Type: wire.TypePong, Nonce: m.Nonce}
	default:
	}
	return nil
}

func (p *player) set(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
}

// has is how many sessions it has ever had, and owns now.
func (p *player) has() (ever, now int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.had), len(p.refs) + len(p.parked)
}

// fail ends n of the sessions that it serves with an error of the handler. It has to know
// of so many: see surePlayed.
func (p *player) fail(n int) {
	p.f.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.refs) < n {
		p.f.t.Fatalf("%d sessions are to fail, it serves %d", n, len(p.refs))
	}
	m := &wire.Message{Type: wire.TypeClosed}
	for id, ref := range p.refs {
		if len(m.Closed) < n {
			m.Closed = append(m.Closed, wire.Closed{Ref: ref, Reason: wire.ReasonHandler, Text: "it fails"})
			delete(p.refs, id)
		}
	}
	p.f.send(m)
}

// sessions admits n sessions and waits until all are owned.
func (u *unit) sessions(n int) {
	u.t.Helper()
	for range n {
		u.session(true)
	}
	u.allOwned()
}

// serving is a unit with a worker of generation 1 that plays along and has n sessions of
// the kernel layer: those of a worker that dies go on in another.
func serving(t *testing.T, n int) (u *unit, old *fake) {
	t.Helper()
	u = newUnit(t)
	old = u.worker(1)
	old.play()
	for range n {
		u.session(false)
	}
	u.allOwned()
	return u, old
}

func (u *unit) allOwned() {
	u.t.Helper()
	u.until(func() bool {
		for _, ss := range u.s.sessions {
			if ss.owner() == nil || ss.Try != nil {
				return false
			}
		}
		return true
	})
}

// load is how many sessions each worker has by the ledger.
func (u *unit) loadOf(fs ...*fake) (n []int) {
	u.s.call(func() {
		for _, f := range fs {
			n = append(n, len(f.w.Sessions))
		}
	})
	return n
}

// workerOf is a fake's worker as the present supervisor has it.
func (u *unit) workerOf(f *fake) *worker { return u.s.workers[f.w.ID] }

func wantLoads(t *testing.T, got []int, want ...int) {
	t.Helper()
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("the workers have %v sessions, want %v", got, want)
		}
	}
}
