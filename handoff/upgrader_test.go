package handoff

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	limit := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(limit) {
			t.Fatalf("waited for %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// Sessions go from process to process: echo, with something half read, and a descriptor
// less for each that has left.
func TestUpgraderMovesSessions(t *testing.T) {
	p := startUpgrader(t, newFlip(t), echoHandler)
	n := 300 // more than go at a time
	if guest.InGuest() {
		n = 80 // more than a message holds; handshakes take their time there
	}
	var cl []uclient
	for i := range n {
		c := p.dial()
		c.say(fmt.Sprint("hello ", i), fmt.Sprint("hello ", i))
		cl = append(cl, c)
	}
	for i := range 3 {
		next, r, err := p.upgrade(echoHandler)
		if err != nil || r.Moved != n || r.Stayed != 0 || r.Lost != 0 {
			t.Fatalf("upgrade %d: %+v, %v", i, r, err)
		}
		if err := p.result(); err != nil {
			t.Fatal(err)
		}
		p = next
		for j, c := range cl {
			c.say(fmt.Sprint(i, "th process, ", j), fmt.Sprint(i, "th process, ", j))
		}
	}
	late := p.dial()
	late.say("new here", "new here")
	p.cancel()
	if err := p.result(); err != nil {
		t.Fatal(err)
	}
	late.eof()
	cl[0].eof()
}

// What the handler keeps in its state arrives, also when it takes long over a message,
// and a session that reaches no safe point stays until it does.
func TestUpgraderStateAndStragglers(t *testing.T) {
	h := func(_ context.Context, c *Conn) error {
		n := len(c.State())
		buf := make([]byte, 1)
		for {
			_, err := c.Read(buf)
			if errors.Is(err, ErrMoving) {
				c.SetState(bytes.Repeat([]byte{'x'}, n))
			}
			if err != nil {
				return err
			}
			release := func() {}
			if buf[0] == '[' {
				release = c.Hold()
				for buf[0] != ']' {
					if _, err := c.Read(buf); err != nil {
						return err
					}
				}
			}
			n++
			fmt.Fprintf(c, "%d;", n)
			release()
		}
	}
	opts := []Option{WithMoveTime(200 * time.Millisecond), WithFreezeTimeout(50 * time.Millisecond)}
	p := startUpgrader(t, newFlip(t), h, opts...)
	quick, slow := p.dial(), p.dial()
	quick.say("aa", "1;2;")
	slow.say("a", "1;")
	slow.write("[ long")
	quick.say("a", "3;")
	next, r, err := p.upgrade(h, opts...)
	if err != nil || r.Moved+r.Stayed != 2 || r.Lost != 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	quick.say("a", "4;")
	if _, err := p.u.Upgrade(); !errors.Is(err, ErrReplaced) {
		t.Errorf("upgrade of a replaced process: %v", err)
	}
	if r.Stayed == 1 { // else the bracket was not read yet, and the session moved before it
		if _, err := next.u.Upgrade(); !errors.Is(err, ErrPredecessor) {
			t.Errorf("upgrade beside an old process: %v", err)
		}
	}
	slow.say("]", "2;")
	if err := p.result(); err != nil {
		t.Fatal(err)
	}
	slow.say("a", "3;")
	// The old process has ended: now there may be a third.
	if _, r, err := next.upgrade(h, opts...); err != nil || r.Moved != 2 {
		t.Fatalf("the third process: %+v, %v", r, err)
	}
	quick.say("a", "5;")
	slow.say("a", "4;")
}

// WithDrainLimit ends what does not move.
func TestUpgraderDrainLimit(t *testing.T) {
	started := make(chan struct{}, 1)
	h := func(ctx context.Context, c *Conn) error {
		defer c.Hold()()
		started <- struct{}{}
		<-ctx.Done()
		return nil
	}
	opts := []Option{WithMoveTime(50 * time.Millisecond), WithFreezeTimeout(20 * time.Millisecond), WithDrainLimit(100 * time.Millisecond)}
	p := startUpgrader(t, newFlip(t), h, opts...)
	c := p.dial()
	<-started
	_, r, err := p.upgrade(h, opts...)
	if err != nil || r.Stayed != 1 || r.Moved != 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	if err := p.result(); err != nil {
		t.Fatal(err)
	}
	c.eof()
}

// A session that the program began itself travels too, and can be told from others.
func TestUpgraderClientSessions(t *testing.T) {
	ln, err := ktls.Listen("tcp", "127.0.0.1:0", &ktls.Config{TLS: serverTLS(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	h := func(ctx context.Context, c *Conn) error {
		if !strings.HasPrefix(string(c.State()), "upstream") {
			return echoHandler(ctx, c)
		}
		buf := make([]byte, 100)
		for {
			n, err := c.Read(buf)
			if err != nil {
				return err
			}
			fmt.Fprintf(c, "%s: %s", c.State(), buf[:n])
		}
	}
	p := startUpgrader(t, newFlip(t), h)
	state := []byte("upstream 7")
	if err := p.u.Dial(t.Context(), "tcp", ln.Addr().String(), &ktls.Config{TLS: clientTLS()}, state); err != nil {
		t.Fatal(err)
	}
	clear(state) // it is the caller's again
	srv, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = srv.Close() }()
	say := func(text, want string) {
		t.Helper()
		_ = srv.SetDeadline(time.Now().Add(patience))
		if _, err := io.WriteString(srv, text); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, len(want))
		if _, err := io.ReadFull(srv, buf); err != nil || string(buf) != want {
			t.Fatalf("%q, %v; want %q", buf, err, want)
		}
	}
	say("one", "upstream 7: one")
	_, r, err := p.upgrade(h)
	if err != nil || r.Moved != 1 {
		t.Fatalf("%+v, %v", r, err)
	}
	say("two", "upstream 7: two")
	if err := p.result(); err != nil {
		t.Fatal(err)
	}
	if err := p.u.Dial(t.Context(), "tcp", ln.Addr().String(), &ktls.Config{TLS: clientTLS()}, nil); !errors.Is(err, ErrStopped) {
		t.Errorf("a session for a process that has ended: %v", err)
	}
}

// A session that the program begins before its Upgrader serves waits for that, as do
// those that come before the handlers can be run.
func TestUpgraderAdoptsBeforeItServes(t *testing.T) {
	ln, err := ktls.Listen("tcp", "127.0.0.1:0", &ktls.Config{TLS: serverTLS(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	o := newOptions([]Option{WithLogger(hclog.NewNullLogger())})
	o.embed.defaults()
	u, err := newUpgrader(HandlerFunc(echoHandler), o, newFlip(t))
	if err != nil {
		t.Fatal(err)
	}
	dialed := make(chan error, 1)
	go func() {
		dialed <- u.Dial(t.Context(), "tcp", ln.Addr().String(), &ktls.Config{TLS: clientTLS()}, nil)
	}()
	srv, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = srv.Close() }()
	await(t, "the session waits", func() bool {
		u.h.in.mu.Lock()
		defer u.h.in.mu.Unlock()
		return len(u.h.in.list) == 1
	})
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- u.Serve(ctx) }()
	if err := <-dialed; err != nil {
		t.Fatal(err)
	}
	_ = srv.SetDeadline(time.Now().Add(patience))
	buf := make([]byte, 5)
	if _, err := io.WriteString(srv, "hello"); err != nil {
		t.Error(err)
	} else if _, err := io.ReadFull(srv, buf); err != nil || string(buf) != "hello" {
		t.Errorf("%q, %v", buf, err)
	}
	stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// Nothing stays open of ten upgrades but what is in use.
func TestUpgraderDescriptors(t *testing.T) {
	p := startUpgrader(t, newFlip(t), echoHandler)
	c := p.dial()
	c.say("x", "x")
	before := 0
	for i := range 10 {
		next, _, err := p.upgrade(echoHandler)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.result(); err != nil {
			t.Fatal(err)
		}
		p.flip.closeAll() // the death of a process
		p = next
		if i == 0 {
			before = countFDs(t)
		}
	}
	c.say("x", "x")
	if n := countFDs(t); n > before {
		t.Errorf("%d descriptors after ten upgrades, %d after the first", n, before)
	}
}

// What a handler committed, and what it read and did not, goes along exactly.
func TestUpgraderCommit(t *testing.T) {
	h := func(_ context.Context, c *Conn) error { // answers in words of four bytes
		var buf []byte
		in := make([]byte, 100)
		for {
			n, err := c.Read(in)
			if err != nil {
				return err
			}
			for buf = append(buf, in[:n]...); len(buf) >= 4; buf = buf[4:] {
				words := append(c.State(), 'w')
				if err := c.Commit(4, words, fmt.Appendf(nil, "%d %s;", len(words), buf[:4])); err != nil {
					return err
				}
			}
		}
	}
	p := startUpgrader(t, newFlip(t), h, WithCommit())
	c := p.dial()
	c.say("onceup", "1 once;")
	for i := range 3 {
		next, r, err := p.upgrade(h, WithCommit())
		if err != nil || r.Moved != 1 {
			t.Fatalf("%+v, %v", r, err)
		}
		p = next
		c.say("onup", fmt.Sprint(2+i, " upon;"))
	}
}

// Keys change before and after moves; in the kernel layer that takes secrets that came
// along.
func TestUpgraderKeyUpdate(t *testing.T) {
	if guest.InGuest() {
		guest.NeedKernel(t, 6, 14, "a change of keys")
	}
	p := startUpgrader(t, newFlip(t), echoHandler)
	tcp, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	cli, err := ktls.Client(t.Context(), tcp.(*net.TCPConn), &ktls.Config{Mode: ktls.ModeSoftware, TLS: clientTLS()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cli.Close() }()
	_ = cli.SetDeadline(time.Now().Add(patience))
	c := uclient{&sess{t: t, cli: cli, fd: -1}}
	for i := range 3 {
		for _, ask := range []bool{true, false} {
			if err := cli.KeyUpdate(ask); err != nil {
				t.Fatal(err)
			}
			c.say("under other keys", "under other keys")
		}
		next, r, err := p.upgrade(echoHandler)
		if err != nil || r.Moved != 1 {
			t.Fatalf("upgrade %d: %+v, %v", i, r, err)
		}
		if err := p.result(); err != nil {
			t.Fatal(err)
		}
		p = next
	}
	c.say("at the end", "at the end")
}
