package handoff

import (
	"errors"
	"io"
	"sync"
)

// copyBuffers holds the buffers of WriteTo, which has one only while there is input.
var copyBuffers = sync.Pool{New: func() any { return new([32 << 10]byte) }}

// maxBehind is how many bytes of unsent output an echo may have and still take more
// input: what a peer sends that does not read must not pile up over moves.
const maxBehind = 256 << 10

var _ io.WriterTo = (*Conn)(nil)

// WriteTo copies input to w until the peer's close_notify (nil) or an error; io.Copy
// with c as its source uses it. What w does not take goes back (Unread), for the next
// Read here or in the next owner: so io.Copy(c, c) loses nothing when it ends with
// ErrMoving. The number is of bytes that w took.
func (c *Conn) WriteTo(w io.Writer) (int64, error) {
	var total int64
	for {
		if w == io.Writer(c) && c.session().Pending() >= maxBehind {
			// Sends what is pending. While a move is wanted it does nothing, and Read
			// says ErrMoving.
			if _, err := c.Write(nil); err != nil {
				return total, err
			}
		}
		if err := c.waitRead(); err != nil {
			return total, err
		}
		n, err := c.copyOnce(w)
		total += int64(n)
		if errors.Is(err, errCopied) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// errCopied is what copyOnce gives at the end of the input.
var errCopied = errors.New("copy: the peer sent close_notify")

// copyOnce copies what one Read gives; n is what w took.
func (c *Conn) copyOnce(w io.Writer) (n int, err error) {
	buf := copyBuffers.Get().(*[32 << 10]byte)
	defer copyBuffers.Put(buf)
	got, err := c.Read(buf[:])
	if errors.Is(err, io.EOF) && got == 0 {
		return 0, errCopied
	}
	if err != nil {
		return 0, err
	}
	n, err = w.Write(buf[:got])
	if n < 0 || n > got {
		return 0, errors.New("copy: the writer says that it took more than it was given")
	}
	if n < got {
		c.Unread(buf[n:got])
		if err == nil {
			err = io.ErrShortWrite
		}
	}
	return n, err
}
