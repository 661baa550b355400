package ktls

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// whoeverChangesKeys runs a test for each way in which keys are changed: in the
// software layer, in the kernel by the owner itself, and in the kernel by somebody
// else through a relay.
func whoeverChangesKeys(t *testing.T, f func(t *testing.T, newSession func(suite uint16) *scripted)) {
	t.Helper()
	t.Run("software", func(t *testing.T) {
		f(t, func(suite uint16) *scripted { return newScripted(t, LayerSoftware, v13, suite) })
	})
	for _, by := range []string{"kernel", "relay"} {
		t.Run(by, func(t *testing.T) {
			guest.NeedKernelTLS(t)
			guest.NeedKernel(t, 6, 14, "a change of keys")
			f(t, func(suite uint16) *scripted { return newChanging(t, suite, by == "relay") })
		})
	}
}

// newChanging is a session of the kernel layer whose keys can be changed.
func newChanging(t testing.TB, suite uint16, relay bool) *scripted {
	t.Helper()
	return newChangingRole(t, suite, relay, false)
}

func newChangingRole(t testing.TB, suite uint16, relay, client bool) *scripted {
	t.Helper()
	s := newScriptedRole(t, LayerKernel, v13, suite, client)
	s.changer = &keyChanger{t: t, suite: suite, relay: relay,
		tx: bytes.Clone(s.inSecret), rx: bytes.Clone(s.outSecret)}
	info, err := lookupSuite(v13, suite)
	if err != nil {
		t.Fatal(err)
	}
	tx, err1 := info.direction13(bytes.Clone(s.inSecret), 0)
	rx, err2 := info.direction13(bytes.Clone(s.outSecret), 0)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	if !relay {
		s.conn.secrets = &secrets{tx: tx, rx: rx}
		s.conn.layer.(*kernelLayer).secrets = s.conn.secrets
	}
	s.changer.attach(t, s.conn, nil)
	t.Cleanup(s.changer.wait)
	return s
}

// keyChanger does what a supervisor does: it has the secrets and a duplicate of the
// socket, and is told by the owner what is needed.
type keyChanger struct {
	t     testing.TB
	suite uint16
	relay bool
	jobs  sync.WaitGroup

	mu     sync.Mutex // one job at a time
	tx, rx []byte
	conn   *Conn
	sock   *os.File
}

// attach makes k the one who changes c's keys.
func (k *keyChanger) attach(t testing.TB, c *Conn, secrets []byte) {
	t.Helper()
	switch {
	case k == nil:
	case k.relay:
		k.mu.Lock()
		defer k.mu.Unlock()
		k.conn, k.sock = c, duplicate(t, c.sock)
		sock := k.sock
		t.Cleanup(func() { _ = sock.Close() })
		c.SetRelay(k)
		c.Remind()
	case secrets != nil:
		if err := c.SetSecrets(secrets); err != nil {
			t.Fatal(err)
		}
	}
}

func (k *keyChanger) wait() { k.jobs.Wait() }

// settle waits until nothing is under way.
func (k *keyChanger) settle(t testing.TB, c *Conn) {
	t.Helper()
	deadline := time.Now().Add(testWait)
	for c.Lent() {
		if time.Now().After(deadline) {
			t.Fatal("the change of keys does not come to an end")
		}
		time.Sleep(time.Millisecond)
	}
}

func (k *keyChanger) job(f func()) {
	k.jobs.Go(func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		f()
	})
}

func (k *keyChanger) KeyUpdateReceived(n uint64, requested bool) {
	k.job(func() {
		if k.conn.rel == nil || n <= k.rekeyedTo() {
			return
		}
		if err := k.apply(Receiving, &k.rx); err != nil {
			k.t.Errorf("next receiving key: %v", err)
			return
		}
		k.conn.Rekeyed(n)
	})
	if requested {
		k.KeyUpdateWanted(false)
	}
}

func (k *keyChanger) rekeyedTo() uint64 {
	r := k.conn.rel
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.rekeyed
}

