package ktls

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

// FuzzRecords lets the fuzzer write the peer's records: pairs of a type and a
// length, the content, all sealed properly. The session must deliver exactly the
// data, over a move after every read if the fuzzer wants, and end with an error that
// Conn documents.
func FuzzRecords(f *testing.F) {
	f.Add([]byte("\x17\x05hello\x15\x02\x01\x00"), uint8(0), uint8(3), false)
	f.Add([]byte("\x16\x05\x18\x00\x00\x01\x01\x17\x01x"), uint8(1), uint8(5), false)
	f.Add([]byte("\x16\x03\x18\x00\x00\x16\x02\x01\x00\x17\x00"), uint8(2), uint8(1), false)
	f.Add([]byte("\x16\x04\x01\x00\x00\x00\x17\x01y"), uint8(3), uint8(200), false)
	f.Add([]byte("\x17\x05hello\x17\x00\x16\x03\x18\x00\x00\x16\x02\x01\x00\x17\x05world\x15\x02\x01\x00"), uint8(0), uint8(1), true)
	f.Add([]byte("\x16\x04\x01\x00\x00\x00\x17\x05hello\x15\x02\x01\x5a\x17\x01y"), uint8(4), uint8(0), true)
	f.Fuzz(func(t *testing.T, script []byte, suite, readSize uint8, moving bool) {
		tc := testSuites[int(suite)%len(testSuites)]
		s := newScripted(t, LayerSoftware, tc.version, tc.suite)
		defer s.reset()
		var stream, want []byte
		ended := false
		for len(script) >= 2 {
			typ, n := recordType(script[0]), min(int(script[1]), len(script)-2)
			content := script[2 : 2+n]
			script = script[2+n:]
			stream = append(stream, s.seal(typ, content)...)
			if typ == typeData && !ended {
				want = append(want, content...)
			} else if typ != typeData {
				ended = true // perhaps; then want is a lower bound no more
			}
			if tc.version == v13 && typ == typeHandshake && bytes.Equal(content, []byte(updateOnly)) {
				s.rekeyOut()
			}
		}
		if _, err := s.c.Write(stream); err != nil {
			t.Fatal(err)
		}
		_ = s.c.CloseWrite()
		var got []byte
		buf := make([]byte, int(readSize)+1)
		for {
			n, err := s.conn.Read(buf)
			got = append(got, buf[:n]...)
			if err == nil {
				if moving {
					s.move() // what may be read may be moved
				}
				continue
			}
			var alert *AlertError
			if !errors.Is(err, io.EOF) && !errors.Is(err, ErrTruncated) && !errors.As(err, &alert) {
				t.Fatalf("Read: %v", err)
			}
			break
		}
		if !bytes.HasPrefix(got, want) && !bytes.HasPrefix(want, got) {
			t.Fatalf("read %q, sent %q", got, want)
		}
	})
}

// reset closes the peer's end without leaving a TIME_WAIT behind: a fuzzer would
// use up all ports.
func (s *scripted) reset() {
	_ = s.c.SetLinger(0)
	_ = s.c.Close()
}

// FuzzStream feeds raw bytes to a session's parser, in pieces.
func FuzzStream(f *testing.F) {
	f.Add([]byte("\x17\x03\x03\x00\x20"), uint8(1))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"), uint8(4))
	f.Add([]byte("\x15\x03\x03\x00\x02\x01\x00"), uint8(7))
	f.Fuzz(func(t *testing.T, stream []byte, step uint8) {
		s := newScripted(t, LayerSoftware, v13, gcm)
		defer s.reset()
		go func() {
			for len(stream) > 0 {
				n := min(int(step)+1, len(stream))
				if _, err := s.c.Write(stream[:n]); err != nil {
					return
				}
				stream = stream[n:]
			}
			_ = s.c.CloseWrite()
		}()
		if n, err := s.conn.Read(make([]byte, 100)); n != 0 || err == nil || err == io.EOF {
			t.Fatalf("bytes that nobody sealed: %d, %v", n, err)
		}
	})
}

// FuzzWire checks the handshake wrapper: whatever the peer sends and however
// crypto/tls asks, it gets the same bytes, and none past the record it is in.
func FuzzWire(f *testing.F) {
	f.Add([]byte("\x16\x03\x01\x00\x05hello\x14\x03\x03\x00\x01\x01\x17\x03\x03\x00\x02xx"), uint8(16), false)
	f.Add([]byte("\x16\x03\x03\x00\x2a\x02\x00\x00\x26\x03\x03"), uint8(3), true)
	f.Add([]byte("\x16\x03\x03\x00\x00\x16\x03\x03\x00\x00"), uint8(255), true)
	f.Fuzz(func(t *testing.T, stream []byte, size uint8, client bool) {
		in := &countingConn{r: bytes.NewReader(stream)}
		w := &wire{Conn: in, client: client}
		var got []byte
		buf := make([]byte, int(size)+1)
		end := 0 // of the record that got is in
		for {
			if len(got) == end {
				end = recordEnd(stream, end)
			}
			n, err := w.Read(buf)
			got = append(got, buf[:n]...)
			if in.read != len(got)+len(w.ahead) {
				t.Fatalf("took %d bytes off the connection, gave %d and has %d", in.read, len(got), len(w.ahead))
			}
			if client && in.read > end+w.least(false) {
				t.Fatalf("took %d bytes off the connection in a record that ends at %d", in.read, end)
			}
			if len(got) > end {
				t.Fatalf("gave %d bytes, the record ends at %d", len(got), end)
			}
			if err != nil {
				break
			}
		}
		if !bytes.Equal(got, stream) {
			t.Fatalf("gave %q of %q", got, stream)
		}
		w.wipe()
	})
}

// recordEnd is where the record ends that begins at pos, or where the stream does.
func recordEnd(stream []byte, pos int) int {
	if pos+recordHeaderLen > len(stream) {
		return len(stream)
	}
	return min(len(stream), pos+recordHeaderLen+int(stream[pos+3])<<8+int(stream[pos+4]))
}

// countingConn counts the bytes that were taken.
type countingConn struct {
	net.Conn
	r    io.Reader
	read int
}

func (c *countingConn) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.read += n
	return n, err
}

func (c *countingConn) SetDeadline(time.Time) error { return nil }
