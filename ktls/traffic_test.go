package ktls

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// Random traffic both ways with a stock client, while the session moves again and
// again, at whatever byte it is: every byte arrives once and in order.
func TestTrafficAcrossMoves(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			t.Run(tls.VersionName(version), func(t *testing.T) {
				seed := uint64(time.Now().UnixNano())
				t.Logf("seed %d", seed)
				rnd := rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // a test's choices
				client := testClientTLS(t)
				client.MaxVersion = version
				conn, peer := connect(t, &Config{TLS: testServerTLS(t), Mode: modeOf(layer)}, client)

				total, moves := 2<<20, 0
				if guest.InGuest() {
					total = 128 << 10
				}
				data := make([]byte, total)
				for i := range data {
					data[i] = byte(rnd.Uint32())
				}
				sizes := make([]int, 0, 1024)
				for sum := 0; sum < total; {
					n := min(1+rnd.IntN(1<<rnd.IntN(16)), total-sum)
					sizes = append(sizes, n)
					sum += n
				}
				var wg sync.WaitGroup
				wg.Go(func() {
					off := 0
					for _, n := range sizes {
						if _, err := peer.Write(data[off : off+n]); err != nil {
							t.Errorf("client write: %v", err)
							return
						}
						off += n
					}
				})
				wg.Go(func() {
					got := make([]byte, total)
					if n, err := io.ReadFull(peer, got); err != nil || !bytes.Equal(got, data) {
						t.Errorf("client read %d of %d bytes, %v; equal: %v", n, total, err, bytes.Equal(got[:n], data[:n]))
					}
				})

				buf := make([]byte, 5000) // the kernel would fill a larger one, and there would be few moves
				echoed := 0
				for echoed < total {
					_ = conn.SetReadDeadline(time.Now().Add(time.Duration(rnd.IntN(3000)) * time.Microsecond))
					n, err := conn.Read(buf[:1+rnd.IntN(len(buf))])
					if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
						t.Fatalf("read after %d bytes, %d moves: %v", echoed, moves, err)
					}
					if rnd.IntN(4) == 0 && n > 0 { // not used: it goes back
						back := rnd.IntN(n) + 1
						conn.Unread(buf[n-back : n])
						n -= back
					}
					out := buf[:n]
					echoed += n
					for len(out) > 0 {
						if rnd.IntN(4) == 0 {
							if err := conn.QueueWrite(out); err != nil {
								t.Fatal(err)
							}
							break
						}
						_ = conn.SetWriteDeadline(time.Now().Add(time.Duration(rnd.IntN(2000)) * time.Microsecond))
						k, err := conn.Write(out)
						out = out[k:]
						if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
							t.Fatalf("write after %d bytes, %d moves: %v", echoed, moves, err)
						}
						if rnd.IntN(2) == 0 {
							conn = move(t, conn)
							moves++
						}
					}
					if version == tls.VersionTLS13 && layer == LayerSoftware && rnd.IntN(20) == 0 {
						_ = conn.SetWriteDeadline(time.Now().Add(testWait))
						if err := conn.KeyUpdate(rnd.IntN(2) == 0); err != nil {
							t.Fatal(err)
						}
					}
					if rnd.IntN(3) == 0 {
						conn = move(t, conn)
						moves++
					}
				}
				_ = conn.SetWriteDeadline(time.Now().Add(testWait))
				if err := conn.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				wg.Wait()
				_ = peer.Close()
				_ = conn.SetReadDeadline(time.Now().Add(testWait))
				if n, err := conn.Read(buf); n != 0 || err != io.EOF {
					t.Errorf("at the end: %d, %v", n, err)
				}
				if moves < 10 {
					t.Errorf("only %d moves", moves)
				}
				t.Logf("%d bytes, %d moves", total, moves)
			})
		}
	})
}
