package ktls

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// copySources are the kinds of source that bulk data is spliced from.
var copySources = []struct {
	name string
	make func(t *testing.T) (r io.ReadCloser, w io.WriteCloser)
}{
	{"TCP", func(t *testing.T) (io.ReadCloser, io.WriteCloser) {
		c, s := tcpPair(t)
		return s, c
	}},
	{"unix socket", func(t *testing.T) (io.ReadCloser, io.WriteCloser) {
		ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = ln.Close() }()
		c, err := net.Dial("unix", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		s, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _, _ = c.Close(), s.Close() })
		return s, c
	}},
	{"pipe", func(t *testing.T) (io.ReadCloser, io.WriteCloser) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _, _ = r.Close(), w.Close() })
		return r, w
	}},
}

// feed writes content in pieces of changing size, and closes.
func feed(w io.WriteCloser, content []byte) {
	for n := 1; len(content) > 0; n = n*3%100_003 + 1 {
		k, err := w.Write(content[:min(n, len(content))])
		if err != nil {
			return
		}
		content = content[k:]
	}
	_ = w.Close()
}

func bulkSize() int {
	if guest.InGuest() {
		return 1 << 20 // an emulated machine is slow
	}
	return 8 << 20
}

// bulkLayers is bothLayers, without what is the same on every kernel in a guest.
func bulkLayers(t *testing.T, f func(t *testing.T, layer Layer)) {
	t.Helper()
	bothLayers(t, func(t *testing.T, layer Layer) {
		if layer == LayerKernel || !guest.InGuest() {
			f(t, layer)
		}
	})
}

// spliced counts what was spliced in several copies. One may have had no bulk to give,
// on a machine with other things to do.
type spliced struct {
	can   bool
	bytes int64
}

func (n *spliced) add(t *testing.T, spy *sendfileSpy) {
	t.Helper()
	if spy == nil {
		return
	}
	n.can = spy.splices()
	n.bytes += int64(spy.spliced)
	if !n.can && spy.spliced > 0 {
		t.Errorf("%d bytes were spliced on a kernel that does not get it right", spy.spliced)
	}
}

func (n *spliced) check(t *testing.T) {
	t.Helper()
	if n.can && n.bytes == 0 {
		t.Error("nothing was spliced on a kernel that gets it right")
	}
}

// io.Copy from a socket or pipe sends exactly what comes, up to the end or limit, and
// in the kernel layer by splice when it comes in bulk.
func TestCopyFromStreams(t *testing.T) {
	var all spliced
	defer func() { all.check(t) }()
	for _, src := range copySources {
		for _, limited := range []bool{false, true} {
			name := src.name
			if limited {
				name += ", limited"
			}
			t.Run(name, func(t *testing.T) {
				content := pattern(bulkSize())
				bulkLayers(t, func(t *testing.T, layer Layer) {
					s := newScripted(t, layer, v13, gcm)
					_ = s.conn.SetDeadline(time.Now().Add(testWait))
					spy := spyOn(s.conn)
					before := countFDs(t)
					r, w := src.make(t)
					fed := make(chan struct{})
					go func() { defer close(fed); feed(w, content) }()
					want := content
					var from io.Reader = r
					if limited {
						want = content[:len(content)-100_001]
						from = &io.LimitedReader{R: r, N: int64(len(want))}
					}
					got := make(chan []byte, 1)
					go func() { got <- s.wantData(len(want) + len("end")) }()
					if n, err := io.Copy(s.conn, from); n != int64(len(want)) || err != nil {
						t.Fatalf("Copy gave %d and %v, expected %d", n, err, len(want))
					}
					if _, err := s.conn.Write([]byte("end")); err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(<-got, append(bytes.Clone(want), "end"...)) {
						t.Error("the peer got other bytes")
					}
					if limited {
						rest, err := io.ReadAll(r)
						if err != nil || !bytes.Equal(rest, content[len(want):]) {
							t.Errorf("%d bytes behind the limit, %v", len(rest), err)
						}
					}
					<-fed
					all.add(t, spy)
					_, _ = r.Close(), w.Close()
					if after := countFDs(t); after > before {
						t.Errorf("%d descriptors, %d before", after, before)
					}
				})
			})
		}
	}
}

// A deadline in the middle of a copy loses nothing: what was counted reaches the peer,
// also after a move, and the source goes on behind it.
func TestCopyFromStreamsInterrupted(t *testing.T) {
	var all spliced
	defer func() { all.check(t) }()
	for _, src := range copySources {
		for _, moved := range []bool{false, true} {
			name := src.name + ", stays"
			if moved {
				name = src.name + ", moves"
			}
			t.Run(name, func(t *testing.T) {
				content := pattern(bulkSize())
				bulkLayers(t, func(t *testing.T, layer Layer) {
					s := newScripted(t, layer, v13, gcm)
					s.smallBuffers()
					spy := spyOn(s.conn)
					r, w := src.make(t)
					go feed(w, content)
					for at, step := 0, 0; at < len(content); step++ {
						// The peer reads nothing meanwhile, but in the end.
						read := make(chan []byte, 1)
						if step < 6 {
							_ = s.conn.SetWriteDeadline(time.Now().Add(30 * time.Millisecond))
						} else {
							_ = s.conn.SetWriteDeadline(time.Now().Add(testWait))
							go func() { read <- s.wantData(len(content) - at) }()
						}
						n, err := io.Copy(s.conn, r)
						if end := at+int(n) == len(content); end != (err == nil) || !end && (step == 6 || !errors.Is(err, os.ErrDeadlineExceeded)) {
							t.Fatalf("Copy gave %d and %v after %d of %d bytes", n, err, at, len(content))
						}
						if moved && step%2 == 0 {
							s.move()
							if spy != nil {
								was := spy.spliced
								spy = spyOn(s.conn)
								spy.spliced = was
							}
						}
						_ = s.conn.SetDeadline(time.Now().Add(testWait))
						flushed := make(chan error, 1)
						go func() { flushed <- s.conn.Flush() }()
						if step < 6 {
							read <- s.wantData(int(n))
						}
						if b := <-read; !bytes.Equal(b, content[at:at+int(n)]) {
							t.Fatalf("the peer got other bytes from %d on", at)
						}
						if err := <-flushed; err != nil {
							t.Fatal(err)
						}
						at += int(n)
					}
					all.add(t, spy)
				})
			})
		}
	}
}

