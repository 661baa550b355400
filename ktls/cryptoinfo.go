package ktls

import (
	"crypto/tls"
	"encoding/binary"
	"fmt"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// kernelCipher is one row of the kernel's table of crypto_info structures
// (include/uapi/linux/tls.h): version and cipher, two bytes each in host order,
// then iv, key, salt and rec_seq (8 bytes, big-endian) without padding.
type kernelCipher struct {
	name            string
	id              uint16
	iv, key, salt   int // bytes
	wireIV, wireTag int // bytes a record has beyond header and content: TLS 1.2's explicit nonce, the tag
}

const recSeqLen = 8

var (
	kernelAES128GCM = kernelCipher{name: "AES-128-GCM", id: 51, iv: 8, key: 16, salt: 4, wireIV: 8, wireTag: 16}
	kernelAES256GCM = kernelCipher{name: "AES-256-GCM", id: 52, iv: 8, key: 32, salt: 4, wireIV: 8, wireTag: 16}
	kernelChaCha20  = kernelCipher{name: "ChaCha20-Poly1305", id: 54, iv: 12, key: 32, salt: 0, wireIV: 0, wireTag: 16}
)

// kernelCiphers is in the order in which the probe reports.
var kernelCiphers = []kernelCipher{kernelAES128GCM, kernelAES256GCM, kernelChaCha20}

// infoLen is the exact length the kernel wants for the cipher.
func (c kernelCipher) infoLen() int { return 4 + c.iv + c.key + c.salt + recSeqLen }

// overhead is how many bytes a record is longer than its content.
func (c kernelCipher) overhead(version uint16) uint64 {
	const header = 5
	if version == tls.VersionTLS13 {
		return uint64(header + 1 + c.wireTag) // the inner content type
	}
	return uint64(header + c.wireIV + c.wireTag)
}

// kernelCipherOf maps a suite of the given version to the kernel's cipher.
func kernelCipherOf(version, suite uint16) (kernelCipher, bool) {
	switch version {
	case tls.VersionTLS13:
		switch suite {
		case tls.TLS_AES_128_GCM_SHA256:
			return kernelAES128GCM, true
		case tls.TLS_AES_256_GCM_SHA384:
			return kernelAES256GCM, true
		case tls.TLS_CHACHA20_POLY1305_SHA256:
			return kernelChaCha20, true
		}
	case tls.VersionTLS12:
		switch suite {
		case tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256:
			return kernelAES128GCM, true
		case tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384:
			return kernelAES256GCM, true
		case tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256:
			return kernelChaCha20, true
		}
	}
	return kernelCipher{}, false
}

// cryptoInfo is one direction's keys as the kernel wants them. It holds a secret:
// whoever fills one in wipes it.
type cryptoInfo struct {
	buf [sys.MaxTLSKeyInfo]byte
	n   int
}

func (ci *cryptoInfo) bytes() []byte { return ci.buf[:ci.n] }

func (ci *cryptoInfo) wipe() { clear(ci.buf[:]) }

// pack lays out one direction's keys.
//
// Where the nonce goes depends on cipher and version. ChaCha20: all 12 bytes of
// the write IV are iv (RFC 7905, RFC 8446 section 5.3). TLS 1.3 AES-GCM: the first
// 4 bytes are salt, the other 8 iv. TLS 1.2 AES-GCM (RFC 5288): the 4 implicit
// bytes are salt, and iv is the first explicit nonce, which the kernel counts up
// from there. crypto/tls used the sequence number as explicit nonce for the records
// it sent, so iv must be the next sequence number: anything else could use a nonce
// twice. For receiving, the explicit nonce comes from the record and iv is ignored.
func (ci *cryptoInfo) pack(version, suite uint16, key, iv []byte, seq uint64) error {
	c, ok := kernelCipherOf(version, suite)
	if !ok {
		return fmt.Errorf("%w: %s, %s", ErrUnsupportedSuite, tls.VersionName(version), tls.CipherSuiteName(suite))
	}
	if len(key) != c.key {
		return fmt.Errorf("kernel TLS: key of %d bytes for %s, which has %d", len(key), c.name, c.key)
	}
	implicit := c.salt
	if version == tls.VersionTLS13 || c.id == kernelChaCha20.id {
		implicit = 12
	}
	if len(iv) != implicit {
		return fmt.Errorf("kernel TLS: iv of %d bytes for %s with %s, which has %d", len(iv), c.name, tls.VersionName(version), implicit)
	}
	var recSeq [recSeqLen]byte
	binary.BigEndian.PutUint64(recSeq[:], seq)
	salt, nonce := iv[:c.salt], iv[c.salt:]
	if len(nonce) == 0 {
		nonce = recSeq[:]
	}

	ci.wipe()
	ci.n = c.infoLen()
	b := ci.buf[:0]
	b = binary.NativeEndian.AppendUint16(b, version)
	b = binary.NativeEndian.AppendUint16(b, c.id)
	b = append(b, nonce...)
	b = append(b, key...)
	b = append(b, salt...)
	b = append(b, recSeq[:]...)
	if len(b) != ci.n {
		ci.wipe()
		return fmt.Errorf("kernel TLS: crypto_info of %d bytes for %s, expected %d", len(b), c.name, ci.n)
	}
	return nil
}

// seq is the sequence number of the next record.
func (ci *cryptoInfo) seq() uint64 {
	return binary.BigEndian.Uint64(ci.buf[ci.n-recSeqLen:])
}

// kernelVersion reads what version and cipher a direction of a socket has, without
// touching its key.
func kernelVersion(fd int, dir sys.TLSDirection) (version, cipher uint16, err error) {
	var head [4]byte
	if err := sys.TLSKeys(fd, dir, head[:]); err != nil {
		return 0, 0, err
	}
	return binary.NativeEndian.Uint16(head[:]), binary.NativeEndian.Uint16(head[2:]), nil
}

// load reads a direction's current keys from the kernel. The caller wipes ci.
func (ci *cryptoInfo) load(fd int, dir sys.TLSDirection, c kernelCipher) error {
	ci.wipe()
	ci.n = c.infoLen()
	return sys.TLSKeys(fd, dir, ci.bytes())
}
