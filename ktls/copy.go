package ktls

import (
	"errors"
	"io"
	"os"
	"syscall"
)

// How io.Copy goes in and out of a session. Neither direction holds a lock of the
// Conn while it waits for the other end of the copy, so that Close, a KeyUpdate or
// a move need not wait for that.

// fileSender is a record layer that sends files without their bytes passing
// through this process.
type fileSender interface {
	// prepareFile is called before the first sendFile of a copy.
	prepareFile() error
	// sendFile sends count bytes of the file from its offset on, waiting for room
	// like write. n < count with a nil error: the file ended. errNoSendfile says that
	// this file cannot be sent so; nothing more than n was taken then.
	sendFile(file uintptr, count int) (n int, err error)
}

const errNoSendfile layerError = "not by sendfile"

var (
	_ io.ReaderFrom = (*Conn)(nil)
	_ io.WriterTo   = (*Conn)(nil)
)

// ReadFrom sends what r gives until its end; io.Copy calls it. In the kernel layer
// a regular *os.File, also in an *io.LimitedReader as io.CopyN and http.ServeContent
// make one, goes out by sendfile(2), from the file's offset on, which ends up behind
// what was taken. What comes in bulk from a *net.TCPConn, a stream *net.UnixConn or a
// pipe goes by splice(2) where Probe says that this kernel gets it right. Everything
// else is copied.
//
// The count includes bytes that a deadline kept from being sent: they are pending,
// here or after a move, and must not be sent again. So r is then just behind what was
// counted, except that more than MaxQueued bytes are never pending, and bytes that were
// read from an r other than a file and found no place are gone, as with io.Copy.
func (c *Conn) ReadFrom(r io.Reader) (int64, error) {
	var n int64
	if fs, ok := c.layer.(fileSender); ok {
		var err error
		if n, err = c.readFromFile(fs, r); err != nil {
			return n, err
		}
	}
	// A file is at its end now, unless it grows or is one of those that have no size.
	m, err := c.readFrom(r)
	return n + m, err
}

// readFromFile sends as much of r as can go by sendfile. On a nil error the rest,
// if any, is to be copied.
func (c *Conn) readFromFile(fs fileSender, r io.Reader) (sent int64, err error) {
	limited, _ := r.(*io.LimitedReader)
	if limited != nil {
		r = limited.R
	}
	f, ok := fileOf(r)
	if !ok {
		return 0, nil
	}
	left, ok := fileLeft(f)
	if limited != nil {
		left = min(left, limited.N)
	}
	if !ok || left <= 0 {
		return 0, nil
	}
	rc, err := f.SyscallConn()
	if err != nil {
		return 0, nil // reading it will say why
	}
	cerr := rc.Control(func(fd uintptr) {
		for left > 0 && err == nil {
			want := int(min(left, writeChunk))
			var n int
			n, err = c.sendFile(fs, f, fd, want)
			sent += int64(n)
			left -= int64(n)
			if err == nil && n < want {
				break // it has shrunk
			}
		}
	})
	if limited != nil {
		limited.N -= sent
	}
	if err == errNoSendfile || cerr != nil { //nolint:errorlint // a constant, never wrapped
		err = nil
	}
	return sent, err
}

// file is what *os.File gives to io.Copy: io.Copy calls its WriteTo, which comes
// back with a type of its own that embeds the file and hides WriteTo.
type file interface {
	io.ReadSeeker
	syscall.Conn
	Stat() (os.FileInfo, error)
}

// fileOf leaves alone what embeds a file and may have a Read of its own: such a
// type has inherited WriteTo.
func fileOf(r io.Reader) (file, bool) {
	if f, ok := r.(*os.File); ok {
		return f, f != nil
	}
	if _, ok := r.(io.WriterTo); ok {
		return nil, false
	}
	f, ok := r.(file)
	return f, ok
}

// fileLeft is how many bytes of a regular file are behind its offset.
func fileLeft(f file) (left int64, ok bool) {
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() {
		return 0, false
	}
	at, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return 0, false
	}
	return st.Size() - at, true
}

