package bogo

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// defaultName is the server name that the runner's certificates are for.
const defaultName = "test"

// lasting is what lasts from one connection of a shim to the next: what lets one
// session resume another.
type lasting struct {
	cache  *countingCache
	ticket [32]byte
	began  time.Time
}

// countingCache counts the tickets that were stored.
type countingCache struct {
	tls.ClientSessionCache
	mu     sync.Mutex
	stored int
}

func (c *countingCache) Put(key string, cs *tls.ClientSessionState) {
	c.mu.Lock()
	if cs != nil {
		c.stored++
	}
	c.mu.Unlock()
	c.ClientSessionCache.Put(key, cs)
}

func (c *countingCache) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stored
}

// tlsConfig makes the tls.Config of a connection; later is how many connections of
// this shim came before it.
func (o *options) tlsConfig(l *lasting, later int) (*tls.Config, error) {
	cfg := &tls.Config{
		ServerName:             defaultName,
		MinVersion:             max(o.minVersion, tls.VersionTLS12),
		MaxVersion:             o.maxVersion,
		ClientSessionCache:     l.cache,
		SessionTicketsDisabled: o.noTicket,
	}
	switch {
	case o.noTLS12 && o.noTLS13:
		return nil, errors.New("no version is left")
	case o.noTLS12:
		cfg.MinVersion = tls.VersionTLS13
	case o.noTLS13:
		cfg.MaxVersion = min(cfg.MaxVersion, tls.VersionTLS12)
	}
	if o.hostName != "" {
		cfg.ServerName = o.hostName
	}
	if o.noTicket {
		cfg.ClientSessionCache = nil
	} else {
		cfg.SetSessionTicketKeys([][32]byte{l.ticket})
	}
	if o.resumptionDelay != 0 {
		// A clock that stands still, at a full second: the runner knows the age of a
		// ticket to the millisecond, and crypto/tls when it was stored to the second.
		now := l.began.Add(time.Duration(o.resumptionDelay*later) * time.Second)
		cfg.Time = func() time.Time { return now }
	}
	for _, c := range o.curves {
		cfg.CurvePreferences = append(cfg.CurvePreferences, tls.CurveID(c))
	}
	if err := o.setProtocols(cfg); err != nil {
		return nil, err
	}
	return cfg, o.setCertificates(cfg)
}

func (o *options) setProtocols(cfg *tls.Config) error {
	var err error
	if cfg.NextProtos, err = protocols(o.advertiseALPN); err != nil {
		return err
	}
	if o.selectALPN != "" {
		cfg.NextProtos = []string{o.selectALPN}
	}
	if o.rejectALPN {
		cfg.NextProtos = []string{"none of the peer's"}
	}
	if o.declineALPN {
		cfg.NextProtos = nil
	}
	want, err := protocols(o.expectAdvertisedALPN)
	if err != nil {
		return err
	}
	if want != nil || o.earlyCallback {
		cfg.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			if want != nil && !slices.Equal(hello.SupportedProtos, want) {
				return nil, fmt.Errorf("the client offers the protocols %q, not %q", hello.SupportedProtos, want)
			}
			return nil, nil
		}
	}
	return nil
}

// protocols reads a list of ALPN in the form of the wire (RFC 7301 section 3.1).
func protocols(list string) ([]string, error) {
	var names []string
	for len(list) > 0 {
		n := int(list[0])
		if n == 0 || len(list) < 1+n {
			return nil, fmt.Errorf("malformed list of protocols %q", list)
		}
		names, list = append(names, list[1:1+n]), list[1+n:]
	}
	return names, nil
}

func (o *options) setCertificates(cfg *tls.Config) error {
	if o.certFile != "" || o.keyFile != "" {
		pair, err := tls.LoadX509KeyPair(o.certFile, o.keyFile)
		if err != nil {
			return fmt.Errorf("certificate: %w", err)
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	if o.trustCert != "" {
		pem, err := os.ReadFile(o.trustCert)
		if err != nil {
			return fmt.Errorf("trusted certificate: %w", err)
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return fmt.Errorf("trusted certificate %s: no certificate in it", o.trustCert)
		}
		cfg.ClientCAs = cfg.RootCAs
	}
	switch {
	case o.requireClientCert:
		cfg.ClientAuth = tls.RequireAnyClientCert
	case o.verifyPeer:
		cfg.ClientAuth = tls.VerifyClientCertIfGiven
	}
	return nil
}

// trafficSecrets collects TLS 1.3's first traffic secrets from the lines of a key
// log.
type trafficSecrets struct {
	client, server []byte
}

func (t *trafficSecrets) Write(line []byte) (int, error) {
	f := strings.Fields(string(bytes.TrimSpace(line)))
	if len(f) == 3 {
		secret, err := hex.DecodeString(f[2])
		if err != nil {
			return 0, fmt.Errorf("key log: %w", err)
		}
		switch f[0] {
		case "CLIENT_TRAFFIC_SECRET_0":
			t.client = secret
		case "SERVER_TRAFFIC_SECRET_0":
			t.server = secret
		}
	}
	return len(line), nil
}

// checkHandshake compares what was negotiated with what the runner expects.
func (o *options) checkHandshake(cs tls.ConnectionState) error {
	switch {
	case o.expectVersion != 0 && cs.Version != o.expectVersion:
		return fmt.Errorf("negotiated version %#04x, expected %#04x", cs.Version, o.expectVersion)
	case o.expectALPN != "" && cs.NegotiatedProtocol != o.expectALPN,
		o.selectALPN != "" && cs.NegotiatedProtocol != o.selectALPN,
		o.declineALPN && cs.NegotiatedProtocol != "":
		return fmt.Errorf("negotiated protocol %q", cs.NegotiatedProtocol)
	case o.expectServerName != "" && cs.ServerName != o.expectServerName:
		return fmt.Errorf("server name %q, expected %q", cs.ServerName, o.expectServerName)
	case o.expectCurve != 0 && uint16(cs.CurveID) != o.expectCurve:
		return fmt.Errorf("curve %d, expected %d", cs.CurveID, o.expectCurve)
	case o.expectSessionMiss && cs.DidResume:
		return errors.New("the session was resumed, and should not have been")
	case o.expectHRR && !cs.HelloRetryRequest, o.expectNoHRR && cs.HelloRetryRequest:
		return fmt.Errorf("HelloRetryRequest: %t", cs.HelloRetryRequest)
	}
	return nil
}
