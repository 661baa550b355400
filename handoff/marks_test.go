package handoff

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// withMarks gives a worker memory for marks, n sessions' worth, and returns it.
func withMarks(t *testing.T, p *proc, n int) []atomic.Uint64 {
	t.Helper()
	fd, err := sys.SharedMemfd("marks", int64(8*(n+1)))
	if err != nil {
		t.Fatal(err)
	}
	defer sys.CloseAll([]int{fd})
	mem, err := sys.MapShared(fd, 8*(n+1))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sys.Unmap(mem) })
	p.send(&wire.Message{Type: wire.TypeMarks, File: fd})
	return sys.Words(mem)
}

func awaitWord(t *testing.T, w *atomic.Uint64, want uint64, what string) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for w.Load() != want {
		if time.Now().After(deadline) {
			t.Fatalf("%s: the mark is %#x, want %#x", what, w.Load(), want)
		}
		time.Sleep(time.Millisecond)
	}
}

// The mark of a session says when the handler's own code runs: not while it waits for
// input, and not while it waits for the client to take output.
func TestMarksFollowTheHandler(t *testing.T) {
	goOn := make(chan struct{})
	big := make([]byte, 32<<20)
	p := startProc(t, func(_ context.Context, c *Conn) error {
		<-goOn
		buf := make([]byte, 1)
		if _, err := c.Read(buf); err != nil {
			return err
		}
		<-goOn
		if _, err := c.Write(big); err != nil && !errors.Is(err, ErrMoving) {
			return err
		}
		<-goOn
		return nil
	})
	words := withMarks(t, p, 4)
	s := newSession(t, ktls.ModeSoftware, tls.VersionTLS13)
	e := newEpoch()
	p.adopt(s, e)
	s.epoch = e
	awaitWord(t, &words[1], s.id, "adopted")
	if words[0].Load() != 1 {
		t.Errorf("%d words used, want 1", words[0].Load())
	}
	p.refs(wire.TypeResume, s.own())
	awaitWord(t, &words[1], s.id|wire.MarkHandling, "before the first Read")
	goOn <- struct{}{}
	awaitWord(t, &words[1], s.id, "in Read")
	s.write("x")
	awaitWord(t, &words[1], s.id|wire.MarkHandling, "after Read")
	goOn <- struct{}{}
	awaitWord(t, &words[1], s.id|wire.MarkHandling|wire.MarkWriting, "in Write")
	if _, err := io.CopyN(io.Discard, s.cli, int64(len(big))); err != nil {
		t.Fatal(err)
	}
	awaitWord(t, &words[1], s.id|wire.MarkHandling, "after Write")
	goOn <- struct{}{}
	s.eof()
	p.expectClosed(s, wire.ReasonOwner)
	awaitWord(t, &words[1], 0, "ended")
}

// What another goroutine writes to a session that waits for input is not this
// session's doing; a session that has moved away has no mark; words are used again.
func TestMarksOfOthers(t *testing.T) {
	conns := make(chan *Conn, 8)
	p := startProc(t, func(_ context.Context, c *Conn) error {
		conns <- c
		_, err := c.Read(make([]byte, 1))
		return err
	})
	words := withMarks(t, p, 1)
	s, s2 := newSession(t, ktls.ModeSoftware, tls.VersionTLS13), newSession(t, ktls.ModeSoftware, tls.VersionTLS13)
	p.give(s)
	c := <-conns
	awaitWord(t, &words[1], s.id, "in Read")
	p.give(s2) // has no word
	<-conns
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	s.read("hello")
	awaitWord(t, &words[1], s.id, "written by another goroutine")
	e := p.freeze(s)
	awaitWord(t, &words[1], s.id, "parked")
	p.refs(wire.TypeRelease, s.ref(e))
	awaitWord(t, &words[1], 0, "moved away")
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("a session that has moved away can be read")
	}
	s3 := newSession(t, ktls.ModeSoftware, tls.VersionTLS13)
	p.give(s3)
	awaitWord(t, &words[1], s3.id, "the word's next session")
}

// MARKS that come late, twice or with memory that could shrink end the channel.
func TestMarksThatBreakTheProtocol(t *testing.T) {
	for name, f := range map[string]func(p *proc){
		"twice": func(p *proc) { withMarks(t, p, 4); withMarks(t, p, 4) },
		"late": func(p *proc) {
			p.give(newSession(t, ktls.ModeSoftware, tls.VersionTLS13))
			withMarks(t, p, 4)
		},
		"not sealed": func(p *proc) {
			file, err := os.CreateTemp(t.TempDir(), "marks")
			if err == nil {
				err = file.Truncate(64)
			}
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			p.send(&wire.Message{Type: wire.TypeMarks, File: int(file.Fd())})
		},
		"too small": func(p *proc) { withMarks(t, p, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			p := startProc(t, func(_ context.Context, c *Conn) error {
				_, err := c.Read(make([]byte, 1))
				return err
			})
			f(p)
			p.gone()
		})
	}
}

// gone waits until the worker has closed its end of the channel.
func (p *proc) gone() {
	p.t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case _, ok := <-p.msgs:
			if !ok {
				return
			}
		case <-timeout:
			p.t.Fatal("the worker still talks")
		}
	}
}
