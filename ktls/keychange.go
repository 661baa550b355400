package ktls

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// Direction is one of a session's two, seen from the owner's end.
type Direction uint8

// The directions.
const (
	Sending   Direction = 1
	Receiving Direction = 2
)

func (d Direction) String() string { return directionWord(d.kernel()) }

func (d Direction) kernel() sys.TLSDirection {
	if d == Sending {
		return sys.TLSSend
	}
	return sys.TLSReceive
}

// Secrets are a session's current traffic secrets, from MarshalSecrets, for whoever
// changes keys on behalf of an owner that has none. TX and RX are empty for TLS 1.2,
// whose keys do not change.
type Secrets struct {
	Version, Suite uint16
	TX, RX         []byte // of the owner's sending and receiving direction
}

// ParseSecrets decodes what MarshalSecrets wrote. The caller wipes the result.
func ParseSecrets(b []byte) (*Secrets, error) {
	var ls ledgerSecrets
	defer func() { ls.TX.wipe(); ls.RX.wipe() }()
	if err := cborDecode.Unmarshal(b, &ls); err != nil {
		return nil, fmt.Errorf("session secrets: %w", err)
	}
	suite, err := lookupSuite(ls.Version, ls.Suite)
	if err != nil {
		return nil, fmt.Errorf("session secrets: %w", err)
	}
	s := &Secrets{Version: ls.Version, Suite: ls.Suite}
	if ls.Version != tls.VersionTLS13 {
		return s, nil
	}
	if ls.TX == nil || ls.RX == nil || len(ls.TX.Secret) != suite.hashLen || len(ls.RX.Secret) != suite.hashLen {
		return nil, errors.New("session secrets: of wrong length")
	}
	s.TX, s.RX = bytes.Clone(ls.TX.Secret), bytes.Clone(ls.RX.Secret)
	return s, nil
}

// Wipe zeroes the secrets.
func (s *Secrets) Wipe() {
	clear(s.TX)
	clear(s.RX)
}

// NextSecret is the traffic secret after a KeyUpdate (RFC 8446 section 7.2).
func NextSecret(suite uint16, secret []byte) ([]byte, error) {
	s, err := lookupSuite(tls.VersionTLS13, suite)
	if err != nil {
		return nil, err
	}
	d, err := s.direction13(bytes.Clone(secret), 0)
	if err != nil {
		return nil, err
	}
	defer d.wipe()
	next, err := s.next(&d)
	if err != nil {
		return nil, err
	}
	clear(next.key)
	clear(next.iv)
	return next.secret, nil
}

// KeyChange is the step of one direction of a TLS 1.3 session in the kernel layer from
// one traffic secret to the next. It works on any duplicate of the session's socket.
type KeyChange struct {
	Suite     uint16
	Direction Direction
	Current   []byte
	Next      []byte
}

func (k *KeyChange) with(f func(p params, cur, next *direction) error) error {
	p := params{version: tls.VersionTLS13, suite: k.Suite}
	suite, err := lookupSuite(p.version, p.suite)
	if err != nil {
		return err
	}
	cur, err := suite.direction13(bytes.Clone(k.Current), 0)
	if err != nil {
		return err
	}
	defer cur.wipe()
	next, err := suite.direction13(bytes.Clone(k.Next), 0)
	if err != nil {
		return err
	}
	defer next.wipe()
	return f(p, &cur, &next)
}

// Position reads from the socket whether the next key is set already, and the sequence
// number of the next record under the key it has. ErrKeyDoubt: it has neither.
func (k *KeyChange) Position(fd int) (next bool, seq uint64, err error) {
	err = k.with(func(p params, cur, nxt *direction) error {
		at, err := p.position(fd, k.Direction.kernel(), cur, nxt)
		next, seq = at.next, at.seq
		return err
	})
	return next, seq, err
}

// Apply sets the next key, unless it is set already. It never sets a key over anything
// but the one before it (ErrKeyDoubt).
func (k *KeyChange) Apply(fd int) error {
	return k.with(func(p params, cur, next *direction) error {
		return p.replaceKey(fd, k.Direction.kernel(), cur, next)
	})
}

// SetSecrets gives an imported session of the kernel layer the secrets that
// MarshalSecrets wrote before it moved, so that this process can change its keys by
// itself. They must be those of the keys in the socket (ErrKeyDoubt). It is called
// before the session is used. In the software layer, and for TLS 1.2, it does nothing.
func (c *Conn) SetSecrets(b []byte) error {
	l, ok := c.layer.(*kernelLayer)
	if !ok || c.p.version != tls.VersionTLS13 {
		return nil
	}
	s, err := ParseSecrets(b)
	if err != nil {
		return err
	}
	if s.Version != c.p.version || s.Suite != c.p.suite {
		s.Wipe()
		return errors.New("session secrets: of another version or suite")
	}
	suite, err := lookupSuite(s.Version, s.Suite)
	if err != nil {
		return err
	}
	kept := &secrets{}
	if kept.tx, err = suite.direction13(s.TX, 0); err != nil {
		return err
	}
	if kept.rx, err = suite.direction13(s.RX, 0); err != nil {
		return err
	}
	err = l.control(func(fd int) error {
		if _, err := c.p.position(fd, sys.TLSSend, &kept.tx, &kept.tx); err != nil {
			return err
		}
		_, err := c.p.position(fd, sys.TLSReceive, &kept.rx, &kept.rx)
		return err
	})
	if err != nil {
		kept.wipe()
		return err
	}
	c.secrets, l.secrets = kept, kept
	return nil
}
