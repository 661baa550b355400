package ktls

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"strings"
	"testing"
)

// The bytes are written out from the structures in include/uapi/linux/tls.h, not
// computed, so that a changed offset shows here; TestKernelOpensWhatGoSealed shows
// it on a kernel.
func TestCryptoInfoGolden(t *testing.T) {
	const (
		key16 = "000102030405060708090a0b0c0d0e0f"
		key32 = key16 + "101112131415161718191a1b1c1d1e1f"
		iv12  = "a0a1a2a3b0b1b2b3b4b5b6b7"
		iv4   = "a0a1a2a3"
		seq   = 0x0102030405060708
		seqBE = "0102030405060708"
	)
	for _, tc := range []struct {
		name           string
		version, suite uint16
		key, iv        string
		cipher         uint16
		want           string // after version and cipher, which are in host order
	}{
		{"1.3 AES-128-GCM", tls.VersionTLS13, tls.TLS_AES_128_GCM_SHA256, key16, iv12, 51,
			"b0b1b2b3b4b5b6b7" + key16 + "a0a1a2a3" + seqBE},
		{"1.3 AES-256-GCM", tls.VersionTLS13, tls.TLS_AES_256_GCM_SHA384, key32, iv12, 52,
			"b0b1b2b3b4b5b6b7" + key32 + "a0a1a2a3" + seqBE},
		{"1.3 ChaCha20-Poly1305", tls.VersionTLS13, tls.TLS_CHACHA20_POLY1305_SHA256, key32, iv12, 54,
			"a0a1a2a3b0b1b2b3b4b5b6b7" + key32 + seqBE},
		{"1.2 RSA AES-128-GCM", tls.VersionTLS12, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, key16, iv4, 51,
			seqBE + key16 + "a0a1a2a3" + seqBE},
		{"1.2 ECDSA AES-128-GCM", tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, key16, iv4, 51,
			seqBE + key16 + "a0a1a2a3" + seqBE},
		{"1.2 RSA AES-256-GCM", tls.VersionTLS12, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, key32, iv4, 52,
			seqBE + key32 + "a0a1a2a3" + seqBE},
		{"1.2 ECDSA AES-256-GCM", tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, key32, iv4, 52,
			seqBE + key32 + "a0a1a2a3" + seqBE},
		{"1.2 RSA ChaCha20-Poly1305", tls.VersionTLS12, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256, key32, iv12, 54,
			"a0a1a2a3b0b1b2b3b4b5b6b7" + key32 + seqBE},
		{"1.2 ECDSA ChaCha20-Poly1305", tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, key32, iv12, 54,
			"a0a1a2a3b0b1b2b3b4b5b6b7" + key32 + seqBE},
	} {
		t.Run(tc.name, func(t *testing.T) {
			want := binary.NativeEndian.AppendUint16(nil, tc.version)
			want = binary.NativeEndian.AppendUint16(want, tc.cipher)
			want = append(want, unhex(t, tc.want)...)
			var ci cryptoInfo
			if err := ci.pack(tc.version, tc.suite, unhex(t, tc.key), unhex(t, tc.iv), seq); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(ci.bytes(), want) {
				t.Errorf("got  %x\nwant %x", ci.bytes(), want)
			}
			if ci.seq() != seq {
				t.Errorf("sequence number %x read back, %x packed", ci.seq(), seq)
			}
			ci.wipe()
			if !bytes.Equal(ci.buf[:], make([]byte, len(ci.buf))) {
				t.Error("wipe left something")
			}
		})
	}
}

func TestCryptoInfoRefuses(t *testing.T) {
	const v12, v13 = tls.VersionTLS12, tls.VersionTLS13
	for _, tc := range []struct {
		name           string
		version, suite uint16
		key, iv        int
		want           string
	}{
		{"suite without AEAD", v12, tls.TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA, 16, 4, "AES_128_CBC"},
		{"1.3 suite in 1.2", v12, tls.TLS_AES_128_GCM_SHA256, 16, 4, "TLS 1.2"},
		{"1.2 suite in 1.3", v13, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, 16, 12, "TLS 1.3"},
		{"TLS 1.1", tls.VersionTLS11, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, 16, 4, "TLS 1.1"},
		{"short key", v13, tls.TLS_AES_256_GCM_SHA384, 16, 12, "key of 16 bytes"},
		{"long key", v13, tls.TLS_AES_128_GCM_SHA256, 32, 12, "key of 32 bytes"},
		{"no key", v13, tls.TLS_CHACHA20_POLY1305_SHA256, 0, 12, "key of 0 bytes"},
		{"1.3 iv in 1.2", v12, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, 16, 12, "iv of 12 bytes"},
		{"1.2 iv in 1.3", v13, tls.TLS_AES_128_GCM_SHA256, 16, 4, "iv of 4 bytes"},
		{"GCM iv for ChaCha", v12, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256, 32, 4, "iv of 4 bytes"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var ci cryptoInfo
			err := ci.pack(tc.version, tc.suite, make([]byte, tc.key), make([]byte, tc.iv), 0)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, expected an error with %q", err, tc.want)
			}
			if _, ok := kernelCipherOf(tc.version, tc.suite); !ok && !errors.Is(err, ErrUnsupportedSuite) {
				t.Errorf("%v is not ErrUnsupportedSuite", err)
			}
		})
	}
}

// Record lengths decide when everything sealed has reached TCP.
func TestKernelRecordOverhead(t *testing.T) {
	for _, tc := range []struct {
		version uint16
		c       kernelCipher
		want    uint64
	}{
		{tls.VersionTLS13, kernelAES128GCM, 22},
		{tls.VersionTLS13, kernelAES256GCM, 22},
		{tls.VersionTLS13, kernelChaCha20, 22},
		{tls.VersionTLS12, kernelAES128GCM, 29},
		{tls.VersionTLS12, kernelAES256GCM, 29},
		{tls.VersionTLS12, kernelChaCha20, 21},
	} {
		if got := tc.c.overhead(tc.version); got != tc.want {
			t.Errorf("%s %s: %d, want %d", tls.VersionName(tc.version), tc.c.name, got, tc.want)
		}
	}
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
