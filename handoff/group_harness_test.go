package handoff

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// rooms is an application with groups: every message of a member goes to all
// members. A message has 8 bytes: who said it, and his count.
type rooms struct {
	mu   sync.Mutex
	open map[string]*room
	bad  []string

	start   func()                  // runs at the start of every handler
	freeze  func(name string) error // runs in FreezeGroup
	adopt   func(name string) error // and in AdoptGroup
	adopted int                     // calls of AdoptGroup
}

type room struct {
	said    uint64 // the state that the members share
	members map[uint64]*Conn
}

func newRooms() *rooms { return &rooms{open: map[string]*room{}} }

func (r *rooms) FreezeGroup(name string) ([]byte, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.freeze != nil {
		if err := r.freeze(name); err != nil {
			return nil, err
		}
	}
	ro := r.open[name]
	if ro == nil {
		return nil, errors.New("no such room")
	}
	delete(r.open, name)
	return binary.BigEndian.AppendUint64(nil, ro.said), nil
}

func (r *rooms) AdoptGroup(name string, blob []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.adopted++
	if r.adopt != nil {
		if err := r.adopt(name); err != nil {
			return err
		}
	}
	if len(blob) != 8 {
		return fmt.Errorf("state of %d bytes", len(blob))
	}
	r.open[name] = &room{said: binary.BigEndian.Uint64(blob), members: map[uint64]*Conn{}}
	return nil
}

func (r *rooms) serve(ctx context.Context, c *Conn) error {
	const name = "lobby"
	if r.start != nil {
		r.start()
	}
	if err := c.JoinGroup(ctx, name); err != nil {
		return err
	}
	r.mu.Lock()
	ro := r.open[name]
	if ro == nil {
		ro = &room{members: map[uint64]*Conn{}}
		r.open[name] = ro
	}
	ro.members[c.ID()] = c
	r.mu.Unlock()
	var msg [8]byte
	have := 0
	for {
		n, err := c.Read(msg[have:])
		if errors.Is(err, ErrMoving) {
			c.Unread(msg[:have])
			return err // and stays in the room: what others say meanwhile still arrives
		}
		if err != nil {
			r.mu.Lock()
			delete(ro.members, c.ID())
			r.mu.Unlock()
			return err
		}
		if have += n; have < len(msg) {
			continue
		}
		have = 0
		r.say(name, msg[:])
	}
}

func (r *rooms) say(name string, msg []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	ro := r.open[name]
	if ro == nil {
		r.bad = append(r.bad, "a message for a room that is not here")
		return
	}
	ro.said++
	for id, c := range ro.members {
		if _, err := c.Write(msg); err != nil {
			r.bad = append(r.bad, fmt.Sprintf("message to member %d: %v", id, err))
		}
	}
}

// enter makes s a member at p.
func (p *proc) enter(s *sess) {
	p.t.Helper()
	p.give(s)
	m := p.expect(wire.TypeGroup)
	if m.Refs[0] != s.own() || m.Group != "lobby" {
		p.t.Fatalf("GROUP %+v", m)
	}
	s.group = m.Group
	p.send(&wire.Message{Type: wire.TypeGrouped, Refs: m.Refs, Group: m.Group})
}

// group is a supervisor's view of a group.
type group struct {
	t    *testing.T
	all  []*sess
	blob *wire.Blob
}

// parts sends a group's message two members at a time.
func (g *group) parts(p *proc, typ wire.Type, e wire.Epoch) {
	g.t.Helper()
	for i := 0; i < len(g.all); i += 2 {
		m := &wire.Message{Type: typ, Group: "lobby", Last: i+2 >= len(g.all)}
		for _, s := range g.all[i:min(i+2, len(g.all))] {
			if typ == wire.TypeAdopt {
				m.Items = append(m.Items, s.item(e))
			} else {
				m.Refs = append(m.Refs, s.ref(e))
			}
		}
		if typ == wire.TypeAdopt && m.Last && g.blob != nil {
			m.Blobs = []wire.Blob{*g.blob}
		}
		p.send(m)
	}
}

func (g *group) parked(p *proc, e wire.Epoch) {
	g.t.Helper()
	items := map[uint64]wire.Item{}
	for {
		m := p.expect(wire.TypeParked)
		if len(m.Items) > 0 && m.Items[0].Epoch != e {
			continue // of an attempt that was called off
		}
		for _, it := range m.Items {
			items[it.ID] = it
		}
		if m.Last {
			if len(m.Blobs) == 1 {
				g.blob = &m.Blobs[0]
			}
			break
		}
	}
	if len(items) != len(g.all) {
		g.t.Fatalf("%d members parked, want %d", len(items), len(g.all))
	}
	for _, s := range g.all {
		it := items[s.id]
		if it.Ref != s.ref(e) || it.Group != "lobby" {
			g.t.Fatalf("PARKED %+v", it.Ref)
		}
		s.cargo, s.flags = it.Cargo, wire.FlagRestored
	}
}

// adopt offers the group to p, true when all of it was adopted.
func (g *group) adopt(p *proc, e wire.Epoch) bool {
	g.t.Helper()
	g.parts(p, wire.TypeAdopt, e)
	for n := 0; n < len(g.all); {
		select {
		case m, ok := <-p.msgs:
			switch {
			case !ok:
				g.t.Fatal("channel closed")
			case m.Type == wire.TypeAdopted:
				n += len(m.Refs)
			case m.Type == wire.TypeRefused:
				return false
			default:
				p.stash = append(p.stash, m)
			}
		case <-time.After(patience):
			g.t.Fatal("no ADOPTED")
		}
	}
	return true
}

func (g *group) move(from, to *proc) {
	g.t.Helper()
	e := newEpoch()
	g.parts(from, wire.TypeFreeze, e)
	g.parked(from, e)
	if !g.adopt(to, e) {
		g.t.Fatal("refused")
	}
	for _, s := range g.all {
		s.epoch = e
	}
	g.parts(to, wire.TypeResume, e)
	g.parts(from, wire.TypeRelease, e)
}

func lobby(t *testing.T, p *proc, n int) *group {
	t.Helper()
	g := &group{t: t}
	for range n {
		s := software(t)
		p.enter(s)
		g.all = append(g.all, s)
	}
	return g
}

// hearAll has every member say something and everyone hear it.
func (g *group) hearAll() {
	g.t.Helper()
	for i := range g.all {
		msg := fmt.Sprintf("%08d", i)
		g.all[i].write(msg)
		for _, s := range g.all {
			s.read(msg)
		}
	}
}

// settled waits until the members of a room are there.
func settled(t *testing.T, app *rooms, n int) {
	t.Helper()
	waitFor(t, "full room", func() bool {
		app.mu.Lock()
		defer app.mu.Unlock()
		return app.open["lobby"] != nil && len(app.open["lobby"].members) == n
	})
}

func settledSaid(t *testing.T, app *rooms, n uint64) {
	t.Helper()
	waitFor(t, "message", func() bool {
		app.mu.Lock()
		defer app.mu.Unlock()
		return app.open["lobby"].said == n
	})
}
