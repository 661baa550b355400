package ktls

import (
	"crypto/tls"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// BenchmarkCommit is one message there and back: with Write, in the software layer also
// with a journal, and with Commit of a state of 64 bytes. The peer's share, and loopback's,
// are in all of them.
func BenchmarkCommit(b *testing.B) {
	for _, layer := range []Layer{LayerSoftware, LayerKernel} {
		for _, how := range []string{"write", "journal", "commit"} {
			for _, size := range []int{100, 16 << 10} {
				if how == "journal" && layer == LayerKernel {
					continue
				}
				b.Run(fmt.Sprintf("%s/%s/%d", layer, how, size), func(b *testing.B) {
					if layer == LayerKernel {
						guest.NeedKernelTLS(b)
					}
					benchmarkCommit(b, layer, how, size)
				})
			}
		}
	}
}

func benchmarkCommit(b *testing.B, layer Layer, how string, size int) {
	mode := ModeSoftware
	if layer == LayerKernel {
		mode = ModeKernel
	}
	a := newTestArenaOf(b, commitArena, 16).a
	client := testClientTLS(b)
	client.MinVersion = tls.VersionTLS13
	c, peer := connect(b, &Config{TLS: testServerTLS(b), Mode: mode}, client)
	_ = c.SetDeadline(time.Time{})
	key := JournalKey{1, 1}
	switch how {
	case "journal":
		p, err := a.Place(key)
		if err == nil {
			err = c.Journal(p)
		}
		if err != nil {
			b.Fatal(err)
		}
	case "commit":
		if _, err := bindCommits(a, c, key, nil); err != nil {
			b.Fatal(err)
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		in, state := make([]byte, 32<<10), make([]byte, 64)
		got := 0
		for {
			n, err := c.Read(in[got:])
			if err != nil {
				return
			}
			if got += n; got < size {
				continue
			}
			if how == "commit" {
				_, err = c.Commit(got, state, in[:got], true)
			} else {
				_, err = c.Write(in[:got])
			}
			if err != nil {
				return
			}
			got = 0
		}
	}()
	msg, back := make([]byte, size), make([]byte, size)
	_ = peer.SetDeadline(time.Time{})
	b.SetBytes(int64(size))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := peer.Write(msg); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(peer, back); err != nil {
			b.Fatal(err)
		}
	}
	_ = peer.NetConn().Close()
	<-done
	_ = c.Close()
}

// BenchmarkCommitAlone is what a message costs that is received, read and committed, with
// a state and an answer, without the record layer's work.
func BenchmarkCommitAlone(b *testing.B) {
	for _, size := range []int{100, 16 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			a := newTestArenaOf(b, commitArena, 16).a
			c, _ := connect(b, &Config{TLS: testServerTLS(b), Mode: ModeSoftware}, testClientTLS(b))
			k, err := a.NewCommits(c, JournalKey{1, 1}, nil, false)
			if err != nil {
				b.Fatal(err)
			}
			buf, state := make([]byte, size), make([]byte, 64)
			sent := uint64(0)
			for b.Loop() {
				for got := 0; got < size; {
					into, err := k.room()
					if err != nil {
						b.Fatal(err)
					}
					n := min(len(into), size-got)
					clear(into[:n]) // stands for the record layer
					k.received(n, len(into))
					got += k.give(buf[got:])
				}
				if _, err := k.commit(size, state, nil, buf, sent); err != nil {
					b.Fatal(err)
				}
				sent += uint64(size)
				k.allSent()
				k.idle()
			}
		})
	}
}
