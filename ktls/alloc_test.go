package ktls

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"runtime"
	"testing"
	"time"
)

// softPair is a session with our software layer at both ends.
func softPair(t *testing.T, version uint16) (client, server *Conn) {
	t.Helper()
	c, s := tcpPair(t)
	conf := testClientTLS(t)
	conf.MaxVersion = version
	done := make(chan error, 1)
	go func() {
		var err error
		client, err = Client(context.Background(), c, &Config{TLS: conf, Mode: ModeSoftware})
		done <- err
	}()
	server, err := Server(context.Background(), s, &Config{TLS: testServerTLS(t), Mode: ModeSoftware})
	if cerr := <-done; err != nil || cerr != nil {
		t.Fatalf("server: %v, client: %v", err, cerr)
	}
	t.Cleanup(func() { _, _ = client.Close(), server.Close() })
	for _, conn := range []*Conn{client, server} {
		_ = conn.SetDeadline(time.Now().Add(testWait))
	}
	return client, server
}

// zeros reads as so many zero bytes, and has no WriteTo.
type zeros struct{ left int }

func (z *zeros) Read(p []byte) (int, error) {
	if z.left == 0 {
		return 0, io.EOF
	}
	n := min(len(p), z.left)
	clear(p[:n])
	z.left -= n
	return n, nil
}

// In a session that is under way no record costs an allocation, whichever way it
// goes. What a pool has lost to the garbage collector must be made anew, so some are
// allowed: fewer than one in ten records.
func TestNoAllocationPerRecord(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	const total = 16 << 20
	bulk := func(size int) func(t *testing.T, from, to *Conn) int {
		return func(t *testing.T, from, to *Conn) int {
			received := make(chan error, 1)
			go func() {
				_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.LimitReader(struct{ io.Reader }{to}, total), make([]byte, 64<<10))
				received <- err
			}()
			p := make([]byte, size)
			for range total / size {
				if _, err := from.Write(p); err != nil {
					t.Error(err)
				}
			}
			if err := <-received; err != nil {
				t.Error(err)
			}
			return total / maxPlaintext
		}
	}
	for _, tc := range []struct {
		name string
		work func(t *testing.T, from, to *Conn) (records int)
	}{
		{"writes of 16 KiB", bulk(16 << 10)},
		{"writes of 256 KiB", bulk(256 << 10)},
		{"ping-pong", func(t *testing.T, from, to *Conn) int {
			const n = 2000
			echoed := make(chan error, 1)
			go func() {
				_, err := io.CopyBuffer(struct{ io.Writer }{to}, io.LimitReader(struct{ io.Reader }{to}, n*256), make([]byte, 256))
				echoed <- err
			}()
			p, q := make([]byte, 256), make([]byte, 256)
			for i := range n {
				p[0] = byte(i)
				_, err := from.Write(p)
				if err == nil {
					_, err = io.ReadFull(from, q)
				}
				if err != nil || !bytes.Equal(p, q) {
					t.Fatalf("round trip %d: %v", i, err)
				}
			}
			if err := <-echoed; err != nil {
				t.Error(err)
			}
			return 2 * n
		}},
		{"ReadFrom and WriteTo", func(t *testing.T, from, to *Conn) int {
			sent := make(chan error, 1)
			go func() {
				_, err := from.ReadFrom(&zeros{total})
				sent <- err
				_ = from.CloseWrite()
			}()
			if n, err := to.WriteTo(struct{ io.Writer }{io.Discard}); n != total || err != nil {
				t.Errorf("WriteTo: %d bytes, %v", n, err)
			}
			if err := <-sent; err != nil {
				t.Errorf("ReadFrom: %v", err)
			}
			return total / maxPlaintext
		}},
	} {
		for _, version := range []uint16{tls.VersionTLS13, tls.VersionTLS12} {
			t.Run(tc.name+"/"+tls.VersionName(version), func(t *testing.T) {
				client, server := softPair(t, version)
				if tc.name != "ReadFrom and WriteTo" { // which end the session
					tc.work(t, client, server)
				}
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				records := tc.work(t, client, server)
				runtime.ReadMemStats(&after)
				if n := after.Mallocs - before.Mallocs; n > uint64(records/10) {
					t.Errorf("%d allocations for %d records", n, records)
				}
			})
		}
	}
}
