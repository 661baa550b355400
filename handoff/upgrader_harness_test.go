package handoff

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cloudflare/tableflip"
	"github.com/hashicorp/go-hclog"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// fakeFlip is tableflip between two Upgraders of one process, or between one and a
// script. A process of it dies when its died is closed.
type fakeFlip struct {
	t      *testing.T
	parent *fakeFlip
	spawn  func(*fakeFlip) // starts a new process; returns at once

	mu    sync.Mutex
	lns   map[string]*net.TCPListener
	files map[string]*os.File
	owned []io.Closer

	once, gone sync.Once
	ready      chan struct{}
	died       chan struct{}
	stopped    chan struct{}
	stopOnce   sync.Once
}

func newFlip(t *testing.T) *fakeFlip {
	f := &fakeFlip{t: t, lns: map[string]*net.TCPListener{}, files: map[string]*os.File{},
		ready: make(chan struct{}), died: make(chan struct{}), stopped: make(chan struct{})}
	t.Cleanup(f.closeAll)
	return f
}

func (f *fakeFlip) closeAll() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.owned {
		_ = c.Close()
	}
	for _, file := range f.files {
		_ = file.Close()
	}
	f.owned, f.files = nil, map[string]*os.File{}
}

func (f *fakeFlip) ListenWithCallback(network, addr string, make func(network, addr string) (net.Listener, error)) (net.Listener, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if l := f.lns[addr]; l != nil {
		return dupListener(l)
	}
	l, err := make(network, addr)
	if err != nil {
		return nil, err
	}
	dup, err := dupListener(l.(*net.TCPListener))
	if err != nil {
		return nil, err
	}
	f.lns[addr] = dup
	f.owned = append(f.owned, dup)
	return l, nil
}

func dupListener(l *net.TCPListener) (*net.TCPListener, error) {
	file, err := l.File()
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	dup, err := net.FileListener(file)
	if err != nil {
		return nil, err
	}
	return dup.(*net.TCPListener), nil
}

func dupOf(file *os.File) (*os.File, error) {
	fd, err := dupFile(file)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), file.Name()), nil
}

func (f *fakeFlip) AddFile(name string, file *os.File) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	d, err := dupOf(file)
	if err != nil {
		return err
	}
	if old := f.files[name]; old != nil {
		_ = old.Close()
	}
	f.files[name] = d
	return nil
}

func (f *fakeFlip) File(name string) (*os.File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.files[name] == nil {
		return nil, nil
	}
	return dupOf(f.files[name])
}

var errNewProcessDied = errors.New("the new process died")