// KeyUpdateWanted has one sent, unless one that went out meanwhile will do.
func (k *keyChanger) KeyUpdateWanted(request bool) {
	k.job(func() {
		r := k.conn.rel
		r.mu.Lock()
		needed := r.debts > r.paid || r.wanted
		r.mu.Unlock()
		if !needed {
			return
		}
		if err := k.conn.Pause(); err != nil {
			if !errors.Is(err, net.ErrClosed) {
				k.t.Logf("pause: %v", err)
			}
			return
		}
		defer k.conn.Continue()
		next, before := k.at(Sending, k.tx)
		if next {
			k.t.Error("the next key is set already")
		}
		if err := k.conn.SendKeyUpdate(request); err != nil {
			k.t.Logf("send KeyUpdate: %v", err)
			return
		}
		if _, after := k.at(Sending, k.tx); after != before+1 {
			k.t.Errorf("sequence number %d after the KeyUpdate, %d before", after, before)
		}
		if err := k.apply(Sending, &k.tx); err != nil {
			k.t.Errorf("next sending key: %v", err)
		}
	})
}

func (k *keyChanger) step(d Direction, secret []byte) *KeyChange {
	next, err := NextSecret(k.suite, secret)
	if err != nil {
		k.t.Error(err)
	}
	return &KeyChange{Suite: k.suite, Direction: d, Current: secret, Next: next}
}

func (k *keyChanger) at(d Direction, secret []byte) (next bool, seq uint64) {
	err := onSocket(k.sock, func(fd int) (err error) {
		next, seq, err = k.step(d, secret).Position(fd)
		return err
	})
	if err != nil {
		k.t.Error(err)
	}
	return next, seq
}

// apply sets the next key, twice: the second time must do nothing.
func (k *keyChanger) apply(d Direction, secret *[]byte) error {
	step := k.step(d, *secret)
	err := onSocket(k.sock, func(fd int) error { return errors.Join(step.Apply(fd), step.Apply(fd)) })
	*secret = step.Next
	return err
}

func onSocket(f *os.File, do func(fd int) error) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	cerr := rc.Control(func(fd uintptr) { err = do(int(fd)) })
	return errors.Join(cerr, err)
}

// A key is only ever set over the one before it: neither twice nor over another.
func TestKeyChangeIsNeverRepeated(t *testing.T) {
	guest.NeedKernelTLS(t)
	guest.NeedKernel(t, 6, 14, "a change of keys")
	s := newChanging(t, gcm, true)
	k := s.changer
	if err := s.conn.KeyUpdate(false); err != nil {
		t.Fatal(err)
	}
	s.want(typeHandshake, updateOnly)
	s.rekeyIn()
	for range 5 {
		if _, err := s.conn.Write([]byte("data")); err != nil {
			t.Fatal(err)
		}
		s.want(typeData, "data")
	}
	_, seq := k.at(Sending, k.tx)
	if seq != 5 {
		t.Fatalf("next record %d, 5 were sent", seq)
	}
	// Who believes that the step to this key is still to be made.
	first := &KeyChange{Suite: gcm, Direction: Sending, Current: s.first, Next: k.tx}
	if err := onSocket(k.sock, first.Apply); err != nil {
		t.Fatal(err)
	}
	if _, seq = k.at(Sending, k.tx); seq != 5 {
		t.Errorf("setting the key again took the sequence number back to %d", seq)
	}
	// Who is a generation behind, or has nothing to do with it.
	for _, bad := range []*KeyChange{
		{Suite: gcm, Direction: Sending, Current: bytes.Repeat([]byte{1}, 32), Next: bytes.Repeat([]byte{2}, 32)},
		{Suite: gcm, Direction: Sending, Current: bytes.Repeat([]byte{1}, 32), Next: s.first},
	} {
		if err := onSocket(k.sock, bad.Apply); !errors.Is(err, ErrKeyDoubt) {
			t.Errorf("a foreign key: %v", err)
		}
	}
	same := &KeyChange{Suite: gcm, Direction: Sending, Current: k.tx, Next: k.tx}
	if err := onSocket(k.sock, same.Apply); err == nil {
		if _, seq = k.at(Sending, k.tx); seq != 5 {
			t.Errorf("setting the same key took the sequence number back to %d", seq)
		}
	}
	if _, err := s.conn.Write([]byte("alive")); err != nil {
		t.Fatal(err)
	}
	s.want(typeData, "alive")
}

