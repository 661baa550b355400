package handoff

import (
	"context"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// startInArena starts a worker whose arena has a place for one session.
func startInArena(t *testing.T, h HandlerFunc) (p *proc, mem []byte) {
	t.Helper()
	const size = 1 << 20
	fd, err := sys.SharedMemfd("arena", size)
	if err != nil {
		t.Fatal(err)
	}
	if mem, err = sys.MapShared(fd, size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sys.Unmap(mem) })
	if err := ktls.FormatArena(mem, 1); err != nil {
		t.Fatal(err)
	}
	p = startRaw(t, h)
	p.expect(wire.TypeHello)
	p.send(&wire.Message{Type: wire.TypeWelcome, Welcome: &wire.Welcome{Version: 1, Worker: 1, Pool: "test", FreezeTimeout: 5000, Arena: size}, File: fd})
	sys.CloseAll([]int{fd})
	p.expect(wire.TypeReady)
	return p, mem
}

// When the time of stopping is over, a session that could not be closed keeps its place:
// its Conn may still write there.
func TestForcedStopSharesNoPlace(t *testing.T) {
	release := make(chan struct{})
	p, mem := startInArena(t, func(context.Context, *Conn) error { <-release; return nil })
	s := software(t)
	p.give(s)
	arena := make(chan *ktls.Arena, 1)
	p.w.in.post(func() { arena <- p.w.arena })
	a := <-arena
	p.w.in.post(func() {
		p.w.stopping, p.w.forced = true, true // and closing it has come to nothing
		p.w.stopNow()
	})
	p.expectClosed(s, wire.ReasonOperator)
	if j, err := ktls.OpenJournals(mem); err != nil || j.Len() != 1 || a.HasPlace() {
		t.Errorf("%d journals, %v: the place of a session that is in use was given back", j.Len(), err)
	}
	close(release)
	_ = p.result()
}

// A session that found no place in the arena is counted, and gets one when another has
// left, without a move.
func TestPlaceInArenaLater(t *testing.T) {
	p, mem := startInArena(t, echoHandler)
	exposed := func() uint64 {
		t.Helper()
		p.w.in.post(p.w.countExposed) // as every few seconds
		p.send(&wire.Message{Type: wire.TypePing, Nonce: 1})
		return p.expect(wire.TypePong).Exposed
	}
	journals := func() int {
		t.Helper()
		j, err := ktls.OpenJournals(mem)
		if err != nil {
			t.Fatal(err)
		}
		return j.Len()
	}
	first, second := software(t), software(t)
	p.give(first)
	if n := exposed(); n != 0 {
		t.Fatalf("%d sessions without a place, and there was one", n)
	}
	p.give(second)
	first.say("1", "1")
	second.say("2", "2")
	if n := exposed(); n != 1 {
		t.Fatalf("%d sessions without a place, want 1", n)
	}
	_ = first.cli.Close()
	p.expectClosed(first, wire.ReasonPeer)
	if n := exposed(); n != 1 || journals() != 0 {
		t.Fatalf("%d sessions without a place, %d journals before anything was read", n, journals())
	}
	second.say("3", "3")
	second.say("4", "4") // which was read by a Read that began after the first
	if n := exposed(); n != 0 || journals() != 1 {
		t.Fatalf("%d sessions without a place, %d journals", n, journals())
	}
	second.say("5", "5")
	_ = second.cli.SetDeadline(time.Now().Add(patience))
	_ = second.cli.Close()
	p.expectClosed(second, wire.ReasonPeer)
	if n := journals(); n != 0 {
		t.Errorf("%d journals are left", n)
	}
}
