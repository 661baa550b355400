package handoff

import (
	"errors"
	"io"
	"sync"
)

// copyBuffers holds the buffers of WriteTo.
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
	buf := copyBuffers.Get().(*[32 << 10]byte)
	defer copyBuffers.Put(buf)
	var total int64
	for {
		if w == io.Writer(c) && c.session().Pending() >= maxBehind {
			// Sends what is pending. While a move is wanted it does nothing, and Read
			// says ErrMoving.
			if _, err := c.Write(nil); err != nil {
				return total, err
			}
		}
		n, err := c.Read(buf[:])
		if errors.Is(err, io.EOF) && n == 0 {
			return total, nil
		}
		if err != nil {
			return total, err
		}
		k, err := w.Write(buf[:n])
		if k < 0 || k > n {
			return total, errors.New("copy: the writer says that it took more than it was given")
		}
		total += int64(k)
		if k < n {
			c.Unread(buf[k:n])
			if err == nil {
				err = io.ErrShortWrite
			}
		}
		if err != nil {
			return total, err
		}
	}
}
