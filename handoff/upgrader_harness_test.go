package handoff

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

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
