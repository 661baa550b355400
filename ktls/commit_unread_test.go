package ktls

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// What a session that commits reads, against a plain model: input that was given since
// the last Commit, and input that is to come. It is pushed back, in whole or in part and
// over the last Commit, taken back, committed, moved, and its owner dies.
func TestCommitAndUnread(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		over := time.Now().Add(propertyTime(t) / 2)
		var failed atomic.Bool // then time is no object: the script is made smaller
		rapid.Check(t, func(rt *rapid.T) {
			steps := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) unreadStep {
				return unreadStep{rapid.IntRange(0, 9).Draw(t, "what"), rapid.OneOf(rapid.IntRange(0, 20), rapid.IntRange(0, 9000)).Draw(t, "n")}
			}), 1, 40).Draw(rt, "steps")
			version := rapid.SampledFrom([]uint16{tls.VersionTLS13, tls.VersionTLS12}).Draw(rt, "version")
			if !failed.Load() && time.Now().After(over) {
				return
			}
			o := newUnreadOwner(t, layer, version)
			defer o.close()
			for i, s := range steps {
				if err := o.do(s); err != nil {
					failed.Store(true)
					rt.Fatalf("step %d, %d with %d: %v", i, s.what, s.n, err)
				}
			}
		})
	})
}

type unreadStep struct{ what, n int }

// unreadOwner is a session, its peer, and the model.
type unreadOwner struct {
	t     *testing.T
	ta    *testArena
	c     *Conn
	peer  *tls.Conn
	key   JournalKey
	base  []byte // the record it came with
	free  func()
	sent  int
	given []byte // by Read, since the last Commit
	next  []byte // to be read
	done  []byte // what was committed last
}

func newUnreadOwner(t *testing.T, layer Layer, version uint16) *unreadOwner {
	mode := ModeSoftware
	if layer == LayerKernel {
		mode = ModeKernel
	}
	conf := testClientTLS(t)
	conf.MaxVersion = version
	o := &unreadOwner{t: t, ta: newTestArena(t), free: func() {}}
	o.c, o.peer = connect(t, &Config{TLS: testServerTLS(t), Mode: mode}, conf)
	if err := o.move(false); err != nil { // so that there is a record to begin with
		t.Fatal(err)
	}
	return o
}

func (o *unreadOwner) close() {
	_ = o.c.Close()
	_ = o.peer.NetConn().Close()
	o.free()
}

func (o *unreadOwner) do(s unreadStep) error {
	n := s.n
	switch s.what {
	case 0, 1: // the peer sends
		p := make([]byte, n)
		for i := range p {
			p[i] = echoByte(uint64(o.sent + i))
		}
		o.sent += n
		o.next = append(o.next, p...)
		_, err := o.peer.Write(p)
		return err
	case 2, 3:
		if len(o.next) == 0 || n == 0 {
			return nil
		}
		p := make([]byte, n)
		n, err := o.c.Read(p)
		if err != nil || n == 0 || !bytes.HasPrefix(o.next, p[:n]) {
			return fmt.Errorf("read %d bytes, %.8q and so on (%w); expected %.8q", n, p[:n], err, o.next)
		}
		o.given, o.next = append(o.given, p[:n]...), o.next[n:]
	case 4: // some of what was given last
		o.unread(o.given[len(o.given)-min(n, len(o.given)):])
	case 5: // all of it, and some that is committed
		o.unread(append(bytes.Clone(o.done[len(o.done)-min(n, len(o.done)):]), o.given...))
	case 6: // something else
		o.unread(bytes.Repeat([]byte{'#'}, min(n, 100)))
	case 7:
		n = min(n, len(o.given))
		if done, err := o.c.Commit(n, fmt.Append(nil, o.sent), nil, true); err != nil || !done {
			return fmt.Errorf("commit: %v, %w", done, err)
		}
		o.done, o.given = append(o.done, o.given[:n]...), o.given[n:]
	case 8:
		if n%2 == 0 {
			o.c.Rewind()
			o.again()
			return nil
		}
		return o.move(false)
	case 9:
		return o.move(true)
	}
	if got := o.c.Uncommitted(); got != len(o.given) {
		return fmt.Errorf("%d bytes are not committed, expected %d", got, len(o.given))
	}
	return nil
}

func (o *unreadOwner) unread(p []byte) {
	o.c.Unread(p)
	k := 0
	switch {
	case bytes.HasSuffix(o.given, p):
		k = len(p)
	case bytes.HasSuffix(p, o.given):
		k = len(o.given)
	}
	o.given = o.given[:len(o.given)-k]
	o.next = append(bytes.Clone(p), o.next...)
}

// again is what the next run of a handler sees.
func (o *unreadOwner) again() {
	o.next = append(bytes.Clone(o.given), o.next...)
	o.given = nil
}

// move takes the session to its next owner; with killed, which finds it as the last one
// left it in the arena.
func (o *unreadOwner) move(killed bool) error {
	sock, st, err := o.c.Detach()
	if err != nil {
		return err
	}
	defer st.Wipe()
	facts, ferr := st.MarshalFacts()
	record, rerr := st.MarshalRecord()
	if err := errors.Join(ferr, rerr); err != nil {
		return err
	}
	f := duplicate(o.t, sock)
	_ = sock.Close()
	if killed {
		var journal *Recovered
		record = o.base
		if st.Layer() == LayerSoftware {
			j, err := OpenJournals(o.ta.mem)
			if err != nil {
				return err
			}
			rc, err := f.SyscallConn()
			if err != nil {
				return err
			}
			_ = rc.Control(func(fd uintptr) { journal, err = j.Recover(o.key, facts, int(fd)) })
			if err != nil {
				return err
			}
			record = journal.Record
		}
		commits, err := OpenCommits(o.ta.mem)
		if err != nil {
			return err
		}
		k, err := commits.Amend(o.key, record, journal)
		if err != nil || k == nil {
			return fmt.Errorf("amend: %v, %w", k, err)
		}
		record = k.Record
	}
	o.again()
	o.free()
	o.base = bytes.Clone(record)
	if o.c, err = Import(f, facts, record); err != nil {
		return err
	}
	_ = o.c.SetDeadline(time.Now().Add(testWait))
	o.key = JournalKey{7, o.key.Epoch + 1}
	o.free, err = bindCommits(o.ta.a, o.c, o.key, nil)
	return err
}
