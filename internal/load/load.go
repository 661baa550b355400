package load

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Options say how many clients there are and what they do. Addr, TLS and
// Sessions are needed, the rest has defaults.
type Options struct {
	Addr     string      // host:port of the echo service
	TLS      *tls.Config // cloned; ServerName is taken from Addr if empty
	Sessions int         // clients, 1 or more

	// Interval is the mean time between two frames of one client, default
	// 100 ms. Each is drawn between 3/4 and 5/4 of it, so that the clients
	// spread.
	Interval time.Duration
	// MinPayload and MaxPayload bound the random payload of a frame in bytes,
	// default 16 and 512, at most 1 MiB. A frame has 20 bytes more.
	MinPayload, MaxPayload int
	// DialConcurrency is how many handshakes run at a time, default 32.
	DialConcurrency int
	// DialTimeout bounds one connect with its handshake, default 30 s.
	DialTimeout time.Duration
	// Progress is told after each client that has connected, one call at a
	// time. It should return soon.
	Progress func(done, total int)
	// Version is tls.VersionTLS12 or tls.VersionTLS13; 0 takes what TLS and
	// the service agree on.
	Version uint16
	// Handshake makes a TLS session of a connection; nil is crypto/tls. It must give
	// io.EOF for close_notify only.
	Handshake func(context.Context, *net.TCPConn, *tls.Config) (Conn, error)
	// KeyUpdateEvery is after how many frames of a client its key is changed, every
	// other time with the service's as well; 0 is never. It needs a Handshake whose
	// Conn has KeyUpdate, and TLS 1.3.
	KeyUpdateEvery uint64
	// StallLimit is how long a frame may wait without any echo coming before
	// its session is counted as lost, default 10 s.
	StallLimit time.Duration
	// Seed makes sizes, contents and times repeatable; 0 draws one.
	Seed uint64
}

const maxPayload = 1 << 20

// Conn is a TLS session of a client.
type Conn interface {
	net.Conn
	CloseWrite() error // close_notify
}

func (o *Options) setDefaults() error {
	host, _, err := net.SplitHostPort(o.Addr)
	if err != nil {
		return fmt.Errorf("load: address %q: %w", o.Addr, err)
	}
	if o.TLS == nil {
		return errors.New("load: Options.TLS is missing; give at least the root certificates")
	}
	if o.Sessions < 1 {
		return fmt.Errorf("load: %d sessions asked for; at least 1 is needed", o.Sessions)
	}
	if o.Interval <= 0 {
		o.Interval = 100 * time.Millisecond
	}
	if o.MinPayload == 0 && o.MaxPayload == 0 {
		o.MinPayload, o.MaxPayload = 16, 512
	}
	if o.MaxPayload == 0 {
		o.MaxPayload = max(o.MinPayload, 512)
	}
	if o.MinPayload < 0 || o.MaxPayload < o.MinPayload || o.MaxPayload > maxPayload {
		return fmt.Errorf("load: payload of %d to %d bytes; 0 to %d is possible", o.MinPayload, o.MaxPayload, maxPayload)
	}
	if o.DialConcurrency <= 0 {
		o.DialConcurrency = 32
	}
	if o.DialTimeout <= 0 {
		o.DialTimeout = 30 * time.Second
	}
	if o.StallLimit <= 0 {
		o.StallLimit = 10 * time.Second
	}
	if o.Seed == 0 {
		o.Seed = rand.Uint64()
	}
	o.TLS = o.TLS.Clone()
	if o.TLS.ServerName == "" {
		o.TLS.ServerName = host
	}
	switch o.Version {
	case 0:
	case tls.VersionTLS12, tls.VersionTLS13:
		o.TLS.MinVersion, o.TLS.MaxVersion = o.Version, o.Version
	default:
		return fmt.Errorf("load: TLS version %#x; 1.2 and 1.3 are possible", o.Version)
	}
	return nil
}

// Start connects all clients and, when the last one is connected, lets them
// send. It fails when any of them cannot connect; then none is left open. When
// ctx ends, Start gives up; a fleet that runs by then is cut off, and sessions
// that still waited for an echo are counted as lost.
//
// The first phase is named "start". The caller must call Stop.
func Start(ctx context.Context, o Options) (*Fleet, error) {
	if err := o.setDefaults(); err != nil {
		return nil, err
	}
	f := &Fleet{
		opts:     o,
		epoch:    time.Now(),
		stopping: make(chan struct{}),
		ended:    make(chan struct{}),
	}
	if err := f.dialAll(ctx); err != nil {
		return nil, err
	}
	f.run(ctx)
	return f, nil
}

// dialAll fills f.clients, or closes what it opened and returns the first
// error.
func (f *Fleet) dialAll(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		wg      sync.WaitGroup
		next    atomic.Int64
		mu      sync.Mutex // guards done, first and calls of Progress
		done    int
		first   error
		clients = make([]*client, f.opts.Sessions)
	)
	for range min(f.opts.DialConcurrency, len(clients)) {
		wg.Go(func() {
			for ctx.Err() == nil {
				i := int(next.Add(1)) - 1
				if i >= len(clients) {
					return
				}
				c, err := f.dial(ctx, i)
				mu.Lock()
				switch {
				case err == nil:
					clients[i] = c
					done++
					if f.opts.Progress != nil {
						f.opts.Progress(done, len(clients))
					}
				case first == nil:
					first = fmt.Errorf("load: client %d of %d cannot connect to %s: %w", i+1, len(clients), f.opts.Addr, err)
					cancel()
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if first == nil && done < len(clients) {
		first = fmt.Errorf("load: stopped after %d of %d clients had connected: %w", done, len(clients), context.Cause(ctx))
	}
	if first != nil {
		for _, c := range clients {
			if c != nil {
				c.raw.Close()
			}
		}
		return first
	}
	f.clients = clients
	return nil
}

func (f *Fleet) dial(ctx context.Context, i int) (*client, error) {
	ctx, cancel := context.WithTimeout(ctx, f.opts.DialTimeout)
	defer cancel()
	var d net.Dialer
	tcp, err := d.DialContext(ctx, "tcp", f.opts.Addr)
	if err != nil {
		return nil, err
	}
	raw := &watchedConn{Conn: tcp}
	if f.opts.Handshake != nil {
		conn, err := f.opts.Handshake(ctx, tcp.(*net.TCPConn), f.opts.TLS)
		if err != nil {
			raw.Close()
			return nil, fmt.Errorf("TLS handshake: %w", err)
		}
		return newClient(f, i, raw, conn), nil
	}
	conn := tls.Client(raw, f.opts.TLS)
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, fmt.Errorf("TLS handshake: %w", err)
	}
	return newClient(f, i, raw, conn), nil
}
