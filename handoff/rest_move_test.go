package handoff

import (
	"context"
	"io"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// A session at rest stays at rest over moves, in both layers: its handler runs only when
// there is input, wherever that is, also when that came while the session was parked.
func TestRestStays(t *testing.T) {
	eachLayer(t, func(t *testing.T, mode ktls.Mode) {
		r := newSleeper()
		p := startProc(t, r.serve, WithRest(restTest))
		s := newSession(t, mode, 0)
		p.give(s)
		s.say("one", "one")
		r.rested(t, 1)
		asleep(p, s)
		to := newSleeper()
		q := startProc(t, to.serve, WithRest(restTest))
		for range 3 { // there and back: what a worker has given away comes again
			move(s, p, q)
			if s.flags&wire.FlagResting == 0 {
				t.Fatal("PARKED does not say that it was at rest")
			}
			asleep(q, s)
			move(s, q, p)
			asleep(p, s)
		}
		if len(r.gone)+len(to.gone) > 0 {
			t.Error("a handler ran although there was no input")
		}
		e := p.freeze(s)
		s.write("meanwhile")
		q.adopt(s, e)
		s.epoch = e
		q.refs(wire.TypeResume, s.ref(e))
		p.refs(wire.TypeRelease, s.ref(e))
		s.read("meanwhile")
		to.rested(t, 2)
		asleep(q, s)
		s.say("again", "again")
		to.rested(t, 3)
	})
}

// Called off, a move leaves it at rest, and input still wakes it.
func TestRestStaysAfterThaw(t *testing.T) {
	p, s, r := resting(t)
	asleep(p, s)
	for range 3 {
		e := p.freeze(s)
		p.refs(wire.TypeThaw, s.ref(e))
		asleep(p, s)
	}
	if len(r.gone) > 0 {
		t.Error("a handler ran although there was no input")
	}
	e := p.freeze(s)
	s.write("meanwhile")
	p.refs(wire.TypeThaw, s.ref(e))
	s.read("meanwhile")
	r.rested(t, 2)
}

// A program without rest runs the handler at once.
func TestRestUnknown(t *testing.T) {
	p, s, _ := resting(t)
	asleep(p, s)
	ran := make(chan bool, 1)
	q := startProc(t, func(_ context.Context, c *Conn) error {
		ran <- true
		_, err := io.Copy(c, c)
		return err
	})
	move(s, p, q)
	<-ran
	s.say("there", "there")
}
