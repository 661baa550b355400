package bogo

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// Exit codes of a shim.
const (
	exitOK            = 0
	exitFailed        = 1
	exitUnimplemented = 89
)

// patience bounds everything that a shim does; the runner's own limit is 15 s.
const patience = 30 * time.Second

// Shim is one run of the shim: args are the flags that the runner gave, and the
// result is the exit code. What went wrong is one line on stderr, in the words of
// ktls or crypto/tls; testdata/config.json tells the runner which of them means
// what.
func Shim(args []string, stdout, stderr io.Writer) int {
	c, err := parse(args)
	if err == nil {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		err = c.run(ctx, stdout)
	}
	if err == nil {
		return exitOK
	}
	fmt.Fprintln(stderr, err)
	if errors.As(err, new(unimplementedError)) {
		return exitUnimplemented
	}
	return exitFailed
}

func (c *command) run(ctx context.Context, stdout io.Writer) error {
	first, err := c.options(false)
	if err != nil {
		return err
	}
	if first.isHandshakerSupported {
		fmt.Fprintln(stdout, "No")
		return nil
	}
	l := &lasting{began: time.Now().Truncate(time.Second), cache: &countingCache{ClientSessionCache: tls.NewLRUClientSessionCache(0)}}
	copy(l.ticket[:], "one process, one test: any bytes")
	for i := range first.resumeCount + 1 {
		o, err := c.options(i > 0)
		if err != nil {
			return err
		}
		if err := o.connection(ctx, l, i); err != nil {
			return err
		}
	}
	return nil
}

// connection is one connection of a test.
func (o *options) connection(ctx context.Context, l *lasting, later int) error {
	tc, err := o.dial(ctx)
	if err != nil {
		return err
	}
	cfg, err := o.tlsConfig(l, later)
	if err != nil {
		_ = tc.Close()
		return err
	}
	s := &session{options: o, ctx: ctx, cache: l.cache, stored: l.cache.count()}
	cfg.KeyLogWriter = &s.secrets
	kc := &ktls.Config{TLS: cfg, Mode: o.mode, HandshakeTimeout: patience, Established: s.established}
	// The runner reads what a failed handshake has to say while it still writes: the
	// connection must not be reset under it.
	spare, err := duplicate(tc)
	if err != nil {
		_ = tc.Close()
		return err
	}
	defer func() { _ = spare.Close() }()
	if o.server {
		s.conn, err = ktls.Server(ctx, tc, kc)
	} else {
		s.conn, err = ktls.Client(ctx, tc, kc)
	}
	if err == nil {
		err = s.exchange()
	}
	linger(spare)
	if s.conn != nil {
		_ = s.conn.Close()
	}
	return err
}

// dial connects to the runner and says which test this is.
func (o *options) dial(ctx context.Context) (*net.TCPConn, error) {
	host := "127.0.0.1"
	if o.ipv6 {
		host = "::1"
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", net.JoinHostPort(host, o.port))
	if err != nil {
		return nil, err
	}
	tc := c.(*net.TCPConn) // the network is "tcp"
	if _, err := tc.Write(binary.LittleEndian.AppendUint64(nil, o.shimID)); err != nil {
		_ = tc.Close()
		return nil, err
	}
	return tc, nil
}

// duplicate returns a second handle of a connection, which outlives the first.
func duplicate(c *net.TCPConn) (*net.TCPConn, error) {
	f, err := c.File()
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	d, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return d.(*net.TCPConn), nil
}

// linger waits for the runner to have read everything: a connection that is closed
// while there is something unread is reset, and a runner that writes meanwhile
// might never see the alert that says why.
func linger(c *net.TCPConn) {
	_ = c.CloseWrite()
	rc, err := c.SyscallConn()
	if err != nil {
		return
	}
	// Without reading: what comes may be records that a plain read chokes on.
	_ = rc.Control(func(fd uintptr) { _, _ = sys.WaitHangup(int(fd), lingerTime) })
}

// lingerTime is long enough for a runner on a slow machine; most have closed by then.
const lingerTime = time.Second
