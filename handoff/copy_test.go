package handoff

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// entered tells when a Write begins.
type entered struct {
	*Conn
	ch chan<- struct{}
}

func (e entered) Write(p []byte) (int, error) {
	select {
	case e.ch <- struct{}{}:
	default:
	}
	return e.Conn.Write(p)
}

// A client that sends and does not read, over so many moves that the output which
// travels is at its limit, gets every byte in the end. The first form is that of a
// handler with a writer of its own, which Conn knows nothing of.
func TestStalledEcho(t *testing.T) {
	const moves = 120
	for name, echo := range map[string]func(c *Conn, writing chan<- struct{}) error{
		"a writer of its own": func(c *Conn, writing chan<- struct{}) error {
			_, err := io.Copy(struct{ io.Writer }{entered{c, writing}}, c)
			return err
		},
		"io.Copy(c, c)": func(c *Conn, _ chan<- struct{}) error {
			_, err := io.Copy(c, c)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			writing, conns := make(chan struct{}, 1), make(chan *Conn, moves+2)
			h := func(_ context.Context, c *Conn) error {
				conns <- c
				return echo(c, writing)
			}
			a, b := startProc(t, h), startProc(t, h)
			s := newSession(t, ktls.ModeSoftware, tls.VersionTLS13)
			a.give(s)
			all := make([]byte, 16<<20) // more than sockets and the travelling queue hold
			for i := 0; i < len(all); i += 4 {
				binary.BigEndian.PutUint32(all[i:], uint32(i))
			}
			sent := make(chan error, 1)
			go func() {
				_, err := s.cli.Write(all)
				sent <- err
			}()
			c := <-conns
			waitFor(t, "blocked Write", func() bool { return blockedWriter(c) })
			largest := 0
			for range moves {
				if name == "io.Copy(c, c)" {
					waitFor(t, "Write", func() bool {
						free := c.wmu.TryLock()
						if free {
							c.wmu.Unlock()
						}
						return !free
					})
				} else {
					<-writing
				}
				move(s, a, b)
				largest = max(largest, len(s.cargo.Record))
				a, b = b, a
				c = <-conns
			}
			if limit := maxBehind + 256<<10; name == "io.Copy(c, c)" && largest > limit {
				t.Errorf("%d bytes travelled with a session whose client does not read, expected at most %d", largest, limit)
			}
			got := make([]byte, len(all))
			if n, err := io.ReadFull(s.cli, got); err != nil {
				t.Fatalf("after %d bytes: %v", n, err)
			}
			if !bytes.Equal(got, all) {
				i := 0
				for got[i] == all[i] {
					i++
				}
				t.Errorf("the echo is wrong from byte %d on", i)
			}
			if err := <-sent; err != nil {
				t.Error(err)
			}
			s.say("after it", "after it")
		})
	}
}

// What a writer does not take is read again.
func TestCopyGivesBack(t *testing.T) {
	h, _, s, _ := stepping(t)
	type result struct {
		n   int64
		err error
	}
	results := make(chan result, 1)
	h.do <- func(_ context.Context, c *Conn) error {
		n, err := io.Copy(shortWriter(4), c)
		results <- result{n, err}
		_, err = io.Copy(c, c)
		return err
	}
	s.write("one two")
	if r := <-results; r.n != 4 || r.err != io.ErrShortWrite {
		t.Errorf("io.Copy: %d, %v", r.n, r.err)
	}
	s.read("two")
}

// shortWriter takes so many bytes of each Write.
type shortWriter int

func (w shortWriter) Write([]byte) (int, error) { return int(w), nil }

// A file on its way to a client that reads slowly moves with the session: each owner
// goes on where the last one was, and no byte is lost or doubled.
func TestFileOverMoves(t *testing.T) {
	for _, mode := range []ktls.Mode{ktls.ModeSoftware, ktls.ModeKernel} {
		t.Run(mode.String(), func(t *testing.T) {
			if mode == ktls.ModeKernel {
				guest.NeedKernelTLS(t)
			}
			content := make([]byte, 8<<20)
			for i := 0; i < len(content); i += 4 {
				binary.BigEndian.PutUint32(content[i:], uint32(i))
			}
			name := filepath.Join(t.TempDir(), "content")
			if err := os.WriteFile(name, content, 0o600); err != nil {
				t.Fatal(err)
			}
			began := make(chan struct{}, 100)
			h := func(_ context.Context, c *Conn) error {
				f, err := os.Open(name)
				if err != nil {
					return err
				}
				defer func() { _ = f.Close() }()
				at := int64(0)
				if b := c.State(); b != nil {
					at = int64(binary.BigEndian.Uint64(b))
				}
				if _, err := f.Seek(at, io.SeekStart); err != nil {
					return err
				}
				began <- struct{}{}
				n, err := io.Copy(c, f)
				c.SetState(binary.BigEndian.AppendUint64(nil, uint64(at+n)))
				if err != nil {
					return err
				}
				return c.CloseWrite()
			}
			a, b := startProc(t, h), startProc(t, h)
			s := newSession(t, mode, tls.VersionTLS13)
			a.give(s)
			var got []byte
			for range 5 {
				<-began
				waitFor(t, "the copy", func() bool { // it does not fit into the socket
					part := make([]byte, 100_000)
					n, err := io.ReadFull(s.cli, part)
					got = append(got, part[:n]...)
					return err == nil
				})
				move(s, a, b)
				a, b = b, a
			}
			rest, err := io.ReadAll(s.cli)
			if got = append(got, rest...); err != nil || !bytes.Equal(got, content) {
				t.Errorf("the client got %d bytes of %d, or others; %v", len(got), len(content), err)
			}
		})
	}
}
