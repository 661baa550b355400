package handoff

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// rekeying is a session of the kernel layer whose client changes keys, and its worker.
func rekeying(t *testing.T) (*proc, *sess) {
	t.Helper()
	return rekeyingWith(t, echoHandler)
}

func rekeyingWith(t *testing.T, h HandlerFunc, opts ...Option) (*proc, *sess) {
	t.Helper()
	guest.NeedKernelTLS(t)
	guest.NeedKernel(t, 6, 14, "a change of keys")
	p := startProc(t, h, opts...)
	s := newSessionOf(t, ktls.ModeKernel, func(addr string) (clientConn, error) {
		tcp, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", addr)
		if err != nil {
			return nil, err
		}
		return ktls.Client(t.Context(), tcp.(*net.TCPConn), &ktls.Config{Mode: ktls.ModeSoftware,
			TLS: &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}})
	})
	p.give(s)
	s.say("hello\n", "hello\n")
	return p, s
}

func (s *sess) changeKeys(request bool) {
	s.t.Helper()
	if err := s.cli.(*ktls.Conn).KeyUpdate(request); err != nil {
		s.t.Fatal(err)
	}
}

// set goes to the next key of a direction, as a supervisor does.
func (s *sess) set(d ktls.Direction) {
	s.t.Helper()
	cur := &s.keys.TX
	if d == ktls.Receiving {
		cur = &s.keys.RX
	}
	next, err := ktls.NextSecret(s.keys.Suite, *cur)
	if err != nil {
		s.t.Fatal(err)
	}
	k := &ktls.KeyChange{Suite: s.keys.Suite, Direction: d, Current: *cur, Next: next}
	if err := k.Apply(s.fd); err != nil {
		s.t.Fatal(err)
	}
	*cur = next
}

func (p *proc) order(typ wire.Type, r wire.Rekey) {
	p.t.Helper()
	p.send(&wire.Message{Type: typ, Rekeys: []wire.Rekey{r}})
}

func (p *proc) told(typ wire.Type, s *sess) wire.Rekey {
	p.t.Helper()
	m := p.expect(typ)
	if len(m.Rekeys) != 1 || m.Rekeys[0].Ref != s.own() {
		p.t.Fatalf("%s %+v, want %+v", typ, m.Rekeys, s.own())
	}
	return m.Rekeys[0]
}

func (s *sess) update() wire.Rekey {
	return wire.Rekey{Ref: s.own(), Record: ktls.KeyUpdateMessage(false)}
}

// A session is not parked while its keys change, and a new supervisor is told how far
// that has come.
func TestParkingWaitsForTheKeys(t *testing.T) {
	p, s := rekeying(t)
	s.changeKeys(true)
	s.write("under the next key\n")
	if r := p.told(wire.TypeKeyUpdate, s); r.Count != 1 || !r.Request {
		t.Fatalf("KEY_UPDATE %+v", r)
	}
	e := newEpoch()
	p.refs(wire.TypeFreeze, s.ref(e))
	held := p.inventory()[s.id]
	if held.Phase != wire.PhaseFreezing || held.Attempt != e {
		t.Fatalf("inventory: %+v", held)
	}
	if r := p.told(wire.TypeKeyUpdate, s); r.Count != 1 || !r.Request {
		t.Fatalf("KEY_UPDATE, told again: %+v", r)
	}
	if r := p.told(wire.TypeWantUpdate, s); r.Request {
		t.Fatalf("WANT_UPDATE %+v", r)
	}
	s.set(ktls.Receiving)
	p.order(wire.TypeRekeyed, wire.Rekey{Ref: s.own(), Count: 1})
	p.parked(s, e)

	// The next owner owes the answer, and writes nothing before.
	q := startProc(t, echoHandler)
	q.adopt(s, e)
	p.refs(wire.TypeRelease, s.ref(e))
	s.epoch = e
	q.refs(wire.TypeResume, s.own())
	q.told(wire.TypeWantUpdate, s)
	q.order(wire.TypePause, wire.Rekey{Ref: s.own()})
	q.told(wire.TypePaused, s)
	q.order(wire.TypePause, wire.Rekey{Ref: s.own()}) // a new supervisor's, which has not heard
	q.order(wire.TypeSend, s.update())
	if r := q.told(wire.TypeSent, s); r.Failed != "" {
		t.Fatalf("SENT %+v", r)
	}
	q.inventory()
	q.told(wire.TypeSent, s)
	e = newEpoch()
	q.refs(wire.TypeFreeze, s.ref(e))
	q.quiet(wire.TypeParked)
	s.set(ktls.Sending)
	q.order(wire.TypeContinue, wire.Rekey{Ref: s.own()})
	q.parked(s, e)
	q.refs(wire.TypeThaw, s.ref(e))
	s.read("under the next key\n")
	s.say("and on\n", "and on\n")
}

// What cannot be, and what comes too late.
func TestOrdersAboutKeysOutOfPlace(t *testing.T) {
	p, s := rekeying(t)
	p.order(wire.TypeSend, s.update())
	if r := p.told(wire.TypeSent, s); r.Failed == "" {
		t.Fatal("sent outside of a pause")
	}
	for _, typ := range []wire.Type{wire.TypeContinue, wire.TypeRekeyed} {
		p.order(typ, wire.Rekey{Ref: s.own(), Count: 7})
	}
	p.order(wire.TypePause, wire.Rekey{Ref: s.ref(newEpoch())}) // another ownership
	s.say("alive\n", "alive\n")
	p.order(wire.TypePause, wire.Rekey{Ref: s.own()})
	p.told(wire.TypePaused, s)
	p.order(wire.TypeSend, wire.Rekey{Ref: s.own(), Record: []byte{4, 0, 0, 0}})
	if r := p.told(wire.TypeSent, s); r.Failed == "" {
		t.Fatal("another message was sent")
	}
	p.order(wire.TypeContinue, wire.Rekey{Ref: s.own()})
	s.say("still alive\n", "still alive\n")

	// The keys could not be changed.
	s.changeKeys(false)
	p.told(wire.TypeKeyUpdate, s)
	p.order(wire.TypeRekeyed, wire.Rekey{Ref: s.own(), Count: 1, Failed: "no such key"})
	p.expectClosed(s, wire.ReasonLayer)
}

