package supervise

import (
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/config"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// beating gives a unit a heartbeat and a clock that only the test moves.
func beating(t *testing.T) (u *unit, pass func(d, step time.Duration)) {
	t.Helper()
	u = newUnit(t)
	now := time.Now()
	u.s.call(func() {
		u.s.now = func() time.Time { return now }
		u.pool.cfg.Heartbeat, u.pool.cfg.HangTimeout = config.Duration(5*time.Second), config.Duration(30*time.Second)
	})
	return u, func(d, step time.Duration) {
		u.s.call(func() {
			for ; d > 0; d -= step {
				now = now.Add(step)
				u.s.onTick(now)
				u.s.pump()
			}
		})
	}
}

func (f *fake) pong(m *wire.Message, text string) {
	f.t.Helper()
	f.send(&wire.Message{Type: wire.TypePong, Nonce: m.Nonce, Text: text})
}

// quietly runs f without a heartbeat.
func (u *unit) quietly(f func()) {
	set := func(d time.Duration) { u.s.call(func() { u.pool.cfg.Heartbeat = config.Duration(d) }) }
	set(0)
	f()
	set(5 * time.Second)
}

// heardFrom waits until what a worker said has been taken in.
func (u *unit) heardFrom(f *fake) {
	u.t.Helper()
	u.until(func() bool { return f.w.beat.silent == 0 })
}

// says has a worker say something that answers nothing.
func (u *unit) says(f *fake) {
	u.t.Helper()
	f.send(&wire.Message{Type: wire.TypeAdopted})
	u.heardFrom(f)
}

// beyondPings returns the next message that is no PING; those are not answered.
func (f *fake) beyondPings(typ wire.Type) *wire.Message {
	f.t.Helper()
	for {
		_ = f.ch.Conn().SetReadDeadline(time.Now().Add(patience))
		m, err := f.ch.Recv()
		if err != nil {
			f.t.Fatalf("waiting for %s: %v", typ, err)
		}
		m.CloseSockets()
		if m.Type == typ {
			return m
		}
		if m.Type != wire.TypePing {
			f.t.Fatalf("got %s %+v, want %s", m.Type, m, typ)
		}
	}
}

func (u *unit) hangs() (n uint64) {
	u.s.call(func() { n = u.s.led.counter(cntHangs) })
	return n
}

// A worker that does not answer is killed, and its sessions go on in another one.
func TestHangingWorkerIsKilledAndItsSessionsAdopted(t *testing.T) {
	u, pass := beating(t)
	var hangs *fake
	var own wire.Ref
	u.quietly(func() { hangs = u.worker(1); own = u.owned(hangs, false) })
	well := u.worker(1)
	pass(tick, tick)
	hangs.expect(wire.TypePing)
	well.pong(well.expect(wire.TypePing), "")
	u.heardFrom(well)
	for range 5 { // 28 s, in which the other one goes on answering
		pass(5600*time.Millisecond, tick)
		well.pong(well.expect(wire.TypePing), "")
		u.heardFrom(well)
	}
	if u.hangs() != 0 {
		t.Fatal("killed before hang_timeout")
	}
	pass(3*time.Second, tick)
	if u.hangs() != 1 {
		t.Fatal("a silent worker was not killed")
	}
	_ = hangs.ch.Close() // as its death does; sleep does not hold the test's end
	_ = hangs.cmd.Wait()
	m := well.beyondPings(wire.TypeAdopt)
	if it := m.Items[0]; it.ID != own.ID || it.Flags != wire.FlagRestored|wire.FlagInterrupted {
		t.Fatalf("ADOPT %+v", m.Items)
	}
	if c := u.counters(); c.interrupted != 1 || c.lost != 0 {
		t.Errorf("counters %+v", c)
	}
}

// Time in which the supervisor did not run does not count, and after it the worker
// has to be asked anew.
func TestStallsOfTheSupervisorAreNoSilenceOfTheWorker(t *testing.T) {
	u, pass := beating(t)
	f := u.worker(1)
	pass(tick, tick)
	first := f.expect(wire.TypePing)
	pass(25*time.Second, tick)
	pass(time.Hour, time.Hour) // stopped, or suspended
	second := f.expect(wire.TypePing)
	if second.Nonce == first.Nonce {
		t.Fatal("no new question after a stall")
	}
	pass(25*time.Second, tick)
	f.pong(first, "") // of before; says nothing about now
	u.heardFrom(f)
	pass(20*time.Second, tick) // but it is not silent: that begins anew
	if u.hangs() != 0 {
		t.Fatal("killed for a time in which the supervisor did not run")
	}
	f.pong(second, "")
	u.until(func() bool { return !f.w.beat.open || f.w.beat.sent != second.Nonce })
	pass(5100*time.Millisecond, tick)
	f.expect(wire.TypePing)
	// Starved: what was about 20 ms takes 900. Of three minutes 20 s count.
	pass(3*time.Minute, 900*time.Millisecond)
	if u.hangs() != 0 {
		t.Fatal("killed by a starved supervisor")
	}
	pass(31*time.Second, tick)
	if u.hangs() != 1 {
		t.Fatal("a silent worker was not killed")
	}
}

// A worker that says things and answers no PING gets four hang timeouts.
func TestTalkingIsNoAnswer(t *testing.T) {
	u, pass := beating(t)
	f := u.worker(1)
	pass(tick, tick)
	f.expect(wire.TypePing)
	for range 5 {
		pass(20*time.Second, tick)
		u.says(f)
	}
	if u.hangs() != 0 {
		t.Fatal("killed while it still does things")
	}
	for range 2 {
		pass(20*time.Second, tick)
		if u.hangs() == 0 {
			u.says(f)
		}
	}
	if u.hangs() != 1 {
		t.Fatal("a worker that answers nothing was not killed")
	}
}

// What a worker is offered and does not answer goes to another one after seconds, and
// it is offered nothing until it says something.
func TestOfferThatIsNotAnsweredGoesElsewhere(t *testing.T) {
	u, pass := beating(t)
	deaf := u.worker(1)
	pass(tick, tick)
	deaf.pong(deaf.expect(wire.TypePing), "")
	u.heardFrom(deaf)
	pass(2*time.Second, tick)
	id := u.session(false)
	offer := deaf.beyondPings(wire.TypeAdopt)
	pass(tick, tick)
	ping := deaf.expect(wire.TypePing) // early, because of the offer
	other := u.worker(1)
	pass(3*time.Second, tick)
	other.pong(other.expect(wire.TypePing), "")
	pass(time.Second, tick)
	deaf.beyondPings(wire.TypeAbort)
	if m := other.beyondPings(wire.TypeAdopt); m.Items[0].ID != id || m.Items[0].Epoch == offer.Items[0].Epoch {
		t.Fatalf("ADOPT %+v", m.Items)
	}
	var why string
	var bad bool
	u.s.call(func() { why, bad = deaf.w.unhealthy() })
	if !bad || why == "" {
		t.Error("a worker that does not answer counts as well")
	}
	deaf.pong(ping, "")
	u.until(func() bool { return !deaf.w.deaf })
}

// The worker's word of its health is in the status.
func TestUnwellWorker(t *testing.T) {
	u, pass := beating(t)
	f := u.worker(1)
	pass(tick, tick)
	f.pong(f.expect(wire.TypePing), "no\x1bdatabase")
	u.until(func() bool { why, bad := f.w.unhealthy(); return bad && why == "no.database" })
	pass(6*time.Second, tick)
	f.pong(f.expect(wire.TypePing), "")
	u.until(func() bool { _, bad := f.w.unhealthy(); return !bad })
}

// A PONG for no PING breaks the protocol; one for a dead supervisor's does not.
func TestPongsWithoutPing(t *testing.T) {
	u, pass := beating(t)
	pass(tick, tick)
	for name, attack := range map[string]func(f *fake, ping *wire.Message){
		"twice":          func(f *fake, ping *wire.Message) { f.pong(ping, ""); f.pong(ping, "") },
		"of the future":  func(f *fake, ping *wire.Message) { f.pong(&wire.Message{Nonce: ping.Nonce + 1}, "") },
		"of a successor": func(f *fake, ping *wire.Message) { f.pong(&wire.Message{Nonce: 7 << 32}, "") },
		"flood of old ones": func(f *fake, _ *wire.Message) {
			for range maxStalePongs + 1 {
				f.pong(&wire.Message{Nonce: 5}, "")
			}
		},
	} {
		var f *fake
		u.quietly(func() { f = u.worker(1); u.owned(f, false) })
		pass(tick, tick)
		ping := f.expect(wire.TypePing)
		attack(f, ping)
		// Killed, if it may not have heard yet that the session is its own.
		u.until(func() bool { return f.w.state == workerDetached || f.w.state == workerDead })
		t.Log(name)
		f.kill()
		u.until(func() bool { return u.s.workers[f.w.ID] == nil })
		u.s.call(func() {
			for _, ss := range u.s.sessions {
				u.s.lose(ss, "the test ends it")
			}
		})
	}
	f := u.worker(1)
	pass(tick, tick)
	ping := f.expect(wire.TypePing)
	f.pong(&wire.Message{Nonce: 5}, "")
	f.pong(ping, "")
	u.until(func() bool { return !f.w.beat.open || f.w.beat.sent != ping.Nonce })
	u.s.call(func() {
		if f.w.state != workerReady {
			t.Error("detached for an answer to an earlier supervisor")
		}
	})
}
