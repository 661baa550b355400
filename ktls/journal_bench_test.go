package ktls

import (
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
)

// withAndWithout compares a server that keeps a journal with one that does not, in the
// same run; the client is crypto/tls in both.
func withAndWithout(b *testing.B, f func(b *testing.B, server *Conn, client net.Conn)) {
	b.Helper()
	for _, name := range []string{"journal=no", "journal=yes"} {
		b.Run(name, func(b *testing.B) {
			k, tc := connect(b, &Config{TLS: testServerTLS(b), Mode: ModeSoftware}, testClientTLS(b))
			_, _ = k.SetDeadline(never), tc.SetDeadline(never)
			if name == "journal=yes" {
				newTestArena(b).journal(b, k)
			}
			before := cpuTime(b)
			f(b, k, tc)
			b.ReportMetric(float64(cpuTime(b)-before)/float64(b.N), "cpu-ns/op")
			_ = k.Close()
		})
	}
}

// cpuTime is what this process has used, which other load on the machine does not change
// as much as the time of day.
func cpuTime(b *testing.B) int64 {
	b.Helper()
	var ru syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &ru); err != nil {
		b.Fatal(err)
	}
	return ru.Utime.Nano() + ru.Stime.Nano()
}

// BenchmarkJournalPingPong sends 256 bytes there and back.
func BenchmarkJournalPingPong(b *testing.B) {
	withAndWithout(b, func(b *testing.B, server *Conn, client net.Conn) {
		var wg sync.WaitGroup
		wg.Go(func() {
			buf := make([]byte, 4096)
			for {
				n, err := server.Read(buf)
				if err != nil {
					return
				}
				if _, err := server.Write(buf[:n]); err != nil {
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

// BenchmarkJournalWrite is one way in bulk, to a peer that only takes the ciphertext.
func BenchmarkJournalWrite(b *testing.B) {
	withAndWithout(b, func(b *testing.B, server *Conn, client net.Conn) {
		raw := client.(interface{ NetConn() net.Conn }).NetConn()
		p := make([]byte, 64<<10)
		var wg sync.WaitGroup
		wg.Go(func() {
			buf := make([]byte, 1<<20)
			for {
				if _, err := raw.Read(buf); err != nil {
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
		_ = raw.Close()
		wg.Wait()
	})
}

// BenchmarkJournalRead is the other way, from a client of the same make without a
// journal.
func BenchmarkJournalRead(b *testing.B) {
	withAndWithout(b, func(b *testing.B, server *Conn, client net.Conn) {
		p, buf := make([]byte, 64<<10), make([]byte, 64<<10)
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				if _, err := client.Write(p); err != nil {
					return
				}
			}
		})
		b.SetBytes(int64(len(p)))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := io.ReadFull(server, buf); err != nil {
				b.Fatal(err)
			}
		}
		b.StopTimer()
		_ = server.Close()
		wg.Wait()
	})
}

// BenchmarkJournalAdopt is what a journal adds to an adoption and a release.
func BenchmarkJournalAdopt(b *testing.B) {
	k, _ := connect(b, &Config{TLS: testServerTLS(b), Mode: ModeSoftware}, testClientTLS(b))
	ta := newTestArena(b)
	for _, name := range []string{"journal=no", "journal=yes"} {
		b.Run(name, func(b *testing.B) {
			before := cpuTime(b)
			for b.Loop() {
				sock, st, err := k.Detach()
				if err != nil {
					b.Fatal(err)
				}
				if ta.place != nil {
					ta.place.Free()
					ta.place = nil
				}
				facts, err := st.MarshalFacts()
				if err != nil {
					b.Fatal(err)
				}
				record, err := st.MarshalRecord()
				if err != nil {
					b.Fatal(err)
				}
				if k, err = Import(sock, facts, record); err != nil {
					b.Fatal(err)
				}
				if name == "journal=yes" {
					ta.journal(b, k)
				}
			}
			b.ReportMetric(float64(cpuTime(b)-before)/float64(b.N), "cpu-ns/op")
		})
	}
	_ = k.Close()
}

// BenchmarkJournalPublish is what a journal adds to one message there and one back,
// without the socket: a chunk each way, two publications of the receiving register and
// one of the sending.
func BenchmarkJournalPublish(b *testing.B) {
	k, _ := connect(b, &Config{TLS: testServerTLS(b), Mode: ModeSoftware}, testClientTLS(b))
	newTestArena(b).journal(b, k)
	l := k.layer.(*softLayer)
	b.ReportAllocs()
	for b.Loop() {
		l.rx.journalRoom()
		l.rx.j.dirty = true
		l.rx.release()
		l.tx.room(300)
		l.tx.publish()
		l.tx.release()
	}
	_ = k.Close()
}
