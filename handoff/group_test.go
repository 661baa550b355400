package handoff

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// chatter is a member: it says count things and hears all that everyone says, each
// once and in the order of each speaker.
func chatter(s *sess, members map[uint64]int, count int) error {
	errs := make(chan error, 1)
	go func() {
		pace := time.NewTicker(time.Millisecond)
		defer pace.Stop()
		var msg [8]byte
		for i := range count {
			<-pace.C
			binary.BigEndian.PutUint32(msg[:], uint32(s.id))
			binary.BigEndian.PutUint32(msg[4:], uint32(i))
			if _, err := s.cli.Write(msg[:]); err != nil {
				errs <- err
				return
			}
		}
		errs <- nil
	}()
	next := map[uint64]int{}
	for range count * len(members) {
		var msg [8]byte
		if _, err := io.ReadFull(s.cli, msg[:]); err != nil {
			return fmt.Errorf("heard so far %v: %w", next, err)
		}
		who, n := uint64(binary.BigEndian.Uint32(msg[:])), int(binary.BigEndian.Uint32(msg[4:]))
		if next[who] != n {
			return fmt.Errorf("message %d of member %d, want number %d", n, who, next[who])
		}
		next[who]++
	}
	return <-errs
}

// TestGroupExactlyOnce moves a group to and fro while its members talk, and calls
// moves off at every step. Everyone must hear everything once.
func TestGroupExactlyOnce(t *testing.T) {
	const members = 5
	count := 600
	if guest.InGuest() {
		count = 150
	}
	apps := [2]*rooms{newRooms(), newRooms()}
	var procs [2]*proc
	var said atomic.Int64
	for i, app := range apps {
		var mu sync.Mutex
		rnd := rand.New(rand.NewPCG(uint64(i), 5))
		app.start = func() { // some handlers start late
			mu.Lock()
			d := time.Duration(rnd.IntN(3)) * time.Millisecond
			mu.Unlock()
			<-time.After(d)
		}
		procs[i] = startProc(t, app.serve, WithGroups(app), WithLogger(logTo(t, hclog.Warn, &said)))
	}
	g := &group{t: t}
	ids := map[uint64]int{}
	for i := range members {
		s := software(t)
		procs[0].enter(s)
		g.all = append(g.all, s)
		ids[s.id] = i
	}
	waitFor(t, "full room", func() bool {
		apps[0].mu.Lock()
		defer apps[0].mu.Unlock()
		return apps[0].open["lobby"] != nil && len(apps[0].open["lobby"].members) == members
	})
	var wg sync.WaitGroup
	over := make(chan struct{})
	for _, s := range g.all {
		_ = s.cli.SetDeadline(time.Now().Add(2 * patience))
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := chatter(s, ids, count); err != nil {
				t.Errorf("member %d: %v", s.id, err)
			}
		}()
	}
	go func() { wg.Wait(); close(over) }()
	rnd := rand.New(rand.NewPCG(3, 3))
	at, moves, undone := 0, 0, 0
	for talking := true; talking && !t.Failed(); {
		select {
		case <-over:
			talking = false
		default:
		}
		from, to := procs[at], procs[1-at]
		e := newEpoch()
		switch rnd.IntN(8) {
		case 0: // called off before or while the members come together
			g.parts(from, wire.TypeFreeze, e)
			g.parts(from, wire.TypeThaw, e)
			undone++
		case 1: // a supervisor that forgot the first attempt
			g.parts(from, wire.TypeFreeze, e)
			g.move(from, to)
			at, moves = 1-at, moves+1
		case 2: // called off when parked
			g.parts(from, wire.TypeFreeze, e)
			g.parked(from, e)
			g.parts(from, wire.TypeThaw, e)
			undone++
		case 3: // called off when adopted
			g.parts(from, wire.TypeFreeze, e)
			g.parked(from, e)
			g.adopt(to, e)
			g.parts(to, wire.TypeAbort, e)
			g.parts(from, wire.TypeThaw, e)
			undone++
		default:
			g.move(from, to)
			at, moves = 1-at, moves+1
		}
		from.inventory()
	}
	<-over
	t.Logf("%d moves, %d called off", moves, undone)
	if said.Load() > 0 {
		t.Error("the workers had something to complain about")
	}
	g.move(procs[at], procs[1-at])
	at = 1 - at
	for i, app := range apps {
		app.mu.Lock()
		for _, b := range app.bad {
			t.Errorf("application %d: %s", i, b)
		}
		if ro := app.open["lobby"]; i == at && (ro == nil || ro.said != uint64(count*members)) {
			t.Errorf("the group's state says %+v, want %d messages", ro, count*members)
		}
		app.mu.Unlock()
	}
}

