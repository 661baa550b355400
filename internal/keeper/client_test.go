package keeper

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// fakeKeeper answers HELLO and passes every other request to handle.
func fakeKeeper(t *testing.T, handle func(conn *sys.PacketConn, m *message)) *Client {
	t.Helper()
	a, b, err := sys.PacketPair()
	if err != nil {
		t.Fatal(err)
	}
	conn, err := sys.NewPacketConn(a)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, sys.MaxPacket)
		for {
			n, fds, err := conn.Recv(buf)
			if err != nil {
				return
			}
			sys.CloseAll(fds)
			m, err := decode(buf[:n], len(fds))
			if err != nil {
				t.Error(err)
				return
			}
			if m.Op == opHello {
				answerWith(t, conn, &message{ID: m.ID, Op: opReply, Version: version}, nil)
				continue
			}
			handle(conn, m)
		}
	})
	t.Cleanup(func() {
		_ = conn.Close()
		wg.Wait()
		goleak.VerifyNone(t)
	})
	c, err := Attach(b)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func answerWith(t *testing.T, conn *sys.PacketConn, m *message, fds []int) {
	t.Helper()
	b, err := encode(m)
	if err != nil {
		t.Error(err)
		return
	}
	if err := conn.Send(b, fds); err != nil {
		t.Error(err)
	}
}

func testFD(t *testing.T) int {
	t.Helper()
	fd, err := sys.SealedMemfd("test", []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sys.Close(fd) })
	return fd
}

// A call whose context ends returns at once; descriptors that come for it later
// are closed, and the client goes on.
func TestCallGivesUp(t *testing.T) {
	fd := testFD(t)
	late := make(chan *message, 1)
	c := fakeKeeper(t, func(conn *sys.PacketConn, m *message) {
		entries := []wireEntry{{Kind: m.Kind, ID: 1, FDs: 1}}
		switch m.Op {
		case opGet: // one part of two now, the rest later
			answerWith(t, conn, &message{ID: m.ID, Op: opReply, Entries: entries, More: true}, []int{fd})
			late <- m
		case opList:
			m := <-late
			answerWith(t, conn, &message{ID: m.ID, Op: opReply, Entries: entries}, []int{fd})
			answerWith(t, conn, &message{ID: m.ID + 1, Op: opReply}, nil)
		}
	})
	before := countFDs("self")
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Get(ctx, KindSocket); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("error %v", err)
	}
	if _, err := c.List(context.Background(), KindSocket); err != nil {
		t.Fatal(err)
	}
	if after := countFDs("self"); after != before {
		t.Fatalf("%d descriptors, had %d", after, before)
	}
}

// A keeper that does not read (stopped, say) holds up nobody beyond its context.
func TestKeeperDoesNotRead(t *testing.T) {
	stuck := make(chan struct{})
	c := fakeKeeper(t, func(*sys.PacketConn, *message) { <-stuck })
	defer close(stuck)
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	entry := Entry{Key: Key{Kind: KindBlob}, Meta: make([]byte, MaxMeta)}
	for range 100 {
		if err := c.Put(ctx, entry, entry, entry); err == nil {
			t.Fatal("stored without an answer")
		}
	}
	if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		t.Fatal("gave up early")
	}
}

func TestClose(t *testing.T) {
	asked := make(chan struct{}, 1)
	c := fakeKeeper(t, func(*sys.PacketConn, *message) { asked <- struct{}{} })
	result := make(chan error, 1)
	go func() {
		_, err := c.Lead(context.Background())
		result <- err
	}()
	<-asked
	_ = c.Close()
	if err := <-result; !errors.Is(err, ErrClosed) {
		t.Fatalf("error %v", err)
	}
	if err := c.Yield(context.Background()); !errors.Is(err, ErrClosed) {
		t.Fatalf("error %v", err)
	}
	<-c.Closed()
}

// A failed part of a fetch closes the parts before it.
func TestFetchFailsHalfway(t *testing.T) {
	fd := testFD(t)
	c := fakeKeeper(t, func(conn *sys.PacketConn, m *message) {
		answerWith(t, conn, &message{ID: m.ID, Op: opReply, Entries: []wireEntry{{Kind: m.Kind, FDs: 1}}, More: true}, []int{fd})
		answerWith(t, conn, &message{ID: m.ID, Op: opReply, Failure: failFull}, nil)
	})
	before := countFDs("self")
	if _, err := c.Get(context.Background(), KindSocket); !errors.Is(err, ErrFull) {
		t.Fatalf("error %v", err)
	}
	if after := countFDs("self"); after != before {
		t.Fatalf("%d descriptors, had %d", after, before)
	}
}

func TestAttachToSomethingElse(t *testing.T) {
	fd := testFD(t)
	other, err := sys.Dup(fd)
	if err != nil {
		t.Fatal(err)
	}
	before := countFDs("self")
	if _, err := Attach(other); err == nil {
		t.Fatal("attached to a memory file")
	}
	if after := countFDs("self"); after != before-1 {
		t.Fatalf("%d descriptors, want %d: the channel belongs to Attach", after, before-1)
	}
	goleak.VerifyNone(t)
}
