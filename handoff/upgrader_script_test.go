package handoff

import (
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// script plays the new process.
type script struct {
	t    *testing.T
	flip *fakeFlip
	ch   *wire.Channel
}

// scripted starts an upgrade whose new process is played by the test; result is what
// Upgrade gives.
func (p *uproc) scripted() (*script, <-chan upgradeReply) {
	p.t.Helper()
	made := make(chan *script, 1)
	p.flip.spawn = func(c *fakeFlip) {
		file, err := c.File(channelName)
		if err != nil || file == nil {
			p.t.Error("no channel is inherited")
			close(made)
			return
		}
		fd, err := dupFile(file)
		_ = file.Close()
		if err == nil {
			var ch *wire.Channel
			if ch, err = wire.NewChannel(fd); err == nil {
				made <- &script{t: p.t, flip: c, ch: ch}
				return
			}
		}
		p.t.Error(err)
		close(made)
	}
	result := make(chan upgradeReply, 1)
	go func() {
		u, err := p.u.Upgrade()
		result <- upgradeReply{u, err}
	}()
	s := <-made
	if s == nil {
		p.t.FailNow()
	}
	p.t.Cleanup(s.die)
	return s, result
}

func (s *script) send(m *wire.Message) {
	s.t.Helper()
	if err := s.ch.Send(m); err != nil {
		s.t.Fatal(err)
	}
}

// next receives a message; typ is what the test waits for.
func (s *script) next(typ wire.Type) *wire.Message {
	s.t.Helper()
	_ = s.ch.Conn().SetReadDeadline(time.Now().Add(patience))
	m, err := s.ch.Recv()
	if err != nil {
		s.t.Fatalf("waiting for %s: %v", typ, err)
	}
	return m
}

// expect receives the next message, which must be of this type.
func (s *script) expect(typ wire.Type) *wire.Message {
	s.t.Helper()
	m := s.next(typ)
	if m.Type != typ {
		m.CloseSockets()
		s.t.Fatalf("%s came, not %s", m.Type, typ)
	}
	return m
}

// expectAdopt receives ADOPT, past BEGIN, which comes when accepting has stopped.
func (s *script) expectAdopt() *wire.Message {
	s.t.Helper()
	for {
		m := s.next(wire.TypeAdopt)
		if m.Type == wire.TypeAdopt {
			return m
		}
		if m.Type != wire.TypeBegin && m.Type != wire.TypeKeys {
			s.t.Fatalf("%s came, not ADOPT", m.Type)
		}
	}
}

func (s *script) hello(schemas ...wire.Schema) {
	s.t.Helper()
	s.send(&wire.Message{Type: wire.TypeHello, Hello: &wire.Hello{Min: 1, Max: 1, PID: 4711, Schemas: schemas}})
}

// ready goes as far as READY.
func (s *script) ready() {
	s.t.Helper()
	s.hello()
	s.expect(wire.TypeWelcome)
	s.send(&wire.Message{Type: wire.TypeReady})
}

// adopted says that all of m can be served.
func (s *script) adopted(m *wire.Message) {
	s.t.Helper()
	var refs []wire.Ref
	for i := range m.Items {
		refs = append(refs, m.Items[i].Ref)
	}
	s.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs})
}

// die is what SIGKILL does.
func (s *script) die() {
	_ = s.ch.Close()
	s.flip.closeAll()
	s.flip.die()
}

// expectResume receives RESUME, past what else may come.
func (s *script) expectResume() {
	s.t.Helper()
	for {
		m := s.next(wire.TypeResume)
		m.CloseSockets()
		if m.Type == wire.TypeResume {
			return
		}
	}
}