// No PARKED of a group leaves before the last member's handler has returned; a
// member that ends counts as arrived.
func TestGroupWaitsForAll(t *testing.T) {
	app := newRooms()
	hold := make(chan func(), 1)
	p := startProc(t, func(ctx context.Context, c *Conn) error {
		if len(hold) == 0 {
			hold <- c.Hold()
		}
		return app.serve(ctx, c)
	}, WithGroups(app))
	g := lobby(t, p, 4)
	settled(t, app, 4)
	e := newEpoch()
	g.parts(p, wire.TypeFreeze, e)
	waitFor(t, "three handlers that have returned", func() bool {
		n := make(chan int)
		p.w.in.post(func() {
			idle := 0
			for _, s := range p.w.sessions {
				if s.phase == phaseIdle {
					idle++
				}
			}
			n <- idle
		})
		return <-n == 3
	})
	p.quiet(wire.TypeParked)
	// What the last one says now is for everybody. It goes out after the move.
	g.all[0].write("lastword")
	settledSaid(t, app, 1)
	p.quiet(wire.TypeParked)
	// Another member ends: it is not waited for.
	gone := g.all[3]
	p.refs(wire.TypeClose, gone.own())
	p.expectClosed(gone, wire.ReasonOperator)
	g.all = g.all[:3]
	(<-hold)()
	g.parked(p, e)

	app2 := newRooms()
	q := startProc(t, app2.serve, WithGroups(app2))
	if !g.adopt(q, e) {
		t.Fatal("refused")
	}
	for _, s := range g.all {
		s.epoch = e
	}
	g.parts(q, wire.TypeResume, e)
	for _, s := range g.all {
		s.read("lastword")
	}
	g.hearAll()
	g.parts(p, wire.TypeRelease, e)
}

// A group whose state cannot be taken, or given back, goes on.
func TestGroupFailures(t *testing.T) {
	for name, fail := range map[string]func(string) error{
		"error": func(string) error { return errors.New("disk on fire") },
		"panic": func(string) error { panic("ouch") },
	} {
		t.Run("FreezeGroup "+name, func(t *testing.T) {
			app := newRooms()
			p := startProc(t, app.serve, WithGroups(app))
			g := lobby(t, p, 3)
			settled(t, app, 3)
			app.mu.Lock()
			app.freeze = fail
			app.mu.Unlock()
			e := newEpoch()
			g.parts(p, wire.TypeFreeze, e)
			g.hearAll()
			p.quiet(wire.TypeParked)
			g.parts(p, wire.TypeThaw, e) // when the supervisor's limit is over
			g.hearAll()
		})
		t.Run("AdoptGroup "+name, func(t *testing.T) {
			app, app2 := newRooms(), newRooms()
			app2.adopt = fail
			p, q := startProc(t, app.serve, WithGroups(app)), startProc(t, app2.serve, WithGroups(app2))
			g := lobby(t, p, 3)
			settled(t, app, 3)
			e := newEpoch()
			g.parts(p, wire.TypeFreeze, e)
			g.parked(p, e)
			if g.adopt(q, e) {
				t.Fatal("adopted")
			}
			g.parts(q, wire.TypeAbort, e)
			g.parts(p, wire.TypeThaw, e)
			g.hearAll()
			if len(q.inventory()) != 0 {
				t.Error("the worker that refused still has some")
			}
		})
	}
	t.Run("a worker without groups", func(t *testing.T) {
		app := newRooms()
		p, q := startProc(t, app.serve, WithGroups(app)), startProc(t, echoHandler)
		g := lobby(t, p, 3)
		settled(t, app, 3)
		e := newEpoch()
		g.parts(p, wire.TypeFreeze, e)
		g.parked(p, e)
		if g.adopt(q, e) {
			t.Fatal("adopted")
		}
		g.parts(q, wire.TypeAbort, e)
		g.parts(p, wire.TypeThaw, e)
		g.hearAll()
	})
}