// sendFile is Write of the next count bytes of a file.
func (c *Conn) sendFile(fs fileSender, f file, fd uintptr, count int) (n int, err error) {
	c.lockWrite()
	defer c.unlockWrite()
	if err := c.flush(); err != nil {
		return 0, err
	}
	// The kernel may cut what it sends into more records than a write of this size
	// would be: a record is at least a page, but for the last.
	if err := c.mayUse(usage(count) + uint64(count/1024)); err != nil {
		return 0, err
	}
	if err := fs.prepareFile(); err != nil {
		return 0, c.writeFailed(err)
	}
	c.plainOutput()
	n, err = fs.sendFile(fd, count)
	c.txUsed += usage(n) + uint64(n/1024)
	if err == nil || err == errNoSendfile { //nolint:errorlint // a constant, never wrapped
		return n, err
	}
	err = c.writeFailed(err)
	if n < count && errors.Is(err, os.ErrDeadlineExceeded) {
		// The kernel may hold a record open for more. One more byte as pending output
		// makes the next Flush or Write close it, here or after a move.
		var b [1]byte
		if k, _ := f.Read(b[:]); k == 1 {
			c.queued = append(c.queued, b[0])
			n++
		}
	}
	return n, err
}

// readFrom copies, and splices while that pays.
func (c *Conn) readFrom(r io.Reader) (sent int64, err error) {
	b := getBuffer(smallBuf)
	defer func() { putBuffer(b) }()
	bulk := newPipeline(c.layer, r)
	defer func() { bulk.close() }()
	for n, rerr := 0, error(nil); ; {
		for more := bulk != nil && n >= bulkRead; more; {
			var k int64
			k, more, err = bulk.round(c)
			if sent += k; err != nil {
				return sent, err
			}
		}
		if n < smallBuf {
			bulk.close() // a source that has become slow
		}
		n, rerr = r.Read(b.b)
		if n > 0 {
			k, err := c.Write(b.b[:n])
			if errors.Is(err, os.ErrDeadlineExceeded) && c.QueueWrite(b.b[k:n]) == nil {
				k = n // the source cannot take it back
			}
			sent += int64(k)
			if err != nil {
				return sent, err
			}
		}
		if rerr != nil {
			if rerr == io.EOF { //nolint:errorlint // as io.Copy does
				rerr = nil
			}
			return sent, rerr
		}
		b = fitting(b, n)
	}
}

// WriteTo gives w what Read reads, until io.EOF; io.Copy calls it. It never splices:
// splice(2) out of a session says the same of a control record and of one that is no
// record at all, of which the kernel speaks only once, and the same of an empty record
// and the end of the stream. What w did not take can be read again.
func (c *Conn) WriteTo(w io.Writer) (written int64, err error) {
	size := smallBuf
	for {
		// A copy that waits for a quiet peer holds no buffer.
		if err := c.WaitRead(); err != nil {
			return written, err
		}
		n, k, err := c.copyOnce(w, size)
		written += int64(k)
		if err != nil {
			if err == io.EOF && n == 0 { //nolint:errorlint // Read's own
				err = nil
			}
			return written, err
		}
		size = pace(n)
	}
}

// copyOnce gives w what one Read into a buffer of a size reads: n bytes, of which w
// took k.
func (c *Conn) copyOnce(w io.Writer, size int) (n, k int, err error) {
	b := getBuffer(size)
	defer putBuffer(b)
	if n, err = c.Read(b.b); n == 0 || err != nil {
		return 0, 0, err
	}
	k, err = w.Write(b.b[:n])
	k = max(0, min(k, n))
	if k < n {
		c.Unread(b.b[k:n])
		if err == nil {
			err = io.ErrShortWrite
		}
	}
	return n, k, err
}

// pace is the size of a copy's next buffer when the last read gave n bytes.
func pace(n int) int {
	if n >= smallBuf {
		return bigBuf
	}
	return smallBuf
}

// fitting exchanges a copy's buffer for one that fits its pace, n bytes at the last
// read: a copy that waits for a quiet peer holds the small one.
func fitting(b *buffer, n int) *buffer {
	want := pace(n)
	if len(b.b) == want {
		return b
	}
	putBuffer(b)
	return getBuffer(want)
}
