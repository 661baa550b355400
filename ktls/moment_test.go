package ktls

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// A moment is a state of a session in which its owner changes. Its test brings a
// session there, moves it, goes on, and says exactly what each side must get: every
// byte once, in order, and the right end.
type moment struct {
	name    string
	version uint16 // 0: both
	layer   string // "": both
	not     string // of the ways to change keys
	client  bool   // in the client role only
	run     func(m *mover)
}

// moments are in files by what is going on: moment_read_test.go and so on.
func moments() []moment {
	all := append(readMoments[:len(readMoments):len(readMoments)], writeMoments...)
	return append(all, endMoments...)
}

// way is how a session moves.
type way uint8

const (
	within  way = iota // to another Conn of this process, over a duplicate of the socket
	twice              // two such moves, with nothing in between; in the client role
	through            // through a second process, and back
	killed             // software layer: its owner is no more, and left a journal
)

func (w way) String() string { return [...]string{"within", "twice", "through", "killed"}[w] }

// variant is a suite and the ways to move in it.
type variant struct {
	version, suite uint16
	ways           []way
}

// variants are all there are; in a guest, where everything is slow, a moment has one
// way in one suite of each version, and the moments take turns.
func variants(i int) []variant {
	all := []variant{
		{v13, gcm, []way{within, twice, through, killed}},
		{tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, []way{within, through, killed}},
		{v13, tls.TLS_CHACHA20_POLY1305_SHA256, []way{within, killed}},
		{tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, []way{twice}},
	}
	if !guest.InGuest() {
		return all
	}
	for j := range all {
		k := (i/2 + j) % len(all[j].ways)
		all[j].ways = all[j].ways[k : k+1]
	}
	return []variant{all[i%2], all[3-i%2]} // one of each version, by turns with each cipher
}

// TestMoveAtWorstMoments moves sessions at every moment, in every way, over both
// layers.
func TestMoveAtWorstMoments(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		runMoments(t, layer.String(), moments(), func(t *testing.T, v variant, client bool) *scripted {
			return newScriptedRole(t, layer, v.version, v.suite, client)
		})
	})
}

// TestMoveAtKeyUpdates is the same around changes of keys, for each way to make them.
func TestMoveAtKeyUpdates(t *testing.T) {
	t.Run("software", func(t *testing.T) {
		runMoments(t, "software", keyMoments, func(t *testing.T, v variant, client bool) *scripted {
			return newScriptedRole(t, LayerSoftware, v13, v.suite, client)
		})
	})
	for _, by := range []string{"kernel", "relay"} {
		t.Run(by, func(t *testing.T) {
			guest.NeedKernelTLS(t)
			guest.NeedKernel(t, 6, 14, "a change of keys")
			runMoments(t, by, keyMoments, func(t *testing.T, v variant, client bool) *scripted {
				return newChangingRole(t, v.suite, by == "relay", client)
			})
		})
	}
}

func runMoments(t *testing.T, by string, list []moment, session func(t *testing.T, v variant, client bool) *scripted) {
	if guest.InGuest() && by == "software" {
		return // it needs nothing of this kernel, and has been tested on the host
	}
	second := newPassage(t)
	for i, mo := range list {
		if mo.layer != "" && mo.layer != by || mo.not == by {
			continue
		}
		t.Run(mo.name, func(t *testing.T) {
			for _, v := range variants(i) {
				if mo.version != 0 && mo.version != v.version {
					continue
				}
				for _, w := range v.ways {
					if w == killed && by != "software" {
						w = within
					}
					t.Run(suiteTestName(v.version, v.suite)+" "+w.String(), func(t *testing.T) {
						m := &mover{way: w, second: second}
						if w == killed {
							m.arena = newTestArena(t)
						}
						m.again = func() {
							m.scripted = session(t, v, mo.client || w == twice)
							_ = m.conn.SetDeadline(time.Now().Add(testWait))
							if m.arena != nil {
								m.arena.journal(t, m.conn)
							}
						}
						m.again()
						mo.run(m)
					})
				}
			}
		})
	}
}

// mover is a session under test and what its owners have written.
type mover struct {
	*scripted
	way    way
	second *passage
	again  func() // starts over with a new session
	arena  *testArena
	sent   []byte // taken by Write or QueueWrite, not yet seen at the peer
}

// move takes the session to its next owner.
func (m *mover) move() {
	m.t.Helper()
	m.moveWhile(func() {})
}

// moveWhile calls f while nobody owns the session.
func (m *mover) moveWhile(f func()) {
	m.t.Helper()
	before := m.conn
	if m.changer != nil {
		m.changer.settle(m.t, before)
	}
	buffered, pending := before.Buffered(), before.Pending()
	sock, st, err := before.Detach()
	if err != nil {
		m.t.Fatalf("detach: %v", err)
	}
	f()
	secrets, _ := st.MarshalSecrets()
	if m.way == killed {
		facts, record := m.arena.recover(m.t, sock, st)
		moved := duplicate(m.t, sock)
		_ = sock.Close()
		m.adopt(moved, facts, record, secrets)
		m.arena.journal(m.t, m.conn)
		var at sys.TCPPosition
		if err := m.conn.control(func(fd int) (err error) { at, err = sys.PositionTCP(fd); return err }); err != nil || at.Closed {
			pending = 0 // nothing goes out any more, and how far it came is not known
		}
	} else if m.way == through {
		moved, facts, record := m.second.pass(m.t, sock, st)
		m.adopt(moved, facts, record, secrets)
	} else {
		facts, ferr := st.MarshalFacts()
		record, rerr := st.MarshalRecord()
		if err := errors.Join(ferr, rerr); err != nil {
			m.t.Fatal(err)
		}
		st.Wipe()
		moved := duplicate(m.t, sock)
		_ = sock.Close()
		m.adopt(moved, facts, record, secrets)
		if m.way == twice {
			m.scripted.move()
		}
	}
	if b, p := m.conn.Buffered(), m.conn.Pending(); b != buffered || p != pending {
		m.t.Errorf("the new owner has %d bytes to read and %d to send, the old one had %d and %d", b, p, buffered, pending)
	}
}