func TestJoinGroup(t *testing.T) {
	h, p, s, c := stepping(t)
	defer close(h.do)
	join := func(ctx context.Context, name string) chan error {
		ch := make(chan error, 1)
		go func() {
			if name == "" {
				ch <- c.LeaveGroup(ctx)
			} else {
				ch <- c.JoinGroup(ctx, name)
			}
		}()
		return ch
	}
	asked := func(name string) {
		t.Helper()
		if m := p.expect(wire.TypeGroup); m.Refs[0] != s.own() || m.Group != name {
			t.Fatalf("GROUP %+v, want %q", m, name)
		}
	}
	answer := func(name, text string) {
		t.Helper()
		p.send(&wire.Message{Type: wire.TypeGrouped, Refs: []wire.Ref{s.own()}, Group: name, Text: text})
	}
	for _, bad := range []string{"", string(make([]byte, 65)), "\xff"} {
		if err := c.JoinGroup(t.Context(), bad); err == nil {
			t.Errorf("joined %q", bad)
		}
	}
	r := join(t.Context(), "one")
	asked("one")
	if err := c.JoinGroup(t.Context(), "two"); err == nil {
		t.Error("a second JoinGroup beside the first")
	}
	p.inventory() // a new supervisor: the old one may have taken the question with it
	asked("one")
	answer("one", "")
	if err := <-r; err != nil || c.Group() != "one" {
		t.Fatalf("JoinGroup: %v, group %q", err, c.Group())
	}
	if h := p.inventory()[s.id]; h.Group != "one" {
		t.Errorf("inventory %+v", h)
	}
	if err := c.JoinGroup(t.Context(), "one"); err != nil { // is in it: nobody is asked
		t.Error(err)
	}
	r = join(t.Context(), "two")
	asked("two")
	answer("two", "full")
	if err := <-r; err == nil || errors.Is(err, ErrMoving) || c.Group() != "one" {
		t.Errorf("refused: %v, group %q", err, c.Group())
	}
	// Given up, and granted at the same time: the last word counts.
	ctx, cancel := context.WithCancel(t.Context())
	r = join(ctx, "three")
	asked("three")
	cancel()
	if err := <-r; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	asked("one")
	answer("three", "")
	answer("one", "")
	p.inventory()
	if c.Group() != "one" {
		t.Errorf("group %q", c.Group())
	}
	r = join(t.Context(), "")
	asked("")
	answer("", "")
	if err := <-r; err != nil || c.Group() != "" {
		t.Errorf("LeaveGroup: %v, group %q", err, c.Group())
	}
	// The group lives elsewhere.
	r = join(t.Context(), "far")
	asked("far")
	e := newEpoch()
	p.refs(wire.TypeFreeze, s.ref(e))
	if err := <-r; !errors.Is(err, ErrMoving) {
		t.Errorf("JoinGroup: %v, want ErrMoving", err)
	}
	h.do <- func(context.Context, *Conn) error { return ErrMoving }
	p.parked(s, e)
	far := newStepHandler()
	q := startProc(t, far.serve)
	defer close(far.do)
	s.group = "far"
	q.adopt(s, e)
	s.epoch = e
	q.refs(wire.TypeResume, s.own())
	c = far.wait(t)
	if err := c.JoinGroup(t.Context(), "far"); err != nil {
		t.Errorf("at home: %v", err)
	}
	q.quiet(wire.TypeGroup)
	p.refs(wire.TypeRelease, s.ref(e))
	p.inventory()
}

// A member that never asks for input does not keep the others from theirs for ever.
func TestBarrierGivesUp(t *testing.T) {
	late := make(chan int, 1)
	a, b := &Conn{}, &Conn{}
	bar := newBarrier([]*Conn{a, b}, 20*time.Millisecond, func(n int) { late <- n })
	a.barrier = bar
	if err := bar.wait(a, a.moving.wait(), a.died.wait(), time.Time{}); err != nil || a.barrier != nil {
		t.Fatalf("wait: %v", err)
	}
	if n := <-late; n != 1 {
		t.Errorf("%d missing, want 1", n)
	}
	bar.leave(b) // too late, and harmless
}
