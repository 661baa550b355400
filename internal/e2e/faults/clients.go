package faults

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/load"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// The clients of a case:
//
//	busy    send and receive all the time, TLS 1.3 and 1.2; some change their keys
//	idle    say nothing until the end
//	silent  write and do not read, so that everything on the way is full, until the end
//	peers   say nothing either, and are those that close, reset or half-close
const (
	busy13  = 2
	busy12  = 1
	idle    = 2
	silent  = 1
	peers   = 2
	clients = busy13 + busy12 + idle + silent + peers
)

type crowd struct {
	fleets []*load.Fleet
	gate   chan struct{} // closed: the silent ones read
	open   sync.Once
	peers  []*peer
	gone   bool // the peers have left
}

// insecure: the certificate was made in the memory of our own child.
func insecure() *tls.Config { return &tls.Config{InsecureSkipVerify: true} }

func (r *run) connect(ctx context.Context) (*crowd, error) {
	c := &crowd{gate: make(chan struct{})}
	base := load.Options{Addr: r.unit.Addr, TLS: insecure(), StallLimit: 3 * r.Patience, Interval: r.Interval,
		MinPayload: 0, MaxPayload: 4096}
	b13, b12, still, mute := base, base, base, base
	b13.Sessions, b13.Version = busy13, tls.VersionTLS13
	if r.c.Op == Rekey {
		b13.KeyUpdateEvery = 4
		b13.Handshake = func(ctx context.Context, t *net.TCPConn, cfg *tls.Config) (load.Conn, error) {
			return ktls.Client(ctx, t, &ktls.Config{TLS: cfg, Mode: ktls.ModeSoftware})
		}
	}
	b12.Sessions, b12.Version = busy12, tls.VersionTLS12
	still.Sessions, still.Interval = idle, time.Hour
	mute.Sessions, mute.Handshake = silent, c.mute
	mute.MinPayload, mute.MaxPayload, mute.Interval = 8<<10, 32<<10, 2*time.Millisecond
	for _, o := range []load.Options{b13, b12, still, mute} {
		f, err := load.Start(ctx, o)
		if err != nil {
			c.stop(r.Patience)
			return nil, err
		}
		c.fleets = append(c.fleets, f)
	}
	for range peers {
		p, err := dialPeer(r.unit.Addr, r.Patience)
		if err != nil {
			c.stop(r.Patience)
			return nil, err
		}
		c.peers = append(c.peers, p)
	}
	return c, nil
}

// mute makes a connection that writes, and reads only when the gate is open.
func (c *crowd) mute(ctx context.Context, t *net.TCPConn, cfg *tls.Config) (load.Conn, error) {
	if err := errors.Join(t.SetReadBuffer(16<<10), t.SetWriteBuffer(16<<10)); err != nil {
		return nil, err
	}
	conn := tls.Client(noEOF{t}, cfg)
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	return &gated{conn, t, c.gate}, nil
}

type gated struct {
	*tls.Conn
	tcp  *net.TCPConn
	gate chan struct{}
}

func (g *gated) Read(p []byte) (int, error) {
	<-g.gate
	_ = g.tcp.SetReadBuffer(1 << 20) // now quickly
	return g.Conn.Read(p)
}

// noEOF lets crypto/tls give io.EOF for close_notify only.
type noEOF struct{ net.Conn }

func (c noEOF) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// phase begins the time in which a crash may take bytes; whether one did, and the unit
// counted it, is judged later.
func (c *crowd) phase(name string, mayInterrupt bool) {
	for _, f := range c.fleets {
		f.Phase(name, mayInterrupt)
	}
}

// advance waits until the busy clients have had echoes again, of frames sent after now.
func (c *crowd) advance(limit time.Duration) error {
	end := time.Now().Add(limit)
	for _, f := range c.fleets[:2] {
		was := f.Snapshot()
		for {
			s := f.Snapshot()
			if s.Alive == 0 || s.FramesChecked >= was.FramesChecked+3*int64(s.Alive) {
				break
			}
			if time.Now().After(end) {
				return fmt.Errorf("%d busy clients stand still for %v", s.Alive, limit)
			}
			time.Sleep(2 * time.Millisecond)
		}
	}
	return nil
}

// fill waits until the silent ones cannot write any more.
func (c *crowd) fill(limit time.Duration) error {
	f := c.fleets[len(c.fleets)-1]
	var sent int64 = -1
	for end := time.Now().Add(limit); ; time.Sleep(standstill) {
		n := f.Snapshot().FramesSent
		if n == sent {
			return nil
		}
		if sent = n; time.Now().After(end) {
			return fmt.Errorf("a client that does not read can write for %v", limit)
		}
	}
}

// standstill is longer than any pause of a client that can write.
const standstill = 60 * time.Millisecond

// stop ends all clients and adds up what they saw.
func (c *crowd) stop(limit time.Duration) (seen Seen) {
	c.open.Do(func() { close(c.gate) })
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	var wg sync.WaitGroup
	reports := make([]load.Report, len(c.fleets))
	for i, f := range c.fleets {
		wg.Go(func() { reports[i] = f.Stop(ctx) })
	}
	for _, p := range c.peers {
		if err := p.end(c.gone, limit); err != nil {
			seen.Lost++
			seen.Examples = append(seen.Examples, "peer: "+err.Error())
		}
	}
	wg.Wait()
	for _, r := range reports {
		seen.Lost += r.Lost
		seen.Interrupted += r.Interrupted
		seen.Unclean += r.Unclean
		seen.WrongBytes += r.WrongBytes
		seen.Frames += r.FramesChecked
		seen.Examples = append(seen.Examples, r.Examples...)
	}
	return seen
}

// peer is a client whose end is part of the case.
type peer struct {
	tcp  *net.TCPConn
	conn *tls.Conn
}

const hello = "hello"

func dialPeer(addr string, limit time.Duration) (*peer, error) {
	raw, err := net.DialTimeout("tcp", addr, limit)
	if err != nil {
		return nil, err
	}
	p := &peer{tcp: raw.(*net.TCPConn), conn: tls.Client(noEOF{raw}, insecure())}
	if err := p.echo(limit); err != nil {
		_ = raw.Close()
		return nil, err
	}
	return p, nil
}

func (p *peer) echo(limit time.Duration) error {
	_ = p.conn.SetDeadline(time.Now().Add(limit))
	if _, err := io.WriteString(p.conn, hello); err != nil {
		return err
	}
	b := make([]byte, len(hello))
	if _, err := io.ReadFull(p.conn, b); err != nil {
		return err
	}
	if string(b) != hello {
		return fmt.Errorf("%q came back for %q", b, hello)
	}
	return nil
}

// leave ends the session the way that the action says.
func (p *peer) leave(action string) {
	switch action {
	case PeerClose:
		_ = p.conn.Close()
	case PeerReset:
		_ = p.tcp.SetLinger(0)
		_ = p.tcp.Close()
	case PeerHalf:
		_ = p.tcp.CloseWrite()
	}
}

// end is a last echo, and close_notify both ways; of a peer that has left, nothing.
func (p *peer) end(gone bool, limit time.Duration) error {
	defer func() { _ = p.tcp.Close() }()
	if gone {
		return nil
	}
	if err := p.echo(limit); err != nil {
		return err
	}
	if err := p.conn.CloseWrite(); err != nil {
		return err
	}
	if n, err := p.conn.Read(make([]byte, 1)); n > 0 || !errors.Is(err, io.EOF) {
		return fmt.Errorf("%d bytes and %w instead of close_notify", n, err)
	}
	return nil
}
