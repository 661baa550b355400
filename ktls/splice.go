package ktls

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// io.Copy from a socket or a pipe into the kernel layer, without the bytes passing
// through this process: socket -> pipe -> session, or pipe -> session. Only while data
// comes in bulk: then it saves one copy of every byte (a plain write is sealed straight
// from the caller's memory already). A copy that waits for its source waits in Read, and
// holds no pipe.

// pipeSender is a record layer that takes data out of a pipe.
type pipeSender interface {
	fileSender
	// splices reports whether this kernel gets it right, see probe_copy.go.
	splices() bool
	// sendPipe takes count bytes, which are in the pipe, waiting for room like write.
	// records is how many were sealed. errNoSendfile is as from sendFile.
	sendPipe(pipe uintptr, count int) (n int, records uint64, err error)
}

// bulkRead is what a single Read must give for the copy to go on by splice.
const bulkRead = 32 << 10

// splicePipe is what a pipe between socket and session holds. What is in it when a copy
// is interrupted becomes pending output, so it is well below MaxQueued.
const splicePipe = 256 << 10

// pipeline moves bulk data from one source. The zero value of fd is not valid: use
// newPipeline.
type pipeline struct {
	to      pipeSender
	from    syscall.RawConn
	limited *io.LimitedReader // around the source, or nil
	isPipe  bool              // the source is a pipe itself
	r, w    int               // our own pipe, -1 when there is none
	size    int
}

// tcpSource is what io.Copy makes of a *net.TCPConn: a type of package net that has all
// of its methods but WriteTo. A type of anybody else's that embeds a *net.TCPConn, and
// may have a Read of its own, has that too.
type tcpSource interface {
	net.Conn
	syscall.Conn
	SetKeepAliveConfig(net.KeepAliveConfig) error
	MultipathTCP() (bool, error)
}

// newPipeline returns nil when r cannot be spliced from.
func newPipeline(l recordLayer, r io.Reader) *pipeline {
	to, ok := l.(pipeSender)
	if !ok {
		return nil
	}
	p := &pipeline{to: to, r: -1, w: -1}
	if p.limited, ok = r.(*io.LimitedReader); ok {
		r = p.limited.R
	}
	var src syscall.Conn
	switch s := r.(type) {
	case *net.TCPConn:
		src = s
	case *net.UnixConn:
		if a := s.LocalAddr(); a == nil || a.Network() != "unix" {
			return nil // datagrams
		}
		src = s
	case io.WriterTo:
		f, ok := r.(*os.File)
		if !ok || f == nil || !isPipe(f) {
			return nil
		}
		src, p.isPipe = f, true
	case tcpSource:
		src = s
	case file:
		if !isPipe(s) {
			return nil
		}
		src, p.isPipe = s, true
	default:
		return nil
	}
	if !to.splices() {
		return nil
	}
	var err error
	if p.from, err = src.SyscallConn(); err != nil {
		return nil // reading it will say why
	}
	return p
}

func isPipe(f file) bool {
	st, err := f.Stat()
	return err == nil && st.Mode()&os.ModeNamedPipe != 0
}

// close gives the pipe back. It is empty unless the session has ended.
func (p *pipeline) close() {
	if p != nil && p.r >= 0 {
		_, _ = sys.Close(p.r), sys.Close(p.w)
		p.r, p.w = -1, -1
	}
}

// round moves what the source has now, without waiting for it. more is false when Read
// has to look at the source: it has nothing now, or an end, or an error.
func (p *pipeline) round(c *Conn) (sent int64, more bool, err error) {
	want := splicePipe
	if c.Pending() > MaxQueued-splicePipe {
		want = 0 // no place for more should a deadline come
	}
	if p.limited != nil {
		want = int(min(int64(want), p.limited.N))
	}
	if want <= 0 {
		return 0, false, nil
	}
	var n, took int
	if p.isPipe {
		n, took, err = p.direct(c, want)
	} else if n, err = p.fill(want); err == nil && n > 0 {
		took, err = c.sendPipe(p.to, uintptr(p.r), n, true)
	} else {
		return 0, false, nil // Read will say why
	}
	if p.limited != nil {
		p.limited.N -= int64(took)
	}
	if err == errNoSendfile { //nolint:errorlint // a constant, never wrapped
		return int64(took), false, nil
	}
	return int64(took), n >= bulkRead, err
}

// fill moves up to want bytes from the source into our pipe.
func (p *pipeline) fill(want int) (n int, err error) {
	if p.r < 0 {
		if p.r, p.w, err = sys.Pipe(); err != nil {
			return 0, err
		}
		_ = sys.GrowPipe(p.w, splicePipe) // a smaller one does too
	}
	rerr := p.from.Read(func(fd uintptr) bool {
		n, err = sys.Splice(p.w, int(fd), want)
		return true
	})
	return n, errors.Join(rerr, err)
}

// direct moves what is in the source, a pipe.
func (p *pipeline) direct(c *Conn, want int) (n, took int, err error) {
	rerr := p.from.Control(func(fd uintptr) {
		var waiting int
		if waiting, err = sys.Waiting(int(fd)); err != nil || waiting == 0 {
			err = nil // Read will say why
			return
		}
		n = min(waiting, want)
		took, err = c.sendPipe(p.to, fd, n, false)
	})
	if rerr != nil {
		return 0, 0, nil
	}
	return n, took, err
}

// sendPipe is Write of the count bytes in a pipe. When own is set nobody else has that
// pipe, and whatever of it cannot be sent before a deadline becomes pending output.
func (c *Conn) sendPipe(ps pipeSender, pipe uintptr, count int, own bool) (n int, err error) {
	c.lockWrite()
	defer c.unlockWrite()
	n, err = c.splicePipe(ps, pipe, count)
	switch {
	case err == nil || n == count:
	case err == errNoSendfile && own: //nolint:errorlint // a constant, never wrapped
		rest := readPipe(pipe, count-n)
		var k int
		k, err = c.send(rest)
		if n += k; errors.Is(err, os.ErrDeadlineExceeded) {
			c.queued = append(c.queued, rest[k:]...)
			n += len(rest) - k
		}
	case errors.Is(err, os.ErrDeadlineExceeded):
		keep := count - n
		if !own {
			if n == 0 {
				break
			}
			// The kernel may hold a record open for more, see sendFile.
			keep = 1
		}
		rest := readPipe(pipe, keep)
		c.queued = append(c.queued, rest...)
		n += len(rest)
	}
	return n, err
}

func (c *Conn) splicePipe(ps pipeSender, pipe uintptr, count int) (n int, err error) {
	if err := c.flush(); err != nil {
		return 0, err
	}
	if err := c.mayUse(usage(count) + uint64(count/1024)); err != nil {
		return 0, err
	}
	if err := ps.prepareFile(); err != nil {
		return 0, c.writeFailed(err)
	}
	c.plainOutput()
	n, records, err := ps.sendPipe(pipe, count)
	// Records may be as small as the buffers in the pipe: these are counted.
	c.txUsed += uint64(n/16) + 2*records
	if err != nil && err != errNoSendfile { //nolint:errorlint // a constant, never wrapped
		err = c.writeFailed(err)
	}
	return n, err
}

// readPipe takes up to n bytes that are in a pipe.
func readPipe(pipe uintptr, n int) []byte {
	b := make([]byte, n)
	got := 0
	for got < n {
		k, err := sys.Read(int(pipe), b[got:])
		if err != nil || k == 0 {
			break
		}
		got += k
	}
	return b[:got]
}
