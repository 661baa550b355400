package ktls

import (
	"bytes"
	"io"
	"testing"
	"time"
)

// Families 12, 13 and 19: every cipher, version and role echoes, with records of every
// size, the largest included, in both directions.
func TestConformanceEcho(t *testing.T) {
	sizes := []int{1, 2, 15, 16, 17, 255, 4096, maxPlaintext - 1, maxPlaintext}
	eachSuite(t, func(t *testing.T, layer Layer, version, suite uint16) {
		for _, client := range []bool{false, true} {
			s := newScriptedRole(t, layer, version, suite, client)
			_ = s.conn.SetDeadline(time.Now().Add(testWait))
			for i, n := range sizes {
				want := pattern(n)
				s.send(typeData, nil) // empty ones in between
				s.send(typeData, want)
				got := make([]byte, n)
				if _, err := io.ReadFull(s.conn, got); err != nil || !bytes.Equal(got, want) {
					t.Fatalf("client %v: record of %d bytes: %v", client, n, err)
				}
				if k, err := s.conn.Write(got); k != n || err != nil {
					t.Fatalf("client %v: Write of %d bytes: %d, %v", client, n, k, err)
				}
				s.want(typeData, string(want)) // one record
				if i%4 == 3 {
					s.move()
				}
			}
			// More than a record is cut into full ones.
			long := pattern(2*maxPlaintext + 5)
			if k, err := s.conn.Write(long); k != len(long) || err != nil {
				t.Fatalf("Write: %d, %v", k, err)
			}
			for _, n := range []int{maxPlaintext, maxPlaintext, 5} {
				s.want(typeData, string(long[:n]))
				long = long[n:]
			}
			if err := s.conn.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			s.want(typeAlert, "\x01\x00")
			s.send(typeData, []byte("half closed"))
			s.send(typeAlert, []byte{levelWarning, byte(alertCloseNotify)})
			if b, err := io.ReadAll(s.conn); err != nil || string(b) != "half closed" {
				t.Errorf("after CloseWrite: %q, %v", b, err)
			}
		}
	})
}