func (m *mover) adopt(sock *os.File, facts, record, secrets []byte) {
	m.t.Helper()
	c, err := Import(sock, facts, record)
	if err != nil {
		_ = sock.Close()
		m.t.Fatalf("import: %v", err)
	}
	m.t.Cleanup(func() { _ = c.Close() })
	m.changer.attach(m.t, c, secrets)
	_ = c.SetDeadline(time.Now().Add(testWait))
	m.conn = c
}

// wait is for how long something that must not happen is waited for.
func (m *mover) wait() time.Duration {
	if guest.InGuest() {
		return 6 * time.Millisecond
	}
	return 3 * time.Millisecond
}

// step is between the bytes at which a test moves.
func (m *mover) step() int {
	if guest.InGuest() {
		return 3
	}
	return 1
}

// pull makes the owner read as far as there is anything, and expects that it gives
// nothing: of a record that is not complete, or a control record.
func (m *mover) pull() {
	m.t.Helper()
	_ = m.conn.SetReadDeadline(time.Now().Add(m.wait()))
	if n, err := m.conn.Read(make([]byte, 100)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		m.t.Fatalf("Read gave %d bytes and %v, expected nothing yet", n, err)
	}
	_ = m.conn.SetReadDeadline(time.Now().Add(testWait))
}

// finished waits until the peer's FIN or reset is at the owner's socket.
func (m *mover) finished() {
	m.t.Helper()
	for end := time.Now().Add(testWait); time.Now().Before(end); time.Sleep(time.Millisecond) {
		done := false
		if err := m.conn.control(func(fd int) (err error) { done, err = sys.PeerFinished(fd); return err }); err != nil {
			m.t.Fatal(err)
		}
		if done {
			return
		}
	}
	m.t.Fatal("the peer's end did not arrive")
}

// write writes p, all of it.
func (m *mover) write(p []byte) {
	m.t.Helper()
	n, err := m.conn.Write(p)
	m.sent = append(m.sent, p[:n]...)
	if err != nil {
		m.t.Fatalf("Write took %d of %d bytes: %v", n, len(p), err)
	}
}

// fill writes to a peer that does not read until nothing more is taken.
func (m *mover) fill() {
	m.t.Helper()
	m.smallBuffers()
	m.overfill()
}

// overfill is fill for a session whose buffers are small, and perhaps full already.
func (m *mover) overfill() {
	m.t.Helper()
	data := pattern(1 << 20)
	_ = m.conn.SetWriteDeadline(time.Now().Add(5 * m.wait()))
	n, err := m.conn.Write(data)
	m.sent = append(m.sent, data[:n]...)
	if !errors.Is(err, os.ErrDeadlineExceeded) || n == len(data) {
		m.t.Fatalf("Write of %d bytes to a peer that does not read: %d, %v", len(data), n, err)
	}
	_ = m.conn.SetWriteDeadline(time.Now().Add(testWait))
}

// peerGets reads at the peer everything that was taken so far, while f runs.
func (m *mover) peerGets(f func()) {
	m.t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	n := len(m.sent)
	got := m.wantData(n)
	<-done
	if !bytes.Equal(got, m.sent[:n]) {
		m.t.Errorf("the peer got other bytes than the %d that were taken", n)
	}
	m.sent = m.sent[n:]
}

// ends reads at the peer what is left, then close_notify and FIN, while f runs.
func (m *mover) ends(f func()) {
	m.t.Helper()
	m.peerGets(f)
	if len(m.sent) > 0 { // f wrote
		m.peerGets(func() {})
	}
	m.want(typeAlert, "\x01\x00")
	m.wantFIN()
}

func (m *mover) closes() {
	m.t.Helper()
	m.ends(func() {
		if err := m.conn.Close(); err != nil {
			m.t.Errorf("Close: %v", err)
		}
	})
}

func (m *mover) closesWriting() {
	m.t.Helper()
	m.ends(func() {
		if err := m.conn.CloseWrite(); err != nil {
			m.t.Errorf("CloseWrite: %v", err)
		}
	})
}

func (m *mover) flush() {
	m.t.Helper()
	m.peerGets(func() {
		if err := m.conn.Flush(); err != nil {
			m.t.Errorf("Flush: %v", err)
		}
	})
}

// echo proves that the session works both ways.
func (m *mover) echo(text string) {
	m.t.Helper()
	m.send(typeData, []byte(text))
	m.wantRead(text)
	m.write([]byte(text))
	m.peerGets(func() {})
}

// works is echo, and then both sides close.
func (m *mover) works() {
	m.t.Helper()
	m.echo("still the same session")
	m.closesWriting()
	m.send(typeAlert, []byte{levelWarning, byte(alertCloseNotify)})
	m.wantEnd(io.EOF)
}

func (m *mover) peerResets() {
	_ = m.c.SetLinger(0)
	_ = m.c.Close()
}

// wantReset is what Read says after a reset: an error of the connection, never an
// end that could be taken for the peer's wish.
func (m *mover) wantReset() {
	m.t.Helper()
	n, err := m.conn.Read(make([]byte, 100))
	var nerr *net.OpError
	if n != 0 || !errors.As(err, &nerr) || !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		m.t.Fatalf("Read after a reset gave %d bytes and %v", n, err)
	}
}
