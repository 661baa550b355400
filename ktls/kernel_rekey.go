package ktls

import (
	"bytes"
	"crypto/subtle"
	"crypto/tls"
	"errors"
	"fmt"

	"github.com/ktlsvisor/ktlsvisor/internal/fault"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// Changing keys in the kernel (6.14 and later). Setting a key is not idempotent: the
// kernel takes one that it has for sending a second time, with sequence number 0, and
// would use its nonces again. So a key is only ever set over the one before it, which
// is read first.

// ErrKeyDoubt is a socket that has neither the session's key nor the next one. Nobody
// may go on with it (a nonce could be used twice).
var ErrKeyDoubt = errors.New("the socket's key is none of the session's")

// KeyChanging reports whether this kernel can change a session's keys: TLS 1.3 on
// Linux 6.14 or later.
func KeyChanging() bool { return Probe().Rekey }

// hasKey reports whether ci, as read from a socket, has d's key.
func (ci *cryptoInfo) hasKey(c kernelCipher, d *direction) bool {
	return len(d.key) == c.key && subtle.ConstantTimeCompare(ci.buf[4+c.iv:4+c.iv+c.key], d.key) == 1
}

// keyPosition is where one direction of a socket stands between two keys.
type keyPosition struct {
	next bool   // it has the next one
	seq  uint64 // of the next record
}

// position reads which of two keys a direction of a socket has.
func (p params) position(fd int, dir sys.TLSDirection, cur, next *direction) (keyPosition, error) {
	var ci cryptoInfo
	defer ci.wipe()
	c, ok := kernelCipherOf(p.version, p.suite)
	if !ok {
		return keyPosition{}, ErrUnsupportedSuite
	}
	if err := ci.load(fd, dir, c); err != nil {
		return keyPosition{}, fmt.Errorf("read the key to %s: %w", directionWord(dir), err)
	}
	switch {
	case ci.hasKey(c, cur):
		return keyPosition{seq: ci.seq()}, nil
	case ci.hasKey(c, next):
		return keyPosition{next: true, seq: ci.seq()}, nil
	}
	return keyPosition{}, fmt.Errorf("key to %s: %w", directionWord(dir), ErrKeyDoubt)
}

// replaceKey sets next over cur, and does nothing where next is set already.
func (p params) replaceKey(fd int, dir sys.TLSDirection, cur, next *direction) error {
	at, err := p.position(fd, dir, cur, next)
	if err != nil || at.next {
		return err
	}
	if bytes.Equal(cur.key, next.key) {
		return fmt.Errorf("key to %s: the next one is the same: %w", directionWord(dir), ErrKeyDoubt)
	}
	var ci cryptoInfo
	defer ci.wipe()
	if err := ci.pack(p.version, p.suite, next.key, next.iv, 0); err != nil {
		return err
	}
	if err := fault.At("before-set-key").Err; err != nil {
		return fmt.Errorf("set the next key to %s: %w", directionWord(dir), err)
	}
	if err := sys.SetTLSKeys(fd, dir, ci.bytes()); err != nil {
		return fmt.Errorf("set the next key to %s: %w", directionWord(dir), err)
	}
	fault.Step("after-set-key")
	return nil
}

// rearm lets the kernel go on under the receiving key it has, where it took a record
// for a KeyUpdate that is not a whole one: it looks at the first byte only, which a
// fragment of any message can have. Receiving under a key again uses no nonce.
func (l *kernelLayer) rearm() error {
	return l.control(func(fd int) error {
		var ci cryptoInfo
		defer ci.wipe()
		if err := ci.load(fd, sys.TLSReceive, l.cipher); err != nil {
			return fmt.Errorf("read the key to receive: %w", err)
		}
		if err := sys.SetTLSKeys(fd, sys.TLSReceive, ci.bytes()); err != nil {
			return fmt.Errorf("set the key to receive: %w", err)
		}
		return nil
	})
}

// canRekey: with the secrets this process changes keys by itself, with a relay
// somebody else does.
func (l *kernelLayer) canRekey() bool {
	return l.p.version == tls.VersionTLS13 && (l.relayed || l.secrets != nil && KeyChanging())
}

func (l *kernelLayer) rekeyRead() error {
	if l.secrets == nil {
		return ErrKeyUpdateUnsupported
	}
	return l.rekey(sys.TLSReceive, &l.secrets.rx)
}

func (l *kernelLayer) rekeyWrite() error {
	if l.secrets == nil {
		return ErrKeyUpdateUnsupported
	}
	l.keyUpdateSent()
	if err := l.rekey(sys.TLSSend, &l.secrets.tx); err != nil {
		return err
	}
	l.wire.rekeyed()
	return nil
}

// keyUpdateSent notes where the last record under the old sending key ends.
func (l *kernelLayer) keyUpdateSent() {
	_ = l.control(func(fd int) error {
		l.wire.beforeRekey(fd, l.cipher, l.p.version)
		return nil
	})
}

// rekey sets the next generation of d, and d to it.
func (l *kernelLayer) rekey(dir sys.TLSDirection, d *direction) error {
	suite, err := lookupSuite(l.p.version, l.p.suite)
	if err != nil {
		return err
	}
	next, err := suite.next(d)
	if err != nil {
		return err
	}
	if err := l.control(func(fd int) error { return l.p.replaceKey(fd, dir, d, &next) }); err != nil {
		next.wipe()
		return err
	}
	d.wipe()
	*d = next
	return nil
}
