package ktls

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"sync"
	"testing"
)

// Each against crypto/tls in the same run; the stock client at the other end is
// the same in both.
func benchServers(b *testing.B, f func(b *testing.B, server net.Conn, client net.Conn)) {
	b.Helper()
	for _, v := range []uint16{tls.VersionTLS13, tls.VersionTLS12} {
		b.Run(tls.VersionName(v), func(b *testing.B) {
			for _, stock := range []bool{false, true} {
				name := "ktls"
				if stock {
					name = "crypto_tls"
				}
				b.Run(name, func(b *testing.B) {
					c, s := tcpPair(b)
					client := testClientTLS(b)
					client.MaxVersion = v
					tc := tls.Client(c, client)
					done := make(chan error, 1)
					go func() { done <- tc.Handshake() }()
					var server net.Conn
					if stock {
						ts := tls.Server(s, testServerTLS(b))
						if err := ts.Handshake(); err != nil {
							b.Fatal(err)
						}
						server = ts
					} else {
						k, err := Server(context.Background(), s, &Config{TLS: testServerTLS(b), Mode: ModeSoftware})
						if err != nil {
							b.Fatal(err)
						}
						server = k
					}
					if err := <-done; err != nil {
						b.Fatal(err)
					}
					_, _ = c.SetDeadline(never), s.SetDeadline(never)
					f(b, server, c)
					_ = server.Close()
				})
			}
		})
	}
}

// BenchmarkWrite is one way to a peer that only takes the ciphertext off the
// socket, so that what is measured is our end.
func BenchmarkWrite(b *testing.B) {
	benchServers(b, func(b *testing.B, server, client net.Conn) {
		p := make([]byte, 64<<10)
		var wg sync.WaitGroup
		wg.Go(func() {
			buf := make([]byte, 1<<20)
			for {
				if _, err := client.Read(buf); err != nil {
					return
				}
			}
		})
		b.SetBytes(int64(len(p)))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := server.Write(p); err != nil {
				b.Fatal(err)
			}
		}
		b.StopTimer()
		_ = client.Close()
		wg.Wait()
	})
}

// BenchmarkHandshake is a full handshake of TLS 1.3, both ends on this machine.
func BenchmarkHandshake(b *testing.B) {
	for _, stock := range []bool{false, true} {
		name := "ktls"
		if stock {
			name = "crypto_tls"
		}
		b.Run(name, func(b *testing.B) {
			ln := listenTCP(b)
			server := testServerTLS(b)
			cfg := &Config{TLS: server, Mode: ModeSoftware}
			client := testClientTLS(b)
			b.ReportAllocs()
			for b.Loop() {
				done := make(chan error, 1)
				var c *tls.Conn
				go func() {
					var err error
					c, err = tls.Dial("tcp4", ln.Addr().String(), client)
					done <- err
				}()
				s, err := ln.AcceptTCP()
				if err != nil {
					b.Fatal(err)
				}
				var conn io.Closer
				if stock {
					ts := tls.Server(s, server)
					err, conn = ts.Handshake(), ts
				} else {
					conn, err = Server(context.Background(), s, cfg)
				}
				if err != nil {
					b.Fatal(err)
				}
				if err := <-done; err != nil {
					b.Fatal(err)
				}
				_ = c.NetConn().(*net.TCPConn).SetLinger(0)
				_, _ = c.Close(), conn.Close()
			}
		})
	}
}

// BenchmarkPingPong sends 256 bytes there and back, with the whole session at
// both ends.
func BenchmarkPingPong(b *testing.B) {
	for _, stock := range []bool{false, true} {
		name := "ktls"
		if stock {
			name = "crypto_tls"
		}
		b.Run(name, func(b *testing.B) {
			var server net.Conn
			var client *tls.Conn
			if stock {
				c, s := tcpPair(b)
				client = tls.Client(c, testClientTLS(b))
				server = tls.Server(s, testServerTLS(b))
				_, _ = c.SetDeadline(never), s.SetDeadline(never)
			} else {
				k, tc := connect(b, &Config{TLS: testServerTLS(b), Mode: ModeSoftware}, testClientTLS(b))
				_, _ = k.SetDeadline(never), tc.SetDeadline(never)
				server, client = k, tc
			}
			var wg sync.WaitGroup
			wg.Go(func() {
				buf := make([]byte, 256)
				for {
					if _, err := io.ReadFull(server, buf); err != nil {
						return
					}
					if _, err := server.Write(buf); err != nil {
						return
					}
				}
			})
			buf := make([]byte, 256)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := client.Write(buf); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(client, buf); err != nil {
					b.Fatal(err)
				}
			}
			b.StopTimer()
			_ = client.Close()
			wg.Wait()
		})
	}
}
