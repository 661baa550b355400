package ktls

import (
	"crypto/cipher"
	"crypto/tls"
	"encoding/binary"
	"math"
)

// half seals or opens the records of one direction in this process.
type half struct {
	suite *suiteInfo
	dir   direction
	used  uint64      // of the key's limit, see usage; counted for the journal
	aead  cipher.AEAD // built on first use: an idle session has none
	nonce [nonceLen]byte
	aad   [13]byte
}

func (h *half) init() error {
	if h.aead != nil {
		return nil
	}
	if h.dir.key == nil {
		if err := h.suite.derive(&h.dir); err != nil {
			return err
		}
	}
	a, err := h.suite.newAEAD(h.dir.key)
	if err != nil {
		return err
	}
	h.aead = a
	return nil
}

// setNonce makes the nonce of the next record: XOR with the sequence number
// (RFC 8446 section 5.3, RFC 7905 section 2), or for TLS 1.2 AES-GCM the implicit
// part and the explicit one (RFC 5288 section 3), which when sealing is the
// sequence number, as in crypto/tls and in the kernel.
func (h *half) setNonce(explicit []byte) {
	if h.suite.explicitNonce() {
		copy(h.nonce[:saltLen], h.dir.iv)
		copy(h.nonce[saltLen:], explicit)
		return
	}
	copy(h.nonce[:], h.dir.iv)
	s := binary.BigEndian.Uint64(h.nonce[4:])
	binary.BigEndian.PutUint64(h.nonce[4:], s^h.dir.seq)
}

// setAAD12 makes the additional data of TLS 1.2 (RFC 5246 section 6.2.3.3).
func (h *half) setAAD12(typ recordType, n int) []byte {
	binary.BigEndian.PutUint64(h.aad[:8], h.dir.seq)
	h.aad[8] = byte(typ)
	binary.BigEndian.PutUint16(h.aad[9:], tls.VersionTLS12)
	binary.BigEndian.PutUint16(h.aad[11:], uint16(n))
	return h.aad[:13]
}

// sealedLen is the length on the wire of a record with n bytes of plaintext.
func (h *half) sealedLen(n int) int {
	n += recordHeaderLen + tagLen
	if h.suite.version == tls.VersionTLS13 {
		return n + 1
	}
	if h.suite.explicitNonce() {
		return n + explicitLen
	}
	return n
}

// seal writes one record to out, which must have room for sealedLen(len(p)), and
// uses up a sequence number. It returns the record's length.
func (h *half) seal(out []byte, typ recordType, p []byte) (int, error) {
	if err := h.init(); err != nil {
		return 0, err
	}
	if h.dir.seq == math.MaxUint64 {
		return 0, ErrKeyLimit
	}
	n := h.sealedLen(len(p))
	out[1], out[2] = 3, 3 // legacy_record_version, which is also TLS 1.2's own
	binary.BigEndian.PutUint16(out[3:], uint16(n-recordHeaderLen))
	body := out[recordHeaderLen:n]
	if h.suite.version == tls.VersionTLS13 {
		out[0] = byte(typeData)
		k := copy(body, p)
		body[k] = byte(typ)
		h.setNonce(nil)
		copy(h.aad[:], out[:recordHeaderLen])
		h.aead.Seal(body[:0], h.nonce[:], body[:k+1], h.aad[:recordHeaderLen])
	} else {
		out[0] = byte(typ)
		if h.suite.explicitNonce() {
			binary.BigEndian.PutUint64(body, h.dir.seq)
			h.setNonce(body[:explicitLen])
			body = body[explicitLen:]
		} else {
			h.setNonce(nil)
		}
		h.aead.Seal(body[:0], h.nonce[:], p, h.setAAD12(typ, len(p)))
	}
	h.dir.seq++
	h.used += usage(len(p))
	return n, nil
}

// checkHeader judges a record's header and returns the length of its body.
func (h *half) checkHeader(hdr []byte) (int, *recordError) {
	n := int(binary.BigEndian.Uint16(hdr[3:]))
	if h.suite.version == tls.VersionTLS13 {
		switch {
		case hdr[0] != byte(typeData):
			// Everything is protected by now (RFC 8446 section 5), and a bare
			// ChangeCipherSpec or alert could come from anyone.
			return 0, &recordError{alertUnexpectedMessage, "unprotected record in an established session"}
		case n > maxCiphertext13:
			return 0, &recordError{alertRecordOverflow, "record too long"}
		}
	} else if n > maxCiphertext12 {
		return 0, &recordError{alertRecordOverflow, "record too long"}
	}
	if hdr[1] != 3 || hdr[2] != 3 {
		return 0, &recordError{alertProtocolVersion, "record with another version"}
	}
	return n, nil
}

// open opens one whole record whose header was checked. The plaintext goes to dst
// when it has room for everything (type and padding included), else it replaces
// the ciphertext. It uses up a sequence number only when the record was genuine.
func (h *half) open(rec, dst []byte) (recordType, []byte, error) {
	if err := h.init(); err != nil {
		return 0, nil, err
	}
	if h.dir.seq == math.MaxUint64 {
		return 0, nil, ErrKeyLimit
	}
	body := rec[recordHeaderLen:]
	typ := recordType(rec[0])
	var aad []byte
	if h.suite.version == tls.VersionTLS13 {
		copy(h.aad[:], rec[:recordHeaderLen])
		aad = h.aad[:recordHeaderLen]
		h.setNonce(nil)
		if len(body) < tagLen {
			return 0, nil, errBadMAC
		}
	} else {
		explicit := body
		if h.suite.explicitNonce() {
			if len(body) < explicitLen {
				return 0, nil, errBadMAC
			}
			explicit, body = body[:explicitLen], body[explicitLen:]
		}
		if len(body) < tagLen {
			return 0, nil, errBadMAC
		}
		aad = h.setAAD12(typ, len(body)-tagLen)
		h.setNonce(explicit)
	}
	if len(dst) < len(body)-tagLen {
		dst = body
	}
	plain, err := h.aead.Open(dst[:0], h.nonce[:], body, aad)
	if err != nil {
		return 0, nil, errBadMAC
	}
	if h.suite.version == tls.VersionTLS13 {
		if len(plain) > maxPlaintext+1 {
			return 0, nil, &recordError{alertRecordOverflow, "record with too much plaintext"}
		}
		end := len(plain) - 1
		for end >= 0 && plain[end] == 0 {
			end--
		}
		if end < 0 {
			return 0, nil, &recordError{alertUnexpectedMessage, "record of padding only"}
		}
		typ, plain = recordType(plain[end]), plain[:end]
	} else if len(plain) > maxPlaintext {
		return 0, nil, &recordError{alertRecordOverflow, "record with too much plaintext"}
	}
	h.dir.seq++
	h.used += usage(len(plain))
	return typ, plain, nil
}

var errBadMAC = &recordError{alertBadRecordMAC, "record that does not authenticate"}

// rekey goes to the next generation; the old keys are wiped.
func (h *half) rekey() error {
	next, err := h.suite.next(&h.dir)
	if err != nil {
		return err
	}
	h.dir.wipe()
	h.dir, h.aead = next, nil
	return nil
}

func (h *half) wipe() {
	h.dir.wipe()
	h.aead = nil
	clear(h.nonce[:])
}
