package ktls

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// sendfileSpy counts what leaves by sendfile and by splice.
type sendfileSpy struct {
	*kernelLayer
	sent, spliced int
}

func (s *sendfileSpy) sendPipe(pipe uintptr, count int) (int, uint64, error) {
	n, records, err := s.kernelLayer.sendPipe(pipe, count)
	s.spliced += n
	return n, records, err
}

func (s *sendfileSpy) sendFile(file uintptr, count int) (int, error) {
	n, err := s.kernelLayer.sendFile(file, count)
	s.sent += n
	return n, err
}

// spyOn returns nil for a session of the software layer.
func spyOn(c *Conn) *sendfileSpy {
	l, ok := c.layer.(*kernelLayer)
	if !ok {
		return nil
	}
	s := &sendfileSpy{kernelLayer: l}
	c.layer = s
	return s
}

func testFile(t testing.TB, content []byte) *os.File {
	t.Helper()
	name := filepath.Join(t.TempDir(), "content")
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// io.Copy from a file sends exactly the file, from its offset to its end or limit,
// and in the kernel layer all of it by sendfile.
func TestCopyFromFile(t *testing.T) {
	content := pattern(700_001)
	for _, tc := range []struct {
		name      string
		at, limit int64 // limit 0: none
		want      int64
	}{
		{name: "whole", want: 700_001},
		{name: "from the middle", at: 5001, want: 695_000},
		{name: "limited", at: 17, limit: 300_000, want: 300_000},
		{name: "limit behind the end", at: 600_001, limit: 1 << 20, want: 100_000},
		{name: "one byte", at: 700_000, want: 1},
		{name: "at the end", at: 700_001, want: 0},
		{name: "behind the end", at: 800_000, want: 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bothLayers(t, func(t *testing.T, layer Layer) {
				s := newScripted(t, layer, v13, gcm)
				_ = s.conn.SetDeadline(time.Now().Add(testWait))
				spy := spyOn(s.conn)
				f := testFile(t, content)
				if _, err := f.Seek(tc.at, io.SeekStart); err != nil {
					t.Fatal(err)
				}
				var src io.Reader = f
				if tc.limit > 0 {
					src = &io.LimitedReader{R: f, N: tc.limit}
				}
				got := make(chan []byte, 1)
				go func() { got <- s.wantData(int(tc.want) + len("end")) }()
				n, err := io.Copy(s.conn, src)
				if n != tc.want || err != nil {
					t.Fatalf("Copy gave %d and %v, expected %d", n, err, tc.want)
				}
				if _, err := s.conn.Write([]byte("end")); err != nil {
					t.Fatal(err)
				}
				from := min(tc.at, int64(len(content)))
				want := append(bytes.Clone(content[from:from+tc.want]), "end"...)
				if b := <-got; !bytes.Equal(b, want) {
					t.Error("the peer got other bytes")
				}
				if at, _ := f.Seek(0, io.SeekCurrent); at != tc.at+tc.want {
					t.Errorf("the file's offset is %d, expected %d", at, tc.at+tc.want)
				}
				if l, ok := src.(*io.LimitedReader); ok && l.N != tc.limit-tc.want {
					t.Errorf("%d are left of the limit, expected %d", l.N, tc.limit-tc.want)
				}
				if spy != nil && spy.sent != int(tc.want) {
					t.Errorf("%d of %d bytes went by sendfile", spy.sent, tc.want)
				}
			})
		})
	}
}

// What is not a regular file is copied, and so is a file that says it has no size.
func TestCopyFromOthers(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		s := newScripted(t, layer, v13, gcm)
		_ = s.conn.SetDeadline(time.Now().Add(testWait))
		spy := spyOn(s.conn)
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = r.Close() }()
		content := pattern(100_000)
		go func() {
			_, _ = w.Write(content)
			_ = w.Close()
		}()
		proc, err := os.Open("/proc/self/status")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = proc.Close() }()
		done := make(chan []byte, 1)
		go func() { done <- s.wantData(len(content)) }()
		if n, err := io.Copy(s.conn, r); n != int64(len(content)) || err != nil {
			t.Fatalf("from a pipe: %d and %v", n, err)
		}
		if !bytes.Equal(<-done, content) {
			t.Error("from a pipe: the peer got other bytes")
		}
		if n, err := io.Copy(s.conn, proc); n == 0 || err != nil {
			t.Errorf("from /proc: %d and %v", n, err)
		}
		if spy != nil && spy.sent != 0 {
			t.Errorf("%d bytes went by sendfile", spy.sent)
		}
	})
}

