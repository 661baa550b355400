package handoff

import (
	"crypto/tls"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// When nobody keeps duplicates of the sockets, PARKED brings them back: the session's
// own, of which a refusal and a move leave no descriptor behind.
func TestParkedBringsTheSocketBack(t *testing.T) {
	bare := func() *proc {
		p := startRaw(t, echoHandler)
		if m := p.expect(wire.TypeHello); m.Hello.Able&wire.AbleSockets == 0 {
			t.Fatal("HELLO does not say that it can")
		}
		p.send(&wire.Message{Type: wire.TypeWelcome, Welcome: &wire.Welcome{Version: 1, Worker: 1, Pool: "test", FreezeTimeout: 5000, Keeper: 1}})
		p.expect(wire.TypeReady)
		return p
	}
	one, two := bare(), bare()
	s := newSession(t, ktls.ModeSoftware, tls.VersionTLS13)
	own, err := sys.SocketCookie(s.fd)
	if err != nil {
		t.Fatal(err)
	}
	one.give(s)
	s.say("hello", "hello")
	// What the supervisor has now is only what comes back.
	sys.CloseAll([]int{s.fd})
	before := countFDs(t)
	park := func(p *proc) wire.Epoch {
		e := newEpoch()
		p.refs(wire.TypeFreeze, s.ref(e))
		m := p.expect(wire.TypeParked)
		it := m.Items[0]
		if got, err := sys.SocketCookie(it.Socket); err != nil || got != own || !it.WithSocket {
			t.Fatalf("PARKED with socket %d (error %v), want %d: %+v", got, err, own, it)
		}
		s.fd, s.cargo, s.flags = it.Socket, it.Cargo, wire.FlagRestored
		return e
	}
	for range 3 {
		e := park(one) // called off
		sys.CloseAll([]int{s.fd})
		one.refs(wire.TypeThaw, s.ref(e))
		s.say("again", "again")
	}
	from, to := one, two
	for range 3 {
		e := park(from)
		to.adopt(s, e)
		s.epoch = e
		to.refs(wire.TypeResume, s.ref(e))
		from.refs(wire.TypeRelease, s.ref(e))
		from.quiet(wire.TypePong)
		sys.CloseAll([]int{s.fd})
		s.say("moved", "moved")
		from, to = to, from
	}
	if after := countFDs(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
	s.fd = -1
	_ = s.cli.CloseWrite()
	s.eof()
}
