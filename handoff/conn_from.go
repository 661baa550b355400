package handoff

import (
	"errors"
	"io"
	"os"
	"time"
)

var _ io.ReaderFrom = (*Conn)(nil)

// ReadFrom sends what r gives until its end; io.Copy and net/http use it. In the kernel
// layer a file goes out by sendfile(2), see ktls.Conn.ReadFrom. When a move is wanted it
// returns ErrMoving with the number of bytes taken, which reach the client here or from
// the next owner: a file's offset is then just behind them.
func (c *Conn) ReadFrom(r io.Reader) (int64, error) {
	if !isFile(r) { // it may have to be waited for, and others may want to write meanwhile
		return io.Copy(struct{ io.Writer }{c}, r)
	}
	defer c.written(c.writing())
	c.wmu.Lock()
	defer c.wmu.Unlock()
	var total int64
	for {
		c.mu.Lock()
		s, err := c.usableLocked()
		if err == nil && c.wantsOutLocked() {
			err = ErrMoving
		}
		c.told = c.told || errors.Is(err, ErrMoving)
		c.mu.Unlock()
		if err != nil {
			return total, err
		}
		n, err := s.ReadFrom(r)
		total += n
		if err == nil {
			return total, nil
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return total, c.failed(err)
		}
		c.mu.Lock()
		ours := c.wantsOutLocked() || c.dead != nil
		expired := !c.wdl.IsZero() && !time.Now().Before(c.wdl)
		c.mu.Unlock()
		if !ours && expired {
			return total, err
		}
	}
}

// isFile reports that r is a regular file, or a part of one as io.CopyN and
// http.ServeContent make it.
func isFile(r io.Reader) bool {
	if l, ok := r.(*io.LimitedReader); ok {
		r = l.R
	}
	f, ok := r.(*os.File)
	if !ok {
		return false
	}
	st, err := f.Stat()
	return err == nil && st.Mode().IsRegular()
}
