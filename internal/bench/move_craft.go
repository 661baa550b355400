package bench

import (
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/ktlsvisor/ktlsvisor/internal/supervise"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// Sessions of this benchmark have no handshake: both ends make the same keys of the
// client's address, so thousands of them are there at once, and a client is a socket
// until it is to show that its session lives.
const (
	craftVersion = tls.VersionTLS13
	craftSuite   = tls.TLS_AES_128_GCM_SHA256
)

// craftEncoding writes the keys of maps in their order, as ktls does.
var craftEncoding = func() cbor.EncMode {
	m, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		panic(err) // constant options
	}
	return m
}()

// craftSecret is one of a session's secrets, or its id.
func craftSecret(what string, client net.Addr) []byte {
	h := sha256.Sum256([]byte(what + " " + client.String()))
	return h[:]
}

// crafted is what ktls.Import takes, as the keys of its encodings stand in
// handoff/PROTOCOL.md and ktls.
func crafted(client, local, remote net.Addr, isClient, kernel bool) (facts, record, secrets []byte, err error) {
	id := craftSecret("id", client)[:16]
	send, receive := craftSecret("server", client), craftSecret("client", client)
	if isClient {
		send, receive = receive, send
	}
	layer := 0
	if kernel {
		layer = 1
	}
	f := map[int]any{1: 1, 2: id, 3: craftVersion, 4: craftSuite, 6: layer, 20: local.String(), 21: remote.String()}
	if isClient {
		f[5] = true
	}
	r := map[int]any{1: 1, 2: id, 3: layer}
	if !kernel {
		r[4], r[5] = map[int]any{1: send}, map[int]any{1: receive}
	}
	if facts, err = craftEncoding.Marshal(f); err != nil {
		return nil, nil, nil, err
	}
	if record, err = craftEncoding.Marshal(r); err != nil {
		return nil, nil, nil, err
	}
	if kernel {
		secrets, err = craftEncoding.Marshal(map[int]any{1: 1, 2: id, 3: craftVersion, 4: craftSuite,
			5: map[int]any{1: send}, 6: map[int]any{1: receive}})
	}
	return facts, record, secrets, err
}

// craftServer takes the place of a handshake in the supervisor.
func craftServer(kernel bool) func(c *net.TCPConn) (*supervise.Crafted, error) {
	return func(c *net.TCPConn) (*supervise.Crafted, error) {
		client := c.RemoteAddr()
		if err := greet(c); err != nil {
			return nil, err
		}
		if kernel {
			if err := craftKernel(c, client); err != nil {
				return nil, err
			}
		}
		k := &supervise.Crafted{Version: craftVersion, Suite: craftSuite}
		var err error
		k.Facts, k.Record, k.Secrets, err = crafted(client, c.LocalAddr(), client, false, kernel)
		return k, err
	}
}

// greet is what there is of a handshake: a byte each way, so that the positions in the
// streams are not those of a connection that was never used. The client's is in openThin.
func greet(c *net.TCPConn) error {
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	b := []byte{0}
	if _, err := c.Read(b); err != nil {
		return err
	}
	if _, err := c.Write(b); err != nil {
		return err
	}
	return c.SetDeadline(time.Time{})
}

// craftClient makes a session of a client's socket.
func craftClient(c *net.TCPConn) (*ktls.Conn, error) {
	facts, record, _, err := crafted(c.LocalAddr(), c.LocalAddr(), c.RemoteAddr(), true, false)
	if err != nil {
		return nil, err
	}
	return ktls.Import(c, facts, record)
}

// craftKernel gives the kernel the keys of both directions.
func craftKernel(c *net.TCPConn, client net.Addr) error {
	rc, err := c.SyscallConn()
	if err != nil {
		return err
	}
	cerr := rc.Control(func(fd uintptr) {
		if err = sys.AttachTLS(int(fd)); err != nil {
			return
		}
		for _, d := range []struct {
			dir  sys.TLSDirection
			what string
		}{{sys.TLSSend, "server"}, {sys.TLSReceive, "client"}} {
			var info []byte
			if info, err = cryptoInfo(craftSecret(d.what, client)); err != nil {
				return
			}
			if err = sys.SetTLSKeys(int(fd), d.dir, info); err != nil {
				err = fmt.Errorf("kernel keys: %w", err)
				return
			}
		}
	})
	if cerr != nil {
		return cerr
	}
	return err
}

// cryptoInfo is struct tls12_crypto_info_aes_gcm_128 of the kernel's linux/tls.h for
// TLS 1.3: version, cipher, then iv, key, salt and the sequence number, 0.
func cryptoInfo(secret []byte) ([]byte, error) {
	key, err := expandLabel(secret, "key", 16)
	if err != nil {
		return nil, err
	}
	iv, err := expandLabel(secret, "iv", 12)
	if err != nil {
		return nil, err
	}
	info := []byte{0x04, 0x03, 51, 0} // host order: little-endian machines only
	info = append(info, iv[4:]...)
	info = append(info, key...)
	info = append(info, iv[:4]...)
	return append(info, make([]byte, 8)...), nil
}

// expandLabel is HKDF-Expand-Label (RFC 8446 section 7.1) with an empty context.
func expandLabel(secret []byte, label string, n int) ([]byte, error) {
	var info strings.Builder
	info.Write([]byte{byte(n >> 8), byte(n), byte(len("tls13 ") + len(label))})
	info.WriteString("tls13 " + label)
	info.WriteByte(0)
	return hkdf.Expand(sha256.New, secret, info.String(), n)
}
