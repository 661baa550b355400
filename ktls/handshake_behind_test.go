package ktls

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

// What the client sent right behind its Finished belongs to the session, and the
// wrapper must not have read it.
func TestDataBehindFinished(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			c, s := tcpPair(t)
			client := testClientTLS(t)
			client.MaxVersion = version
			// The client's last flight and its first data in one segment.
			held := &holdingConn{Conn: c}
			tc := tls.Client(held, client)
			done := make(chan error, 1)
			go func() {
				if version == tls.VersionTLS13 {
					held.hold = 2 // after the ClientHello
				}
				err := tc.Handshake()
				if err == nil {
					_, err = tc.Write([]byte("eager"))
				}
				if err == nil {
					_, err = tc.Write(pattern(20000))
				}
				done <- errors.Join(err, held.release())
			}()
			conn, err := Server(context.Background(), s, &Config{TLS: testServerTLS(t), Mode: modeOf(layer)})
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 5+20000)
			_ = conn.SetDeadline(time.Now().Add(testWait))
			if _, err := io.ReadFull(conn, got); err != nil || string(got[:5]) != "eager" || !bytes.Equal(got[5:], pattern(20000)) {
				t.Errorf("%s: %.10q, %v", tls.VersionName(version), got, err)
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
			exchange(t, conn, tc)
			_ = conn.Close()
		}
	})
}

// holdingConn collects writes from the hold-th on, until release.
type holdingConn struct {
	net.Conn
	hold, writes int
	held         []byte
}

func (h *holdingConn) Write(p []byte) (int, error) {
	h.writes++
	if h.hold > 0 && h.writes >= h.hold {
		h.held = append(h.held, p...)
		return len(p), nil
	}
	return h.Conn.Write(p)
}

func (h *holdingConn) release() error {
	h.hold = 0
	_, err := h.Conn.Write(h.held)
	h.held = nil
	return err
}

// A handshake message in the same record as the peer's Finished would be lost in
// crypto/tls; its length shows it.
func TestMessageBehindFinished12(t *testing.T) {
	for _, tc := range testSuites {
		if tc.version != tls.VersionTLS12 {
			continue
		}
		info, err := lookupSuite(tc.version, tc.suite)
		if err != nil {
			t.Fatal(err)
		}
		key := direction{key: make([]byte, info.keyLen), iv: make([]byte, info.ivLen())}
		finished := append([]byte{20, 0, 0, 12}, make([]byte, 12)...)
		for name, c := range map[string]struct {
			parts   []string
			records int
			ok      bool
		}{
			"alone":             {[]string{string(finished)}, 1, true},
			"in two records":    {[]string{string(finished[:3]), string(finished[3:])}, 2, true},
			"and a ClientHello": {[]string{string(finished) + "\x01\x00\x00\x00"}, 1, false},
			"half":              {[]string{string(finished[:8])}, 1, false},
			"none":              {nil, 0, false},
		} {
			seal := half{suite: info, dir: key.clone()}
			var a afterCCS
			for _, p := range c.parts {
				rec := make([]byte, seal.sealedLen(len(p)))
				if _, err := seal.seal(rec, typeHandshake, []byte(p)); err != nil {
					t.Fatal(err)
				}
				a.add(recordType(rec[0]), len(rec))
			}
			if ok := a.onlyFinished(info); ok != c.ok || a.recs != c.records {
				t.Errorf("%s: %v, %d records", name, ok, a.recs)
			}
			if a.add(typeAlert, seal.sealedLen(0)); a.onlyFinished(info) {
				t.Errorf("%s: an alert behind it goes unnoticed", name)
			}
		}
	}
}