// Nothing is written in a pause, data waits for the answer to a request, deadlines and
// Close are kept, and who is in a pause cannot move.
func TestRelayPause(t *testing.T) {
	guest.NeedKernelTLS(t)
	guest.NeedKernel(t, 6, 14, "a change of keys")
	s := newScripted(t, LayerKernel, v13, gcm)
	c := s.conn
	var asked []string
	c.SetRelay(relayFunc(func(what string) { asked = append(asked, what) }))

	s.send(typeHandshake, []byte(updateRequest))
	s.rekeyOut()
	s.send(typeData, []byte("under the next key"))
	_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if _, err := c.Read(make([]byte, 10)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("Read without the next key: %v", err)
	}
	if len(asked) != 1 || asked[0] != "received and asked" {
		t.Fatalf("the relay was told %q", asked)
	}
	_ = c.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := c.Write([]byte("before the answer")); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("Write before the answer: %d, %v", n, err)
	}
	if _, _, err := c.Detach(); !errors.Is(err, ErrLent) {
		t.Fatalf("Detach while keys are changed: %v", err)
	}
	if err := c.SendKeyUpdate(false); !errors.Is(err, ErrNotPaused) {
		t.Fatalf("KeyUpdate without a pause: %v", err)
	}
	if err := c.Pause(); err != nil {
		t.Fatal(err)
	}
	_ = c.SetWriteDeadline(time.Now().Add(testWait))
	wrote := make(chan error, 1)
	go func() { _, err := c.Write([]byte("after the answer")); wrote <- err }()
	for range 2 { // told again after a restart of whoever tells it
		if err := c.SendKeyUpdate(false); err != nil {
			t.Fatal(err)
		}
	}
	s.want(typeHandshake, updateOnly)
	k := &keyChanger{t: t, suite: gcm, tx: s.inSecret, rx: s.firstOut, sock: duplicate(t, c.sock)}
	defer func() { _ = k.sock.Close() }()
	if err := k.apply(Sending, &k.tx); err != nil {
		t.Fatal(err)
	}
	s.rekeyIn()
	c.Continue()
	if err := <-wrote; err != nil {
		t.Fatal(err)
	}
	s.want(typeData, "after the answer")

	// Close does not wait for ever for a key that does not come.
	_ = c.SetReadDeadline(time.Time{})
	read := make(chan error, 1)
	go func() { _, err := c.Read(make([]byte, 10)); read <- err }()
	if err := c.Pause(); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-read; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Read after Close: %v", err)
	}
	if err := c.SendKeyUpdate(false); !errors.Is(err, net.ErrClosed) {
		t.Errorf("KeyUpdate after Close: %v", err)
	}
}

type relayFunc func(what string)

func (f relayFunc) KeyUpdateReceived(_ uint64, requested bool) {
	if requested {
		f("received and asked")
		return
	}
	f("received")
}

func (f relayFunc) KeyUpdateWanted(bool) { f("wanted") }

// A new owner of a session whose last one read a KeyUpdate and died follows it and
// answers.
func TestRelayKeyUpdateOfADeadOwner(t *testing.T) {
	guest.NeedKernelTLS(t)
	guest.NeedKernel(t, 6, 14, "a change of keys")
	s := newChanging(t, gcm, true)
	s.send(typeHandshake, []byte(updateRequest))
	s.rekeyOut()
	s.send(typeData, []byte("x"))
	var got [64]byte
	for n := 0; n == 0; {
		err := onSocket(s.changer.sock, func(fd int) (err error) {
			n, _, _, err = sys.TLSRecv(fd, got[:])
			return err
		})
		if err != nil && !errors.Is(err, sys.EAGAIN) {
			t.Fatal(err)
		}
	}
	// Also for those who wait without a buffer, which must end.
	for waits := 0; ; waits++ {
		if err := s.conn.WaitRead(); err != nil {
			t.Fatal(err)
		}
		_ = s.conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		var b [1]byte
		n, err := s.conn.Read(b[:])
		if n == 1 && b[0] == 'x' {
			break
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) || waits > 100 {
			t.Fatalf("Read: %d bytes, %v", n, err)
		}
		_ = s.conn.SetReadDeadline(time.Now().Add(testWait))
	}
	s.want(typeHandshake, updateOnly)
	s.rekeyIn()
	if _, err := s.conn.Write([]byte("y")); err != nil {
		t.Fatal(err)
	}
	s.want(typeData, "y")
}

