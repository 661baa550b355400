package ktls

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
)

// Dialer connects and handshakes, as tls.Dialer does. It may be used by several
// goroutines. The zero value of everything but Config is good.
type Dialer struct {
	// NetDialer makes the TCP connections; nil is a net.Dialer's zero value. Its
	// Timeout and Deadline bound connection and handshake together. Multipath TCP is
	// not used, whatever it says, because kernel TLS cannot.
	NetDialer *net.Dialer

	// Config is required. When Config.TLS has no ServerName, the host of the address
	// is taken; when Config.TLS is nil, tls.Config's zero value.
	Config *Config
}

// Dial connects to addr and handshakes as a client.
func Dial(network, addr string, cfg *Config) (*Conn, error) {
	return (&Dialer{Config: cfg}).dial(context.Background(), network, addr)
}

// Dial is DialContext without a context.
func (d *Dialer) Dial(network, addr string) (net.Conn, error) {
	return d.DialContext(context.Background(), network, addr)
}

// DialContext connects to addr over TCP and handshakes as a client, until ctx is done
// or Config.HandshakeTimeout is over. The connection is a *Conn. It fits
// http.Transport's DialTLSContext, if Config.TLS.NextProtos does not offer "h2": see
// package ktls/ktlshttp.
func (d *Dialer) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	c, err := d.dial(ctx, network, addr)
	if err != nil {
		return nil, err // not a *Conn of nil in an interface
	}
	return c, nil
}

func (d *Dialer) dial(ctx context.Context, network, addr string) (*Conn, error) {
	if d.Config == nil {
		return nil, fmt.Errorf("dial %s: no Config", addr)
	}
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Err: err}
	}
	var nd net.Dialer
	if d.NetDialer != nil {
		nd = *d.NetDialer
	}
	nd.SetMultipathTCP(false)
	if nd.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, nd.Timeout)
		defer cancel()
	}
	if !nd.Deadline.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, nd.Deadline)
		defer cancel()
	}
	raw, err := nd.DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	c, err := tcpConn(raw)
	if err != nil {
		return nil, err
	}
	return Client(ctx, c, d.Config.withServerName(host))
}

// withServerName is c, or when it names no server a Config with c's settings that
// does.
func (c *Config) withServerName(host string) *Config {
	conf := c.TLS
	if conf == nil {
		conf = new(tls.Config)
	}
	if c.TLS != nil && conf.ServerName != "" {
		return c
	}
	conf = conf.Clone()
	if conf.ServerName == "" {
		conf.ServerName = host
	}
	return &Config{
		TLS: conf, Mode: c.Mode, RequireRekey: c.RequireRekey, HandshakeTimeout: c.HandshakeTimeout,
		Established: c.Established, OnHandshakeError: c.OnHandshakeError,
	}
}
