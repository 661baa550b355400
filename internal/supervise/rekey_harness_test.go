package supervise

import (
	"bytes"
	"crypto/tls"
	"errors"
	"sync"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// fakeKernel has one socket's keys and sequence numbers, and fails the test when a
// nonce would be used twice.
type fakeKernel struct {
	t  *testing.T
	mu sync.Mutex
	tx fakeDirection
	rx fakeDirection
	// die is called before and after a key is set; the supervisor that asked is dead
	// when it returns true.
	die  func(after bool) bool
	died bool
}

type fakeDirection struct {
	secret []byte
	seq    uint64
	had    [][]byte
}

var errKilled = errors.New("this supervisor was killed")

func (k *fakeKernel) dying() func(bool) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.die
}

func (k *fakeKernel) dir(d ktls.Direction) *fakeDirection {
	if d == ktls.Sending {
		return &k.tx
	}
	return &k.rx
}

func (k *fakeKernel) position(_ int, c *ktls.KeyChange) (bool, uint64, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	d := k.dir(c.Direction)
	switch {
	case bytes.Equal(d.secret, c.Current):
		return false, d.seq, nil
	case bytes.Equal(d.secret, c.Next):
		return true, d.seq, nil
	}
	return false, 0, ktls.ErrKeyDoubt
}

func (k *fakeKernel) apply(fd int, c *ktls.KeyChange) error {
	next, _, err := k.position(fd, c)
	if err != nil || next {
		return err
	}
	if die := k.dying(); die != nil && die(false) {
		return errKilled
	}
	k.mu.Lock()
	d := k.dir(c.Direction)
	d.had = append(d.had, d.secret)
	for _, s := range d.had {
		if bytes.Equal(s, c.Next) {
			k.t.Errorf("a key to %s was set a second time", c.Direction)
		}
	}
	d.secret, d.seq = bytes.Clone(c.Next), 0
	k.mu.Unlock()
	if die := k.dying(); die != nil && die(true) {
		return errKilled
	}
	return nil
}

// wrote is the owner sending n records.
func (k *fakeKernel) wrote(n uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.tx.seq += n
}

func (k *fakeKernel) generation(d ktls.Direction) (n int, seq uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.dir(d).had), k.dir(d).seq
}

// keyed is a unit with a session of the kernel layer that f owns, and its kernel.
func keyed(t *testing.T) (*unit, *fake, wire.Ref, *fakeKernel) {
	t.Helper()
	u := newUnit(t)
	k := &fakeKernel{t: t}
	k.tx.secret, k.rx.secret = bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32)
	k.tx.seq = 1 // a ticket
	u.keys = k
	u.s.call(func() { u.s.keys, u.s.kernel.Rekey = k, true })
	f := u.worker(1)
	u.keyedSession(k)
	m := f.expect(wire.TypeAdopt)
	ref := m.Items[0].Ref
	f.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(ref)})
	f.expect(wire.TypeResume)
	return u, f, ref, k
}

func (u *unit) keyedSession(k *fakeKernel) {
	u.t.Helper()
	id := u.sessionWith(func(a *admission) {
		a.facts.Version, a.facts.Suite = tls.VersionTLS13, tls.TLS_AES_128_GCM_SHA256
	})
	u.s.call(func() {
		if err := u.s.led.initKeys(int(u.s.sessions[id].slot), k.tx.secret, k.rx.secret); err != nil {
			u.t.Error(err)
		}
	})
}

func rekeyMessage(typ wire.Type, r wire.Rekey) *wire.Message {
	return &wire.Message{Type: typ, Rekeys: []wire.Rekey{r}}
}

func (f *fake) say(typ wire.Type, ref wire.Ref) { f.send(rekeyMessage(typ, wire.Rekey{Ref: ref})) }

func (f *fake) expectRekey(typ wire.Type, ref wire.Ref) wire.Rekey {
	f.t.Helper()
	m := f.expect(typ)
	if len(m.Rekeys) != 1 || m.Rekeys[0].Ref != ref || m.Rekeys[0].Failed != "" {
		f.t.Fatalf("%s %+v, want %+v", typ, m.Rekeys, ref)
	}
	return m.Rekeys[0]
}

// wantKeys checks what the ledger knows of the keys, and that no change is under way.
func (u *unit) wantKeys(id uint64, k *fakeKernel, tx, rx int, owes owed) {
	u.t.Helper()
	u.until(func() bool {
		ss := u.s.sessions[id]
		return ss != nil && ss.rekey == nil && u.s.keyOps == 0
	})
	u.s.call(func() {
		ss := u.s.sessions[id]
		a, b := u.s.led.keys(int(ss.slot), ktls.Sending), u.s.led.keys(int(ss.slot), ktls.Receiving)
		if int(a.gen) != tx || int(b.gen) != rx || a.next != nil || b.next != nil || ss.owes != owes {
			u.t.Errorf("ledger: generation %d and %d, changes under way %v and %v, owes %d; want %d and %d, none, %d",
				a.gen, b.gen, a.next != nil, b.next != nil, ss.owes, tx, rx, owes)
		}
		if !bytes.Equal(a.current, k.tx.secret) || !bytes.Equal(b.current, k.rx.secret) {
			u.t.Error("the ledger's secrets are not those in the socket")
		}
	})
	if n, _ := k.generation(ktls.Sending); n != tx {
		u.t.Errorf("sending generation %d in the socket, want %d", n, tx)
	}
	if n, _ := k.generation(ktls.Receiving); n != rx {
		u.t.Errorf("receiving generation %d in the socket, want %d", n, rx)
	}
}

// answer is an owner's part of a KeyUpdate of ours.
func (f *fake) answer(k *fakeKernel, ref wire.Ref, request bool) {
	f.t.Helper()
	f.expectRekey(wire.TypePause, ref)
	k.wrote(3) // before it came to its pause
	f.say(wire.TypePaused, ref)
	m := f.expectRekey(wire.TypeSend, ref)
	if !bytes.Equal(m.Record, ktls.KeyUpdateMessage(request)) {
		f.t.Fatalf("SEND %v", m.Record)
	}
	k.wrote(1)
	f.say(wire.TypeSent, ref)
	f.expectRekey(wire.TypeContinue, ref)
}

// sent is a worker that has carried out SEND, and hears how it ends.
func (f *fake) sent(_ *fakeKernel, ref wire.Ref) {
	f.t.Helper()
	f.say(wire.TypeSent, ref)
	f.expectRekey(wire.TypePause, ref)
	f.expectRekey(wire.TypeContinue, ref)
}

func (f *fake) wantUpdate(ref wire.Ref) {
	f.t.Helper()
	f.send(rekeyMessage(wire.TypeWantUpdate, wire.Rekey{Ref: ref}))
	f.expectRekey(wire.TypePause, ref)
}