// A copy from a file that a deadline ended may leave a record open in the kernel. It is
// closed before the pause, or its sequence number would be taken for the KeyUpdate's.
func TestRelayPauseClosesAnOpenRecord(t *testing.T) {
	guest.NeedKernelTLS(t)
	guest.NeedKernel(t, 6, 14, "a change of keys")
	content := pattern(1 << 20)
	name := filepath.Join(t.TempDir(), "content")
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 5 { // where the file is cut depends on the moment
		s := newChanging(t, gcm, true)
		s.smallBuffers()
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		_ = s.conn.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
		n, err := io.Copy(s.conn, f)
		_ = f.Close()
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("Copy to a peer that does not read: %d, %v", n, err)
		}
		_ = s.conn.SetDeadline(time.Now().Add(testWait))
		s.send(typeHandshake, []byte(updateRequest))
		s.rekeyOut()
		s.send(typeData, []byte("x"))
		read := make(chan error, 1)
		go func() { _, err := s.conn.Read(make([]byte, 1)); read <- err }()
		var got []byte
		for {
			typ, p, err := s.next()
			if err != nil {
				t.Fatal(err)
			}
			if typ == typeHandshake {
				break
			}
			got = append(got, p...)
		}
		s.rekeyIn()
		if err := <-read; err != nil {
			t.Fatal(err)
		}
		if _, err := s.conn.Write([]byte("end")); err != nil {
			t.Fatal(err)
		}
		got = append(got, s.wantData(int(n)-len(got)+len("end"))...)
		if string(got) != string(content[:n])+"end" {
			t.Fatalf("%d bytes arrived, %d were taken, or others", len(got), n)
		}
	}
}

// What WaitRead meets when it looks for itself is not lost for Read, although the socket
// says it only once; and nobody else gets the session then.
func TestWaitReadKeepsErrors(t *testing.T) {
	guest.NeedKernelTLS(t)
	for name, tc := range map[string]struct {
		send func(s *scripted)
		want func(err error) bool
	}{
		"bad header": {func(s *scripted) { s.sendRaw([]byte("\x17\x00\x00\x00\x20 0123456789 0123456789 0123456789")) },
			func(err error) bool { var a *AlertError; return errors.As(err, &a) && a.Sent }},
		"bad record": {func(s *scripted) { s.sendRaw([]byte("\x17\x03\x03\x00\x20 0123456789 0123456789 012345678")) },
			func(err error) bool { var a *AlertError; return errors.As(err, &a) && a.Alert == alertBadRecordMAC }},
		"reset": {func(s *scripted) { _ = s.c.SetLinger(0); _ = s.c.Close() },
			func(err error) bool { return errors.Is(err, sys.ECONNRESET) }},
	} {
		for _, detach := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, detach %v", name, detach), func(t *testing.T) {
				s := newScripted(t, LayerKernel, v13, gcm)
				tc.send(s)
				l := s.conn.layer.(*kernelLayer)
				_ = s.conn.SetDeadline(time.Now().Add(testWait))
				// As when it arrives just after poll was asked.
				if err := l.rc.Read(l.peek); err != nil {
					t.Fatal(err)
				}
				if detach {
					if _, _, err := s.conn.Detach(); err == nil || !tc.want(err) {
						t.Fatalf("Detach: %v", err)
					}
				}
				if _, err := s.conn.Read(make([]byte, 10)); !tc.want(err) {
					t.Fatalf("Read: %v", err)
				}
			})
		}
	}
}