// Close ends a copy whose peer does not read, and one whose source is quiet ends with
// the source.
func TestCopyFromStreamsClosed(t *testing.T) {
	for _, src := range copySources {
		t.Run(src.name, func(t *testing.T) {
			bulkLayers(t, func(t *testing.T, layer Layer) {
				s := newScripted(t, layer, v13, gcm)
				s.smallBuffers()
				r, w := src.make(t)
				go feed(w, pattern(bulkSize()))
				done := make(chan error, 1)
				go func() {
					_, err := io.Copy(s.conn, r)
					done <- err
				}()
				s.wantData(100_000)
				_ = s.conn.Close()
				select {
				case err := <-done:
					if !errors.Is(err, net.ErrClosed) {
						t.Errorf("Copy gave %v, expected net.ErrClosed", err)
					}
				case <-time.After(testWait):
					t.Fatal("Copy goes on after Close")
				}
			})
		})
	}
}

// A record from the peer that cannot be opened fails a splice too; what the pipe held
// is not passed over, and the reader hears of the record.
func TestSpliceMeetsBadRecord(t *testing.T) {
	guest.NeedKernelTLS(t)
	s := newScripted(t, LayerKernel, v13, gcm)
	_ = s.conn.SetDeadline(time.Now().Add(testWait))
	r, w := copySources[0].make(t)
	content := pattern(bulkSize())
	go feed(w, content)
	rec := s.seal(typeData, []byte("bad"))
	rec[2] ^= 1
	s.sendRaw(rec)
	go func() {
		for {
			if typ, _, err := s.next(); err != nil || typ == typeAlert {
				return
			}
		}
	}()
	copied := make(chan error, 1)
	go func() {
		_, err := io.Copy(s.conn, r)
		copied <- err
	}()
	var alert *AlertError
	if _, err := s.conn.Read(make([]byte, 1)); !errors.As(err, &alert) || alert.Alert != alertProtocolVersion {
		t.Errorf("Read: %v", err)
	}
	if err := <-copied; err != nil && !errors.As(err, &alert) {
		t.Errorf("Copy: %v", err)
	}
}

// A type that is somebody's own is read by its own Read.
func TestCopyFromWrappedSocket(t *testing.T) {
	c, s := tcpPair(t)
	defer func() { _ = c.Close() }()
	for name, r := range map[string]io.Reader{
		"embeds a TCPConn":  struct{ *net.TCPConn }{s},
		"embeds a net.Conn": struct{ net.Conn }{s},
		"embeds a file":     struct{ *os.File }{testFile(t, nil)},
		"a file":            testFile(t, nil),
		"a reader":          bytes.NewReader(nil),
	} {
		if p := newPipeline(&kernelLayer{}, r); p != nil {
			t.Errorf("%s is spliced from", name)
		}
	}
}

// Why nothing is spliced out of a session: what splice(2) says does not tell which of
// two things it was. Should a kernel change that, WriteTo could be built on it.
func TestKernelSpliceOutIsAmbiguous(t *testing.T) {
	guest.NeedKernelTLS(t)
	r, w, err := sys.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = sys.Close(r), sys.Close(w) }()
	splice := func(s *scripted) (n int, err error) {
		// The connection is on this host, so what was sent is here.
		cerr := onFD(s.conn.sock.(*net.TCPConn), func(fd int) error {
			n, err = sys.Splice(w, fd, 1000)
			return nil
		})
		return n, errors.Join(err, cerr)
	}
	s := newScripted(t, LayerKernel, v13, gcm)
	s.send(typeAlert, []byte{levelWarning, byte(alertUserCanceled)})
	for range 2 {
		if n, err := splice(s); !errors.Is(err, sys.EINVAL) {
			t.Errorf("a control record: %d, %v", n, err)
		}
	}
	s = newScripted(t, LayerKernel, v13, gcm)
	rec := s.seal(typeData, []byte("x"))
	rec[2] ^= 1
	s.sendRaw(rec)
	if n, err := splice(s); !errors.Is(err, sys.EINVAL) {
		t.Errorf("a bad header: %d, %v", n, err)
	}
	if n, err := splice(s); !errors.Is(err, sys.EAGAIN) {
		t.Errorf("a bad header, again: %d, %v", n, err)
	}
	s = newScripted(t, LayerKernel, v13, gcm)
	s.send(typeData, nil)
	if n, err := splice(s); n != 0 || err != nil {
		t.Errorf("an empty record: %d, %v", n, err)
	}
	_ = s.c.CloseWrite()
	for end := time.Now().Add(testWait); ; {
		n, err := splice(s)
		if n == 0 && err == nil {
			break
		}
		if !errors.Is(err, sys.EAGAIN) || time.Now().After(end) {
			t.Fatalf("the end of the stream: %d, %v", n, err)
		}
	}
}
