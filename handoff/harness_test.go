package handoff

import (
	"context"
	"io"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		os.Exit(child())
	}
	goleak.VerifyTestMain(m)
}

// patience bounds every wait of these tests; guests without KVM are slow.
const patience = 30 * time.Second

var lastEpoch atomic.Uint64

func newEpoch() wire.Epoch { return wire.NewEpoch(1, uint32(lastEpoch.Add(1))) }

// proc is a worker in this process, and the supervisor's end of its channel.
type proc struct {
	t    *testing.T
	ch   *wire.Channel
	w    *worker
	done chan error
	stop context.CancelFunc

	msgs  chan *wire.Message
	stash []*wire.Message
}

// logTo gives a logger that writes to the test's log and counts lines.
func logTo(t *testing.T, level hclog.Level, lines *atomic.Int64) hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{Level: level, Output: testWriter{t, lines}, DisableTime: true})
}

type testWriter struct {
	t     *testing.T
	lines *atomic.Int64
}

func (w testWriter) Write(p []byte) (int, error) {
	w.lines.Add(1)
	w.t.Log(strings.TrimRight(string(p), "\n"))
	return len(p), nil
}

// startProc starts a worker and takes it through HELLO, WELCOME and READY.
func startProc(t *testing.T, h HandlerFunc, opts ...Option) *proc {
	t.Helper()
	p := startRaw(t, h, opts...)
	p.expect(wire.TypeHello)
	p.send(&wire.Message{Type: wire.TypeWelcome, Welcome: &wire.Welcome{Version: 1, Worker: 1, Pool: "test", FreezeTimeout: 5000, Rekey: true}})
	p.expect(wire.TypeReady)
	return p
}

// channels are the two ends of a control channel. They are the caller's.
func channels(t *testing.T) (near, far *wire.Channel) {
	t.Helper()
	a, b, err := sys.PacketPair()
	if err != nil {
		t.Fatal(err)
	}
	if near, err = wire.NewChannel(a); err != nil {
		t.Fatal(err)
	}
	if far, err = wire.NewChannel(b); err != nil {
		t.Fatal(err)
	}
	return near, far
}

func startRaw(t *testing.T, h HandlerFunc, opts ...Option) *proc {
	t.Helper()
	near, far := channels(t)
	p := &proc{t: t, ch: near, done: make(chan error, 1), msgs: make(chan *wire.Message, 1<<14)}
	ctx, cancel := context.WithCancel(t.Context())
	p.stop = cancel
	p.w = newWorker(ctx, far, h, newOptions(append([]Option{WithLogger(hclog.NewNullLogger())}, opts...)))
	go func() { p.done <- p.w.serve(ctx, nil) }()
	recvDone := make(chan struct{})
	go func() {
		defer close(recvDone)
		for {
			m, err := p.ch.Recv()
			if err != nil {
				close(p.msgs)
				return
			}
			p.msgs <- m
		}
	}()
	t.Cleanup(func() {
		_ = p.ch.Close()
		cancel()
		<-recvDone
		select {
		case err := <-p.done:
			p.done <- err
		case <-time.After(patience):
			t.Error("Serve does not return")
		}
	})
	return p
}

// result is what Serve returned.
func (p *proc) result() error {
	p.t.Helper()
	select {
	case err := <-p.done:
		p.done <- err
		return err
	case <-time.After(patience):
		p.t.Fatal("Serve does not return")
		return nil
	}
}

func (p *proc) send(m *wire.Message) {
	p.t.Helper()
	if err := p.ch.Send(m); err != nil {
		p.t.Fatalf("send %s: %v", m.Type, err)
	}
}

func (p *proc) refs(typ wire.Type, refs ...wire.Ref) {
	p.t.Helper()
	p.send(&wire.Message{Type: typ, Refs: refs})
}