// A deadline in the middle of a file loses and doubles nothing, and what was taken
// reaches the peer by Flush alone, also after a move.
func TestCopyFromFileInterrupted(t *testing.T) {
	content := pattern(8 << 20)
	for _, moved := range []bool{false, true} {
		name := "stays"
		if moved {
			name = "moves"
		}
		t.Run(name, func(t *testing.T) {
			bothLayers(t, func(t *testing.T, layer Layer) {
				s := newScripted(t, layer, v13, gcm)
				s.smallBuffers()
				f := testFile(t, content)
				_ = s.conn.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
				n, err := io.Copy(s.conn, f)
				if !errors.Is(err, os.ErrDeadlineExceeded) || n <= 0 || n >= int64(len(content)) {
					t.Fatalf("Copy gave %d of %d bytes and %v, expected a part and a deadline", n, len(content), err)
				}
				_ = s.conn.SetDeadline(time.Now().Add(testWait))
				if moved {
					s.move()
				}
				flushed := make(chan error, 1)
				go func() { flushed <- s.conn.Flush() }()
				if b := s.wantData(int(n)); !bytes.Equal(b, content[:n]) {
					t.Fatal("the peer got other bytes before the deadline")
				}
				if err := <-flushed; err != nil {
					t.Fatal(err)
				}
				if layer == LayerSoftware {
					// The offset of what is copied runs ahead by what was read and not taken.
					if _, err := f.Seek(n, io.SeekStart); err != nil {
						t.Fatal(err)
					}
				}
				rest := make(chan []byte, 1)
				go func() { rest <- s.wantData(len(content) - int(n)) }()
				if m, err := io.Copy(s.conn, f); m != int64(len(content))-n || err != nil {
					t.Fatalf("the rest: %d and %v, expected %d", m, err, int64(len(content))-n)
				}
				if !bytes.Equal(<-rest, content[n:]) {
					t.Fatal("the peer got other bytes after the deadline")
				}
			})
		})
	}
}

// Close ends a copy from a file to a peer that does not read.
func TestCopyFromFileClosed(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		s := newScripted(t, layer, v13, gcm)
		s.smallBuffers()
		f := testFile(t, pattern(8<<20))
		done := make(chan error, 1)
		go func() {
			_, err := io.Copy(s.conn, f)
			done <- err
		}()
		s.wantData(1) // it is under way
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
}

// A key that cannot be changed is not used beyond its limit by sendfile either.
func TestCopyFromFileCountsTheKey(t *testing.T) {
	guest.NeedKernelTLS(t)
	s := newScripted(t, LayerKernel, v13, gcm)
	_ = s.conn.SetDeadline(time.Now().Add(testWait))
	s.conn.limit = usage(2*writeChunk) + 2048
	go func() {
		for {
			if _, _, err := s.next(); err != nil {
				return
			}
		}
	}()
	n, err := io.Copy(s.conn, testFile(t, pattern(4*writeChunk)))
	if !errors.Is(err, ErrKeyLimit) || n == 0 || n > 2*writeChunk {
		t.Errorf("Copy gave %d bytes and %v, expected at most %d and %v", n, err, 2*writeChunk, ErrKeyLimit)
	}
}

// io.Copy out of a session ends as Read does, whatever control records there are.
func TestCopyTo(t *testing.T) {
	content := pattern(50_000)
	for _, tc := range []struct {
		name string
		end  func(s *scripted)
		want error
	}{
		{"close_notify", func(s *scripted) { s.send(typeAlert, []byte{levelWarning, byte(alertCloseNotify)}) }, nil},
		{"truncated", func(s *scripted) { _ = s.c.CloseWrite() }, ErrTruncated},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bothLayers(t, func(t *testing.T, layer Layer) {
				s := newScripted(t, layer, v13, gcm)
				_ = s.conn.SetDeadline(time.Now().Add(testWait))
				go func() {
					for b := content; len(b) > 0; b = b[min(len(b), 9000):] {
						s.send(typeData, b[:min(len(b), 9000)])
					}
					tc.end(s)
				}()
				var got bytes.Buffer
				n, err := io.Copy(struct{ io.Writer }{&got}, s.conn)
				if n != int64(len(content)) || !errors.Is(err, tc.want) {
					t.Fatalf("Copy gave %d and %v, expected %d and %v", n, err, len(content), tc.want)
				}
				if !bytes.Equal(got.Bytes(), content) {
					t.Error("other bytes")
				}
			})
		})
	}
}

