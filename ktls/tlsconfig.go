package ktls

import (
	"crypto/tls"
	"errors"
	"fmt"
	"slices"
	"unicode/utf8"
)

// How a user's tls.Config becomes that of one connection.
//
// A clone for every connection would have session-ticket keys of its own, and no
// session would ever resume. So servers handshake with one base, made once per
// Config, whose GetConfigForClient returns the clone: crypto/tls then takes
// automatic ticket keys from the base, and keys set by SetSessionTicketKeys from
// the clone, which has them from the user's config as it is now.

var errNoTLS = errors.New("Config.TLS is missing")

// serverBase is what tls.Server gets.
func (c *Config) serverBase() (*tls.Config, error) {
	if c.TLS == nil {
		return nil, errNoTLS
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.base == nil || c.baseOf != c.TLS {
		user := c.TLS
		if _, err := allowed(user); err != nil {
			return nil, err
		}
		base := user.Clone()
		base.KeyLogWriter = nil
		base.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			return configForClient(user, hello)
		}
		c.base, c.baseOf = base, user
	}
	return c.base, nil
}

// configForClient is the GetConfigForClient of the base.
func configForClient(user *tls.Config, hello *tls.ClientHelloInfo) (*tls.Config, error) {
	w, ok := hello.Conn.(*wire)
	if !ok {
		return nil, errors.New("handshake over a foreign connection")
	}
	if !utf8.ValidString(hello.ServerName) {
		// Host names are ASCII (RFC 6066 section 3), and the name travels as text.
		return nil, errors.New("the client's server name is not valid text")
	}
	if user.GetConfigForClient != nil {
		theirs := *hello
		theirs.Conn = w.Conn
		cfg, err := user.GetConfigForClient(&theirs)
		if err != nil {
			return nil, err
		}
		if cfg != nil {
			user = cfg
		}
	}
	cfg, err := restrict(user, w)
	if err != nil {
		return nil, err
	}
	cfg.GetConfigForClient = nil
	speaks13 := slices.Contains(hello.SupportedVersions, tls.VersionTLS13) &&
		(cfg.MaxVersion == 0 || cfg.MaxVersion >= tls.VersionTLS13)
	if !speaks13 || softwareWorks() != nil {
		// TLS 1.2: a resumed session's keys are never logged. fips140=only: nothing can
		// tell how many tickets were sent, so none are.
		cfg.SessionTicketsDisabled = true
	}
	return cfg, nil
}

// clientConfig is what tls.Client gets.
func clientConfig(user *tls.Config, w *wire) (*tls.Config, error) {
	if user == nil {
		return nil, errNoTLS
	}
	cfg, err := restrict(user, w)
	if err != nil {
		return nil, err
	}
	if cfg.ClientSessionCache != nil {
		cfg.ClientSessionCache = cache13{cfg.ClientSessionCache}
	}
	return cfg, nil
}

// restrict clones user for one connection, with only what the record layers carry.
func restrict(user *tls.Config, w *wire) (*tls.Config, error) {
	cfg := user.Clone()
	w.keyLog = user.KeyLogWriter
	cfg.KeyLogWriter = keyLogWriter{w}
	cfg.Renegotiation = tls.RenegotiateNever
	limits, err := allowed(user)
	if err != nil {
		return nil, err
	}
	cfg.MinVersion, cfg.CipherSuites = limits.minVersion, limits.suites
	return cfg, nil
}

type tlsLimits struct {
	minVersion uint16
	suites     []uint16 // of TLS 1.2
}

// allowed is what is left of a user's versions and suites.
func allowed(user *tls.Config) (tlsLimits, error) {
	l := tlsLimits{minVersion: max(user.MinVersion, tls.VersionTLS12), suites: suites12(user.CipherSuites)}
	if len(l.suites) == 0 {
		l.minVersion = tls.VersionTLS13
	}
	if user.MaxVersion != 0 && user.MaxVersion < l.minVersion {
		return l, fmt.Errorf("tls.Config allows no version with a usable suite: %w", ErrUnsupportedSuite)
	}
	return l, nil
}

// cache13 passes sessions of TLS 1.3 only: a resumed TLS 1.2 session's keys are never
// logged. Others may use the same cache.
type cache13 struct{ tls.ClientSessionCache }

func (c cache13) Get(key string) (*tls.ClientSessionState, bool) {
	cs, ok := c.ClientSessionCache.Get(key)
	if !ok || !is13(cs) {
		return nil, false
	}
	return cs, true
}

// Put also passes on nil, by which crypto/tls removes a session.
func (c cache13) Put(key string, cs *tls.ClientSessionState) {
	if cs == nil || is13(cs) {
		c.ClientSessionCache.Put(key, cs)
	}
}

func is13(cs *tls.ClientSessionState) bool {
	if cs == nil {
		return false
	}
	_, state, err := cs.ResumptionState()
	if err != nil || state == nil {
		return false
	}
	// SessionState begins with its protocol version (crypto/tls, SessionState.Bytes).
	b, err := state.Bytes()
	return err == nil && len(b) >= 2 && uint16(b[0])<<8|uint16(b[1]) == tls.VersionTLS13
}
