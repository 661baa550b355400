package ktls

import (
	"errors"
	"os"
	"sync"
	"syscall"
	"time"
)

// What the owner has written when the session moves.
var writeMoments = []moment{
	{name: "written and unread by the peer", run: func(m *mover) {
		m.write([]byte("before "))
		m.move()
		m.write([]byte("after"))
		m.peerGets(func() {})
		m.works()
	}},
	{name: "send buffer full, then flush", run: func(m *mover) {
		m.fill()
		m.move()
		m.flush()
		m.works()
	}},
	{name: "send buffer full, then write", run: func(m *mover) {
		m.fill()
		m.move()
		n := len(m.sent)
		m.peerGets(func() {
			if k, err := m.conn.Write([]byte("behind it")); k != 9 || err != nil {
				m.t.Errorf("Write: %d, %v", k, err)
			}
		})
		m.sent = append(m.sent, "behind it"...)
		m.peerGets(func() {})
		if n == 0 {
			m.t.Error("nothing was taken")
		}
		m.works()
	}},
	{name: "send buffer full, moved and filled again", run: func(m *mover) {
		m.fill()
		m.move()
		m.overfill()
		m.move()
		m.move()
		m.overfill()
		m.move()
		m.flush()
		m.works()
	}},
	{name: "send buffer full, then Close", run: func(m *mover) {
		m.fill()
		m.move()
		m.closes()
	}},
	{name: "send buffer full, then CloseWrite", run: func(m *mover) {
		m.fill()
		m.move()
		m.closesWriting()
	}},
	{name: "send buffer full, output queued behind, then Close", run: func(m *mover) {
		m.fill()
		m.queue(pattern(40_000))
		m.move()
		m.closes()
	}},
	{name: "queued, then write", run: func(m *mover) {
		m.queue([]byte("queued "))
		m.move()
		m.queue([]byte("queued again "))
		m.move()
		m.write([]byte("written"))
		m.peerGets(func() {})
		m.works()
	}},
	{name: "queued, then Close", run: func(m *mover) {
		m.queue(pattern(100_000))
		m.move()
		m.closes()
	}},
	{name: "send buffer full, unread input, half a record received", run: func(m *mover) {
		m.fill()
		m.send(typeData, []byte("question"))
		rec := m.seal(typeData, []byte("another"))
		m.sendRaw(rec[:10])
		m.wantRead("quest")
		m.move()
		m.sendRaw(rec[10:])
		m.wantRead("ionanother")
		m.move()
		m.flush()
		m.works()
	}},
	{name: "a reader and a writer are sent home", run: func(m *mover) {
		m.smallBuffers()
		var wg sync.WaitGroup
		wg.Go(func() {
			data := pattern(1 << 20)
			n, err := m.conn.Write(data)
			m.sent = append(m.sent, data[:n]...)
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				m.t.Errorf("Write: %d, %v", n, err)
			}
		})
		wg.Go(func() {
			if n, err := m.conn.Read(make([]byte, 10)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
				m.t.Errorf("Read: %d, %v", n, err)
			}
		})
		timer := time.AfterFunc(m.wait(), func() { _ = m.conn.SetDeadline(past) })
		wg.Wait()
		timer.Stop()
		m.move()
		m.flush()
		m.works()
	}},

	// The kernel keeps a record open that was written with MSG_MORE, which is how
	// sendfile ends when it is interrupted. close and shutdown would drop it silently.
	{name: "record open (MSG_MORE), then write", layer: "kernel", run: func(m *mover) {
		m.writeMore([]byte("open "))
		m.move()
		m.write([]byte("and shut"))
		m.peerGets(func() {})
		m.works()
	}},
	{name: "record open (MSG_MORE), then Close", layer: "kernel", run: func(m *mover) {
		m.writeMore([]byte("open"))
		m.move()
		m.closes()
	}},
	{name: "record open (MSG_MORE), then CloseWrite", layer: "kernel", run: func(m *mover) {
		m.writeMore([]byte("open"))
		m.move()
		m.closesWriting()
	}},
	{name: "record open (MSG_MORE), queued output behind, then Close", layer: "kernel", run: func(m *mover) {
		m.writeMore([]byte("open, "))
		m.queue([]byte("queued"))
		m.move()
		m.closes()
	}},
	{name: "record open (MSG_MORE) in each owner, full at last", layer: "kernel", run: func(m *mover) {
		m.smallBuffers()
		m.writeMore([]byte("first, "))
		m.move()
		m.writeMore([]byte("second, "))
		m.move()
		m.overfill()
		m.writeMoreTry(pattern(3000))
		m.move()
		m.closes()
	}},
	{name: "record open (MSG_MORE), the peer closes", layer: "kernel", run: func(m *mover) {
		m.writeMore([]byte("open"))
		m.send(typeAlert, []byte{levelWarning, byte(alertCloseNotify)})
		_ = m.c.CloseWrite()
		m.finished()
		m.move()
		m.wantEOF()
		m.closes()
	}},
	{name: "file half sent, then Close", run: func(m *mover) {
		m.smallBuffers()
		content := pattern(1 << 20)
		f := testFile(m.t, content)
		_ = m.conn.SetWriteDeadline(time.Now().Add(5 * m.wait()))
		n, err := m.conn.ReadFrom(f)
		if !errors.Is(err, os.ErrDeadlineExceeded) || n == 0 {
			m.t.Fatalf("ReadFrom took %d bytes: %v", n, err)
		}
		m.sent = append(m.sent, content[:n]...)
		m.move()
		m.closes()
	}},
}

func (m *mover) queue(p []byte) {
	m.t.Helper()
	if err := m.conn.QueueWrite(p); err != nil {
		m.t.Fatal(err)
	}
	m.sent = append(m.sent, p...)
}

// writeMore leaves a record open, as an owner in another language can: the layer
// does not know of it.
func (m *mover) writeMore(p []byte) {
	m.t.Helper()
	if n := m.writeMoreTry(p); n != len(p) {
		m.t.Fatalf("a send with MSG_MORE took %d of %d bytes", n, len(p))
	}
}

func (m *mover) writeMoreTry(p []byte) (n int) {
	m.t.Helper()
	if err := m.conn.control(func(fd int) (err error) {
		n, err = syscall.SendmsgN(fd, p, nil, nil, syscall.MSG_DONTWAIT|msgMore)
		if errors.Is(err, syscall.EAGAIN) {
			n, err = 0, nil
		}
		return err
	}); err != nil {
		m.t.Fatal(err)
	}
	m.sent = append(m.sent, p[:n]...)
	return n
}

// msgMore is MSG_MORE.
const msgMore = 0x8000