// expect returns the next message of a type, keeping others for later.
func (p *proc) expect(typ wire.Type) *wire.Message {
	p.t.Helper()
	for i, m := range p.stash {
		if m.Type == typ {
			p.stash = append(p.stash[:i:i], p.stash[i+1:]...)
			return m
		}
	}
	timeout := time.After(patience)
	for {
		select {
		case m, ok := <-p.msgs:
			if !ok {
				p.t.Fatalf("the worker closed the channel; waiting for %s", typ)
			}
			if m.Type == typ {
				return m
			}
			p.stash = append(p.stash, m)
		case <-timeout:
			p.t.Fatalf("no %s came", typ)
		}
	}
}

// connOf is the Conn of a session that p has.
func (p *proc) connOf(s *sess) (c *Conn) {
	done := make(chan struct{})
	p.w.in.post(func() { c = p.w.sessions[s.id].conn; close(done) })
	<-done
	return c
}

// quiet checks that no message of a type has come: the worker answered a PING after
// whatever else it had to say.
func (p *proc) quiet(typ wire.Type) {
	p.t.Helper()
	p.send(&wire.Message{Type: wire.TypePing, Nonce: 99})
	p.expect(wire.TypePong)
	for _, m := range p.stash {
		if m.Type == typ {
			p.t.Fatalf("unexpected %s: %+v", typ, m)
		}
	}
}

func (p *proc) inventory() map[uint64]wire.Held {
	p.t.Helper()
	all := map[uint64]wire.Held{}
	nonce := uint64(newEpoch())
	p.send(&wire.Message{Type: wire.TypeInventory, Nonce: nonce})
	for {
		m := p.expect(wire.TypeInventoryReply)
		if m.Nonce != nonce {
			p.t.Fatalf("inventory for nonce %d, asked with %d", m.Nonce, nonce)
		}
		for _, h := range m.Held {
			if _, twice := all[h.ID]; twice {
				p.t.Fatalf("session %d twice in the inventory", h.ID)
			}
			all[h.ID] = h
		}
		if m.Last {
			return all
		}
	}
}

// adopt offers s to p and waits for ADOPTED.
func (p *proc) adopt(s *sess, e wire.Epoch) {
	p.t.Helper()
	p.send(&wire.Message{Type: wire.TypeAdopt, Items: []wire.Item{s.item(e)}})
	if m := p.expect(wire.TypeAdopted); len(m.Refs) != 1 || m.Refs[0] != s.ref(e) {
		p.t.Fatalf("ADOPTED %+v, want %+v", m.Refs, s.ref(e))
	}
}

// give makes p the owner of s.
func (p *proc) give(s *sess) {
	p.t.Helper()
	e := newEpoch()
	p.adopt(s, e)
	s.epoch = e
	p.refs(wire.TypeResume, s.own())
}

// freeze asks p to park s and takes its cargo.
func (p *proc) freeze(s *sess) wire.Epoch {
	p.t.Helper()
	e := newEpoch()
	p.refs(wire.TypeFreeze, s.ref(e))
	p.parked(s, e)
	return e
}

func (p *proc) parked(s *sess, e wire.Epoch) {
	p.t.Helper()
	m := p.expect(wire.TypeParked)
	if len(m.Items) != 1 || m.Items[0].Ref != s.ref(e) {
		p.t.Fatalf("PARKED %+v, want %+v", m.Items, s.ref(e))
	}
	s.cargo, s.flags = m.Items[0].Cargo, wire.FlagRestored|m.Items[0].Flags // as the supervisor passes it on
}

// expectClosed waits for CLOSED of s and acknowledges it.
func (p *proc) expectClosed(s *sess, want wire.Reason) wire.Closed {
	p.t.Helper()
	m := p.expect(wire.TypeClosed)
	if len(m.Closed) != 1 || m.Closed[0].Ref != s.own() || m.Closed[0].Reason != want {
		p.t.Fatalf("CLOSED %+v, want session %d epoch %d, %s", m.Closed, s.id, s.epoch, want)
	}
	return m.Closed[0]
}

func echoHandler(_ context.Context, c *Conn) error {
	_, err := io.Copy(c, c)
	return err
}

func countFDs(t *testing.T) int {
	t.Helper()
	l, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(l)
}