// A type that embeds a file and has a Read of its own is read by that.
func TestCopyFromWrappedFile(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		s := newScripted(t, layer, v13, gcm)
		_ = s.conn.SetDeadline(time.Now().Add(testWait))
		src := upperFile{testFile(t, []byte("as read"))}
		if n, err := s.conn.ReadFrom(&io.LimitedReader{R: src, N: 7}); n != 7 || err != nil {
			t.Fatalf("ReadFrom gave %d and %v", n, err)
		}
		s.want(typeData, "AS READ")
	})
}

type upperFile struct{ *os.File }

func (f upperFile) Read(p []byte) (int, error) {
	n, err := f.File.Read(p)
	copy(p, bytes.ToUpper(p[:n]))
	return n, err
}

// What the other end of a copy did not take is not lost to the session.
func TestCopyToGivesBack(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		s := newScripted(t, layer, v13, gcm)
		_ = s.conn.SetDeadline(time.Now().Add(testWait))
		s.send(typeData, []byte("taken, and not taken"))
		full := errors.New("full")
		if n, err := s.conn.WriteTo(writerFunc(func([]byte) (int, error) { return len("taken"), full })); n != 5 || !errors.Is(err, full) {
			t.Fatalf("WriteTo gave %d and %v", n, err)
		}
		s.wantRead(", and not taken")
	})
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// spyListener lets a test see what net/http does with a session.
type spyListener struct {
	net.Listener
	spies chan *sendfileSpy
}

func (l *spyListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	if s := spyOn(c.(*Conn)); s != nil {
		l.spies <- s
	}
	return c, nil
}

// A file server over kernel sessions sends files by sendfile, ranges included.
func TestServeContent(t *testing.T) {
	content := pattern(900_000)
	f := testFile(t, content)
	bothLayers(t, func(t *testing.T, layer Layer) {
		mode := ModeSoftware
		if layer == LayerKernel {
			mode = ModeKernel
		}
		ln := &spyListener{NewListener(listenTCP(t), &Config{TLS: testServerTLS(t), Mode: mode}), make(chan *sendfileSpy, 4)}
		srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			g, err := os.Open(f.Name())
			if err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
			defer func() { _ = g.Close() }()
			http.ServeContent(w, r, "content.bin", time.Time{}, g)
		})}
		served := make(chan error, 1)
		go func() { served <- srv.Serve(ln) }()
		defer func() {
			_ = srv.Close()
			<-served
		}()
		conf := testClientTLS(t)
		client := &http.Client{Timeout: testWait, Transport: &http.Transport{
			DisableKeepAlives: true,
			DialTLSContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
				return (&tls.Dialer{Config: conf}).DialContext(ctx, network, ln.Addr().String())
			},
		}}
		for _, tc := range []struct {
			ranges string
			want   []byte
		}{{"", content}, {"bytes=1000-500999", content[1000:501_000]}} {
			req, err := http.NewRequest(http.MethodGet, "https://content.test/", nil)
			if err != nil {
				t.Fatal(err)
			}
			if tc.ranges != "" {
				req.Header.Set("Range", tc.ranges)
			}
			resp, err := client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			if err != nil || !bytes.Equal(body, tc.want) {
				t.Fatalf("got %d bytes and %v, expected %d", len(body), err, len(tc.want))
			}
			if layer == LayerKernel {
				// net/http may write the first 512 bytes itself, having looked at their type.
				if s := <-ln.spies; s.sent < len(tc.want)-512 {
					t.Errorf("%q: %d of %d bytes went by sendfile", tc.ranges, s.sent, len(tc.want))
				}
			}
		}
	})
}
