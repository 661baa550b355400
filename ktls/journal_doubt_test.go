package ktls

import (
	"errors"
	"io"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// Where the socket and the journal do not fit together, nobody goes on with the session:
// a sequence number could be used twice, or bytes be lost.
func TestJournalInDoubt(t *testing.T) {
	ta := newTestArena(t)
	c, peer := connect(t, &Config{TLS: testServerTLS(t), Mode: ModeSoftware}, testClientTLS(t))
	ta.journal(t, c)
	b := make([]byte, 5)
	for range 2 {
		if _, err := peer.Write([]byte("input")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, b); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(peer, b); err != nil {
			t.Fatal(err)
		}
	}
	sock, st, err := c.Detach()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sock.Close() })
	facts, err := st.MarshalFacts()
	if err != nil {
		t.Fatal(err)
	}
	rc, err := sock.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var at sys.TCPPosition
	if cerr := rc.Control(func(fd uintptr) { at, err = sys.PositionTCP(int(fd)) }); cerr != nil || err != nil {
		t.Fatal(cerr, err)
	}
	j, err := OpenJournals(ta.mem)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := j.recover(ta.place.Key(), facts, at); err != nil || r.Read != 10 || r.Written != 10 {
		t.Fatalf("as it is: %+v, %v", r, err)
	}
	for name, change := range map[string]func(*sys.TCPPosition){
		"more was sent than the journal has":      func(at *sys.TCPPosition) { at.Written++ },
		"less was sent, and the rest is gone":     func(at *sys.TCPPosition) { at.Written = 0 },
		"less was received than was used":         func(at *sys.TCPPosition) { at.Read-- },
		"more was received than the journal kept": func(at *sys.TCPPosition) { at.Read += bigBuf },
	} {
		at := at
		change(&at)
		r, err := j.recover(ta.place.Key(), facts, at)
		if err == nil || errors.Is(err, ErrNoJournal) || errors.Is(err, ErrConnectionGone) {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
}