// Without a supervisor nobody can change keys: a session that needs other ones ends
// cleanly, the others go on.
func TestKeysWithoutASupervisor(t *testing.T) {
	p, s := rekeying(t)
	other := newSession(t, ktls.ModeKernel, tls.VersionTLS13)
	p.give(other)
	other.say("a\n", "a\n")
	_ = p.ch.Close()
	other.say("b\n", "b\n")
	s.changeKeys(false)
	s.eof()
	other.say("c\n", "c\n")
	_ = other.cli.Close()
	if err := p.result(); !errors.Is(err, ErrSupervisorGone) {
		t.Errorf("Serve: %v", err)
	}
}

// Nor can a KeyUpdate be sent that is owed: whoever wants to write would wait for ever.
func TestDebtsWithoutASupervisor(t *testing.T) {
	p, s := rekeying(t)
	s.changeKeys(true)
	p.told(wire.TypeKeyUpdate, s)
	s.set(ktls.Receiving)
	p.order(wire.TypeRekeyed, wire.Rekey{Ref: s.own(), Count: 1})
	p.inventory()
	p.told(wire.TypeWantUpdate, s)
	_ = p.ch.Close()
	s.eof()
	if err := p.result(); !errors.Is(err, ErrSupervisorGone) {
		t.Errorf("Serve: %v", err)
	}
}

// The application may want other keys, in either layer.
func TestKeyUpdateByTheApplication(t *testing.T) {
	h := func(_ context.Context, c *Conn) error {
		buf := make([]byte, 100)
		n, err := c.Read(buf)
		if err != nil {
			return err
		}
		if err := c.KeyUpdate(true); err != nil {
			return err
		}
		if _, err := c.Write(buf[:n]); err != nil {
			return err
		}
		_, err = io.Copy(c, c)
		return err
	}
	p := startProc(t, h)
	s := newSession(t, ktls.ModeSoftware, tls.VersionTLS13)
	p.give(s)
	s.say("one\n", "one\n")
	s.say("two\n", "two\n")

	guest.NeedKernelTLS(t)
	guest.NeedKernel(t, 6, 14, "a change of keys")
	s = newSession(t, ktls.ModeKernel, tls.VersionTLS13)
	p.give(s)
	s.write("one\n")
	if r := p.told(wire.TypeWantUpdate, s); !r.Request {
		t.Fatalf("WANT_UPDATE %+v", r)
	}
	p.order(wire.TypePause, wire.Rekey{Ref: s.own()})
	p.told(wire.TypePaused, s)
	p.order(wire.TypeSend, wire.Rekey{Ref: s.own(), Record: ktls.KeyUpdateMessage(true)})
	p.told(wire.TypeSent, s)
	s.set(ktls.Sending)
	p.order(wire.TypeContinue, wire.Rekey{Ref: s.own()})
	s.read("one\n")
	p.told(wire.TypeKeyUpdate, s) // crypto/tls does what it was asked
	s.set(ktls.Receiving)
	p.order(wire.TypeRekeyed, wire.Rekey{Ref: s.own(), Count: 1})
	s.say("two\n", "two\n")
}

// A session that ends in the middle of a change of keys says so to its client: the
// change is brought to its end first.
func TestEndWhileKeysChange(t *testing.T) {
	for name, sent := range map[string]bool{"paused": false, "sent": true} {
		t.Run(name, func(t *testing.T) {
			p, s := rekeying(t)
			p.order(wire.TypePause, wire.Rekey{Ref: s.own()})
			p.told(wire.TypePaused, s)
			if sent {
				p.order(wire.TypeSend, s.update())
				p.told(wire.TypeSent, s)
			}
			p.refs(wire.TypeClose, s.own())
			if sent {
				s.set(ktls.Sending)
			} else {
				p.order(wire.TypeSend, s.update())
				if r := p.told(wire.TypeSent, s); r.Failed == "" {
					t.Error("a KeyUpdate of a session that ends")
				}
			}
			p.order(wire.TypeContinue, wire.Rekey{Ref: s.own()})
			s.eof()
			p.expectClosed(s, wire.ReasonOperator)
		})
	}
}

// KeyUpdates are counted since the adoption, also over a move that was called off: with
// a number that it has seen the supervisor would set no key.
func TestKeyUpdatesAreCountedOverAThaw(t *testing.T) {
	p, s := rekeying(t)
	for n := range uint64(3) {
		s.changeKeys(false)
		if r := p.told(wire.TypeKeyUpdate, s); r.Count != n+1 {
			t.Fatalf("KEY_UPDATE %d, want %d", r.Count, n+1)
		}
		s.set(ktls.Receiving)
		p.order(wire.TypeRekeyed, wire.Rekey{Ref: s.own(), Count: n + 1})
		s.say("on\n", "on\n")
		e := newEpoch()
		p.refs(wire.TypeFreeze, s.ref(e))
		p.parked(s, e)
		p.refs(wire.TypeThaw, s.ref(e))
	}
}
