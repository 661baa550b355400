package ktls

import (
	"crypto/tls"
	"fmt"
	"time"
)

func (c *Conn) handleKeyUpdate(request byte) error {
	switch {
	case request > 1:
		return c.fail(alertIllegalParameter, fmt.Sprintf("KeyUpdate with request %d", request))
	case len(c.hand) > 0:
		// RFC 8446 section 5.1: what follows is under the next key, so in a new record.
		return c.fail(alertUnexpectedMessage, "KeyUpdate not at the end of its record")
	case !c.layer.canRekey():
		return c.endCleanly(ErrKeyUpdateUnsupported)
	}
	if c.rel == nil {
		c.noteUpdate(request == 1)
		if err := c.layer.rekeyRead(); err != nil {
			return c.fail(alertInternalError, fmt.Sprintf("next receiving key: %v", err))
		}
	}
	c.rxUsed = 0
	c.rxGen++
	if c.asked.Load() > 0 {
		c.asked.Add(^uint32(0))
		c.floods.handshakes-- // we wanted it
	}
	if c.rel != nil {
		c.rel.keyUpdateReceived(request == 1)
		return nil
	}
	if request == 1 {
		// Several requests before the answer is out get one answer (section 4.6.3).
		c.owed.Or(owedUpdate)
		c.answerSoon()
	}
	return nil
}

// answerDelay is how long an answer to a KeyUpdate waits for more requests, when
// nothing is written meanwhile. It is due before the next data (RFC 8446 section
// 4.6.3), and a peer that asks five times in a row wants one.
const answerDelay = 50 * time.Millisecond

// answerSoon makes sure that the answer goes out even if nothing is written or read
// any more.
func (c *Conn) answerSoon() {
	if c.answering.Swap(true) {
		return
	}
	time.AfterFunc(answerDelay, func() {
		c.answering.Store(false)
		c.settle()
	})
}

// keyUpdateMessage is a KeyUpdate (RFC 8446 section 4.6.3).
func keyUpdateMessage(request bool) []byte {
	msg := []byte{msgKeyUpdate, 0, 0, 1, 0}
	if request {
		msg[4] = 1
	}
	return msg
}

func (c *Conn) sendKeyUpdate(request, wait bool) (taken bool, err error) {
	taken, err = c.layer.writeControl(typeHandshake, keyUpdateMessage(request), wait)
	if !taken {
		return false, err
	}
	if rerr := c.layer.rekeyWrite(); rerr != nil {
		// The peer has the KeyUpdate, or will: no record under the old key may follow.
		c.werr = fmt.Errorf("next sending key: %w", rerr)
		return true, c.werr
	}
	c.txUsed = 0
	c.txGen++
	if request {
		c.asked.Add(1)
	}
	return true, err
}

// KeyUpdate goes to the next sending key of a TLS 1.3 session, and asks the peer
// to do the same when requestPeer is set (RFC 8446 section 4.6.3). It happens by
// itself before a key's limit of use. Layers that cannot change keys, and TLS 1.2,
// give an error and stay as they are.
func (c *Conn) KeyUpdate(requestPeer bool) error {
	c.lockWrite()
	defer c.unlockWrite()
	if err := c.flush(); err != nil {
		return err
	}
	if c.rel != nil {
		return c.keyUpdateByRelay(requestPeer)
	}
	if !c.layer.canRekey() {
		return fmt.Errorf("%s over the %s layer cannot change its keys", tls.VersionName(c.p.version), c.layer.kind())
	}
	if _, err := c.sendKeyUpdate(requestPeer, true); err != nil {
		return c.writeFailed(err)
	}
	return nil
}

// usage is what n bytes of plaintext cost of a key's limit: blocks of 16 bytes,
// and for each record two more, for its header's and its tag's.
func usage(n int) uint64 {
	return uint64(n/16) + 2*(uint64(n/maxPlaintext)+1)
}

// keyLimit is how far a key may be used, in blocks. RFC 8446 section 5.5 allows
// AES-GCM 2^24.5 full records, which is 2^34.5 blocks; we change keys at 2^34.
// ChaCha20-Poly1305 has no limit that a sequence number reaches first.
func keyLimit(p params) uint64 {
	if s, err := lookupSuite(p.version, p.suite); err == nil && s.aead == aesGCM {
		return 1 << 34
	}
	return 0
}

// mayUse makes sure that the sending key is good for n more blocks.
func (c *Conn) mayUse(n uint64) error {
	if c.limit == 0 || c.txUsed+n <= c.limit {
		return nil
	}
	if !c.layer.canRekey() {
		return c.endWrite(ErrKeyLimit)
	}
	if c.rel != nil {
		c.rel.want(false)
		return c.writable()
	}
	if _, err := c.sendKeyUpdate(false, true); err != nil {
		return c.writeFailed(err)
	}
	return nil
}
