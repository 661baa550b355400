package wire

import (
	"errors"
	"io"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// adoptOf is an ADOPT of session 7 with a socket and a record.
func adoptOf(t *testing.T) (m *Message, record []byte, fd int) {
	t.Helper()
	record, fd = []byte{1, 2, 3}, tcpFD(t)
	return &Message{Type: TypeAdopt, Items: []Item{{Ref: Ref{ID: 7, Epoch: 1}, Socket: fd,
		Cargo: Cargo{Facts: []byte{4}, Record: record}}}}, record, fd
}

func isOpen(fd int) bool {
	_, err := sys.Inode(fd)
	return err == nil
}

func newPair(t *testing.T) (a, b *Channel) {
	t.Helper()
	a, b, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Close(); _ = b.Close() })
	return a, b
}

// Messages go each way in their order, with the sockets and records that they have.
func TestPairCarries(t *testing.T) {
	a, b := newPair(t)
	m, _, _ := adoptOf(t)
	if err := errors.Join(a.Give(m), a.Give(&Message{Type: TypePing, Nonce: 9}), b.Give(&Message{Type: TypePong, Nonce: 8})); err != nil {
		t.Fatal(err)
	}
	got, err := b.Recv()
	if err != nil || got.Type != TypeAdopt || len(got.Items) != 1 || got.Items[0].ID != 7 || !isOpen(got.Items[0].Socket) ||
		string(got.Items[0].Cargo.Record) != "\x01\x02\x03" {
		t.Fatalf("%+v, %v", got, err)
	}
	got.CloseSockets()
	if got, err = b.Recv(); err != nil || got.Nonce != 9 {
		t.Fatalf("%+v, %v", got, err)
	}
	if got, err = a.Recv(); err != nil || got.Nonce != 8 {
		t.Fatalf("%+v, %v", got, err)
	}
}

// What was sent before the end is there; after it comes EOF, and nothing can be sent.
func TestPairEnds(t *testing.T) {
	a, b := newPair(t)
	if err := a.Give(&Message{Type: TypePing, Nonce: 1}); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if m, err := b.Recv(); err != nil || m.Nonce != 1 {
		t.Fatalf("%+v, %v", m, err)
	}
	if m, err := b.Recv(); !errors.Is(err, io.EOF) {
		t.Fatalf("%+v, %v", m, err)
	}
	for _, c := range []struct {
		ch   *Channel
		want error
	}{{b, syscall.EPIPE}, {a, os.ErrClosed}} {
		m, record, fd := adoptOf(t)
		if err := c.ch.Give(m); !errors.Is(err, c.want) {
			t.Errorf("%v, want %v", err, c.want)
		}
		if isOpen(fd) || record[0] != 0 {
			t.Errorf("what could not be sent is still there: open %v, record %x", isOpen(fd), record)
		}
	}
}

// A Recv that waits ends with the channel, and what nobody takes any more is closed.
func TestPairCloses(t *testing.T) {
	a, b := newPair(t)
	ended := make(chan error, 1)
	go func() {
		_, err := b.Recv()
		ended <- err
	}()
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
	c, d := newPair(t)
	m, record, fd := adoptOf(t)
	if err := errors.Join(c.Give(m), d.Close()); err != nil {
		t.Fatal(err)
	}
	if isOpen(fd) || record[0] != 0 {
		t.Errorf("what nobody takes is still there: open %v, record %x", isOpen(fd), record)
	}
	if _, err := a.Recv(); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}

// Over a socket, Give leaves nothing of the message with the sender.
func TestGiveOverSocket(t *testing.T) {
	e := newEnds(t)
	m, record, fd := adoptOf(t)
	if err := errors.Join(e.s.SetWriteDeadline(time.Now().Add(time.Minute)), e.s.Give(m)); err != nil {
		t.Fatal(err)
	}
	if isOpen(fd) || record[0] != 0 {
		t.Errorf("what was sent is still there: open %v, record %x", isOpen(fd), record)
	}
	got, err := e.b.Recv()
	if err != nil || got.Items[0].Cargo.Record[0] != 1 {
		t.Fatalf("%+v, %v", got, err)
	}
	got.CloseSockets()
}