func (f *fakeFlip) Upgrade() error {
	c := newFlip(f.t)
	c.parent = f
	f.mu.Lock()
	for addr, l := range f.lns {
		dup, err := dupListener(l)
		if err != nil {
			f.mu.Unlock()
			return err
		}
		c.lns[addr] = dup
		c.owned = append(c.owned, dup)
	}
	for name, file := range f.files {
		d, err := dupOf(file)
		if err != nil {
			f.mu.Unlock()
			return err
		}
		c.files[name] = d
	}
	f.mu.Unlock()
	f.spawn(c)
	select {
	case <-c.ready:
	case <-c.died:
		c.closeAll()
		return errNewProcessDied
	case <-f.stopped:
		return errors.New("terminating")
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for name, file := range f.files {
		_ = file.Close()
		delete(f.files, name)
	}
	return nil
}

func (f *fakeFlip) Ready() error {
	f.once.Do(func() { close(f.ready) })
	return nil
}

func (f *fakeFlip) Stop() { f.stopOnce.Do(func() { close(f.stopped) }) }

func (f *fakeFlip) HasParent() bool { return f.parent != nil }

func (f *fakeFlip) WaitForParent(ctx context.Context) error {
	if f.parent == nil {
		return nil
	}
	select {
	case <-f.parent.died:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (f *fakeFlip) fds() *tableflip.Fds { return nil }

func (f *fakeFlip) die() { f.gone.Do(func() { close(f.died) }) }

// uproc is a process with an Upgrader, in this process.
type uproc struct {
	t      *testing.T
	u      *Upgrader
	flip   *fakeFlip
	addr   string
	done   chan error
	cancel context.CancelFunc
}

// startUpgrader makes a process; parent is nil for the first.
func startUpgrader(t *testing.T, f *fakeFlip, h HandlerFunc, opts ...Option) *uproc {
	t.Helper()
	p, err := tryUpgrader(t, f, h, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func tryUpgrader(t *testing.T, f *fakeFlip, h HandlerFunc, opts ...Option) (*uproc, error) {
	o := newOptions(append([]Option{WithLogger(hclog.NewNullLogger())}, opts...))
	o.embed.defaults()
	u, err := newUpgrader(h, o, f)
	if err != nil {
		f.die()
		return nil, err
	}
	p := &uproc{t: t, u: u, flip: f, done: make(chan error, 1)}
	conf := &ktls.Config{TLS: &tls.Config{Certificates: []tls.Certificate{testCert(t)}}}
	a, err := u.Listen("tcp", "127.0.0.1:0", conf)
	if err != nil {
		return nil, err
	}
	p.addr = a.String()
	ctx, cancel := context.WithCancel(context.Background())
	p.cancel = cancel
	go func() {
		err := u.Serve(ctx)
		p.done <- err
		f.die()
	}()
	t.Cleanup(func() {
		cancel()
		p.result()
	})
	return p, nil
}

func (p *uproc) result() error {
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

// upgrade goes on to a process of p's own program, with other options perhaps.
func (p *uproc) upgrade(h HandlerFunc, opts ...Option) (*uproc, Upgraded, error) {
	p.t.Helper()
	var next *uproc
	started := make(chan struct{})
	spawned := false
	p.flip.spawn = func(c *fakeFlip) {
		spawned = true
		go func() {
			defer close(started)
			next, _ = tryUpgrader(p.t, c, h, opts...)
		}()
	}
	r, err := p.u.Upgrade()
	if spawned {
		<-started
	}
	return next, r, err
}

// uclient is a client that talks to whoever has its session.
type uclient struct {
	*sess
}

func (p *uproc) dial() uclient {
	p.t.Helper()
	c, err := tls.Dial("tcp", p.addr, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		p.t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(patience))
	p.t.Cleanup(func() { _ = c.Close() })
	return uclient{&sess{t: p.t, cli: c, fd: -1}}
}

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

// expect receives the next message, which must be of this type.
func (s *script) expect(typ wire.Type) *wire.Message {
	s.t.Helper()
	_ = s.ch.Conn().SetReadDeadline(time.Now().Add(patience))
	m, err := s.ch.Recv()
	if err != nil {
		s.t.Fatalf("waiting for %s: %v", typ, err)
	}
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
		_ = s.ch.Conn().SetReadDeadline(time.Now().Add(patience))
		m, err := s.ch.Recv()
		if err != nil {
			s.t.Fatal(err)
		}
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
		_ = s.ch.Conn().SetReadDeadline(time.Now().Add(patience))
		m, err := s.ch.Recv()
		if err != nil {
			s.t.Fatal(err)
		}
		m.CloseSockets()
		if m.Type == wire.TypeResume {
			return
		}
	}
}

// committing is the number of sessions whose RESUME was sent.
func (p *uproc) committing() (n int) {
	h := p.u.h
	_ = h.call(func(done func(error)) {
		if h.giving != nil {
			for _, uc := range h.giving.unread {
				n += len(uc.ids)
			}
			h.down.mu.Lock()
			if len(h.down.list) > 0 {
				n = 0
			}
			h.down.mu.Unlock()
		}
		done(nil)
	})
	return n
}

// pair is a channel whose one end is inherited.
type pair struct {
	ch  *wire.Channel
	end *os.File
}

func newPair(t *testing.T) pair {
	t.Helper()
	a, b, err := sys.PacketPair()
	if err != nil {
		t.Fatal(err)
	}
	ch, err := wire.NewChannel(a)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ch.Close() })
	return pair{ch, os.NewFile(uintptr(b), "inherited")}
}

func serverTLS(t *testing.T) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{testCert(t)}}
}

func clientTLS() *tls.Config { return &tls.Config{InsecureSkipVerify: true} }

// roomGroups are groups with a sum as their state.
type roomGroups struct {
	mu       sync.Mutex
	sums     map[string]int
	stubborn bool // it does not let a group go
}

func newRoomGroups() *roomGroups { return &roomGroups{sums: map[string]int{}} }

func (g *roomGroups) FreezeGroup(name string) ([]byte, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.stubborn {
		return nil, errors.New("not now")
	}
	n := g.sums[name]
	delete(g.sums, name)
	return []byte(strconv.Itoa(n)), nil
}

func (g *roomGroups) AdoptGroup(name string, blob []byte) error {
	n, err := strconv.Atoi(string(blob))
	g.mu.Lock()
	defer g.mu.Unlock()
	g.sums[name] = n
	return err
}

// serve is a session's handler: "join NAME", "add N", "quit". Its state is the room.
func (g *roomGroups) serve(ctx context.Context, c *Conn) error {
	join := func(room string) error {
		switch err := c.JoinGroup(ctx, room); {
		case errors.Is(err, ErrMoving):
			c.SetState([]byte(room))
			return err
		case err != nil:
			_, err = io.WriteString(c, "refused\n")
			return err
		}
		_, err := fmt.Fprintf(c, "joined %s\n", room)
		c.SetState([]byte(room))
		return err
	}
	if room := string(c.State()); room != "" {
		if err := join(room); err != nil {
			return err
		}
	}
	var line []byte
	var b [1]byte
	for {
		if _, err := c.Read(b[:]); err != nil {
			c.Unread(line)
			return err
		}
		if line = append(line, b[0]); b[0] != '\n' {
			continue
		}
		verb, arg, _ := strings.Cut(strings.TrimSpace(string(line)), " ")
		line = nil
		switch verb {
		case "join":
			if err := join(arg); err != nil {
				return err
			}
		case "add":
			n, _ := strconv.Atoi(arg)
			room := string(c.State())
			g.mu.Lock()
			g.sums[room] += n
			sum := g.sums[room]
			g.mu.Unlock()
			fmt.Fprintln(c, sum)
		default:
			return nil
		}
	}
}
