package ktls

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"errors"
	"fmt"
	"hash"
	"sync"

	"golang.org/x/crypto/chacha20poly1305"
)

type aeadKind uint8

const (
	aesGCM aeadKind = iota
	chaCha
)

// suiteInfo is one cipher suite in one version of TLS.
type suiteInfo struct {
	id      uint16
	version uint16
	aead    aeadKind
	keyLen  int
	hash    func() hash.Hash
	hashLen int
}

const (
	tagLen   = 16 // both AEADs
	nonceLen = 12
	saltLen  = 4 // implicit nonce of TLS 1.2 AES-GCM (RFC 5288 section 3)
	// explicitLen is the nonce part sent in each TLS 1.2 AES-GCM record.
	explicitLen = 8
)

var suites = [...]suiteInfo{
	{tls.TLS_AES_128_GCM_SHA256, tls.VersionTLS13, aesGCM, 16, sha256.New, 32},
	{tls.TLS_AES_256_GCM_SHA384, tls.VersionTLS13, aesGCM, 32, sha512.New384, 48},
	{tls.TLS_CHACHA20_POLY1305_SHA256, tls.VersionTLS13, chaCha, 32, sha256.New, 32},
	{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.VersionTLS12, aesGCM, 16, sha256.New, 32},
	{tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, tls.VersionTLS12, aesGCM, 16, sha256.New, 32},
	{tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.VersionTLS12, aesGCM, 32, sha512.New384, 48},
	{tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, tls.VersionTLS12, aesGCM, 32, sha512.New384, 48},
	{tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.VersionTLS12, chaCha, 32, sha256.New, 32},
	{tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256, tls.VersionTLS12, chaCha, 32, sha256.New, 32},
}

// lookupSuite finds a suite of a version, or gives ErrUnsupportedSuite.
func lookupSuite(version, id uint16) (*suiteInfo, error) {
	if s := findSuite(id); s != nil && s.version == version {
		return s, nil
	}
	return nil, fmt.Errorf("%s with %s: %w", tls.VersionName(version), tls.CipherSuiteName(id), ErrUnsupportedSuite)
}

// findSuite is nil for a suite we do not have. None is of two versions.
func findSuite(id uint16) *suiteInfo {
	for i := range suites {
		if suites[i].id == id {
			return &suites[i]
		}
	}
	return nil
}

// suites12 are the ids offered for TLS 1.2, restricted to allowed when that is
// not nil.
func suites12(allowed []uint16) []uint16 {
	var ids []uint16
	for i := range suites {
		if suites[i].version != tls.VersionTLS12 {
			continue
		}
		if allowed == nil {
			ids = append(ids, suites[i].id)
			continue
		}
		for _, a := range allowed {
			if a == suites[i].id {
				ids = append(ids, a)
			}
		}
	}
	return ids
}

// explicitNonce reports whether records carry the second part of their nonce.
func (s *suiteInfo) explicitNonce() bool { return s.version == tls.VersionTLS12 && s.aead == aesGCM }

// ivLen is the length of direction.iv.
func (s *suiteInfo) ivLen() int {
	if s.explicitNonce() {
		return saltLen
	}
	return nonceLen
}

// newAEAD fails with ErrNoSoftware under GODEBUG=fips140=only, which refuses
// AES-GCM with nonces that the module did not make itself.
func (s *suiteInfo) newAEAD(key []byte) (cipher.AEAD, error) {
	if s.aead == chaCha {
		return chacha20poly1305.New(key)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	a, err := cipher.NewGCM(block)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoSoftware, err)
	}
	return a, nil
}

// softwareWorks says whether AEADs can be made at all in this process. GODEBUG's
// fips140 setting is fixed when it starts.
var softwareWorks = sync.OnceValue(func() error {
	_, err := suites[0].newAEAD(make([]byte, suites[0].keyLen))
	return err
})

// expandLabel is HKDF-Expand-Label with an empty context (RFC 8446 section 7.1) from
// the secret that mac is keyed with, for at most the hash's length: that is one step
// of HKDF-Expand (RFC 5869 section 2.3).
func expandLabel(mac hash.Hash, label string, n int) []byte {
	var buf [32]byte
	info := append(buf[:0], byte(n>>8), byte(n), byte(len("tls13 ")+len(label)))
	info = append(info, "tls13 "...)
	info = append(info, label...)
	info = append(info, 0, 1)
	mac.Reset()
	mac.Write(info)
	out := mac.Sum(nil)
	clear(out[n:])
	return out[:n:n]
}

// direction13 derives a direction from a TLS 1.3 traffic secret, which it takes
// over (RFC 8446 section 7.3).
func (s *suiteInfo) direction13(secret []byte, seq uint64) (direction, error) {
	if len(secret) != s.hashLen {
		return direction{}, fmt.Errorf("traffic secret of %d bytes, %d expected", len(secret), s.hashLen)
	}
	mac := hmac.New(s.hash, secret)
	return direction{secret: secret, key: expandLabel(mac, "key", s.keyLen), iv: expandLabel(mac, "iv", nonceLen), seq: seq}, nil
}

// derive completes a direction of which there is only the secret (TLS 1.3).
func (s *suiteInfo) derive(d *direction) error {
	full, err := s.direction13(d.secret, d.seq)
	if err == nil {
		*d = full
	}
	return err
}

// next is the following generation of a TLS 1.3 direction (RFC 8446 section 7.2).
func (s *suiteInfo) next(d *direction) (direction, error) {
	if s.version != tls.VersionTLS13 {
		return direction{}, errors.New("TLS 1.2 keys have no next generation")
	}
	return s.direction13(expandLabel(hmac.New(s.hash, d.secret), "traffic upd", s.hashLen), 0)
}

// directions12 derives both directions of a TLS 1.2 session from its master
// secret (RFC 5246 section 6.3, RFC 5288 section 3, RFC 7905 section 2).
func (s *suiteInfo) directions12(master, clientRandom, serverRandom []byte) (client, server direction) {
	seed := make([]byte, 0, 13+64)
	seed = append(seed, "key expansion"...)
	seed = append(seed, serverRandom...)
	seed = append(seed, clientRandom...)
	iv := s.ivLen()
	block := make([]byte, 2*s.keyLen+2*iv)
	s.prf12(block, master, seed)
	cut := func(n int) []byte {
		b := append([]byte(nil), block[:n]...)
		clear(block[:n])
		block = block[n:]
		return b
	}
	client.key, server.key = cut(s.keyLen), cut(s.keyLen)
	client.iv, server.iv = cut(iv), cut(iv)
	return client, server
}

// prf12 is P_hash (RFC 5246 section 5) with the suite's hash.
func (s *suiteInfo) prf12(out, secret, seed []byte) {
	h := hmac.New(s.hash, secret)
	h.Write(seed)
	a := h.Sum(nil)
	for len(out) > 0 {
		h.Reset()
		h.Write(a)
		h.Write(seed)
		out = out[copy(out, h.Sum(nil)):]
		h.Reset()
		h.Write(a)
		a = h.Sum(nil)
	}
}
