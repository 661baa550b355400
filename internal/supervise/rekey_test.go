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

func TestPeersKeyUpdate(t *testing.T) {
	u, f, ref, k := keyed(t)
	f.send(rekeyMessage(wire.TypeKeyUpdate, wire.Rekey{Ref: ref, Count: 1}))
	if m := f.expectRekey(wire.TypeRekeyed, ref); m.Count != 1 {
		t.Fatalf("REKEYED %+v", m)
	}
	u.wantKeys(ref.ID, k, 0, 1, 0)

	f.send(rekeyMessage(wire.TypeKeyUpdate, wire.Rekey{Ref: ref, Count: 2, Request: true}))
	m := f.expect(wire.TypePause)
	if m.Rekeys[0].Ref != ref {
		t.Fatal(m.Rekeys)
	}
	f.expectRekey(wire.TypeRekeyed, ref)
	f.say(wire.TypePaused, ref)
	f.expectRekey(wire.TypeSend, ref)
	k.wrote(1)
	f.say(wire.TypeSent, ref)
	f.expectRekey(wire.TypeContinue, ref)
	u.wantKeys(ref.ID, k, 1, 2, 0)

	// One it wants itself, because a key reached its limit.
	f.send(rekeyMessage(wire.TypeWantUpdate, wire.Rekey{Ref: ref, Request: true}))
	f.answer(k, ref, true)
	u.wantKeys(ref.ID, k, 2, 2, 0)
}

// The operator's word.
func TestKeyUpdateOnDemand(t *testing.T) {
	u, f, ref, k := keyed(t)
	done := make(chan error, 1)
	u.s.call(func() { u.s.updateKeys(u.s.sessions[ref.ID], false, func(err error) { done <- err }) })
	f.answer(k, ref, false)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	u.wantKeys(ref.ID, k, 1, 0, 0)

	soft := u.owned(f, true)
	u.s.call(func() {
		ss := u.s.sessions[soft.ID]
		if err := u.s.led.putFacts(int(ss.slot), &facts{Pool: "p", Version: tls.VersionTLS13}); err != nil {
			t.Error(err)
		}
		u.s.updateKeys(ss, true, func(err error) { done <- err })
	})
	if m := f.expectRekey(wire.TypeUpdate, soft); !m.Request {
		t.Error("UPDATE without the request")
	}
	f.send(rekeyMessage(wire.TypeSent, wire.Rekey{Ref: soft, Failed: "no room"}))
	if err := <-done; err == nil || err.Error() != "no room" {
		t.Fatal(err)
	}
}

// A KeyUpdate for which there was no room is taken back, and tried again later.
func TestKeyUpdateNotSent(t *testing.T) {
	u, f, ref, k := keyed(t)
	f.send(rekeyMessage(wire.TypeWantUpdate, wire.Rekey{Ref: ref}))
	f.expectRekey(wire.TypePause, ref)
	f.say(wire.TypePaused, ref)
	f.expectRekey(wire.TypeSend, ref)
	f.send(rekeyMessage(wire.TypeSent, wire.Rekey{Ref: ref, Failed: "no room"}))
	f.expectRekey(wire.TypeContinue, ref)
	if n, _ := k.generation(ktls.Sending); n != 0 {
		t.Fatal("a key was set although nothing was sent")
	}
	f.answer(k, ref, false) // after retryUpdate
	u.wantKeys(ref.ID, k, 1, 0, 0)
}

// Whatever an owner says, no key is set unless the socket agrees.
func TestLiesAboutKeys(t *testing.T) {
	for name, lie := range map[string]func(f *fake, k *fakeKernel, ref wire.Ref){
		"sent nothing": func(f *fake, k *fakeKernel, ref wire.Ref) { f.say(wire.TypeSent, ref) },
		"sent more":    func(f *fake, k *fakeKernel, ref wire.Ref) { k.wrote(2); f.say(wire.TypeSent, ref) },
		"sent, and says not": func(f *fake, k *fakeKernel, ref wire.Ref) {
			k.wrote(1)
			f.send(rekeyMessage(wire.TypeSent, wire.Rekey{Ref: ref, Failed: "no room"}))
		},
		"another key": func(f *fake, k *fakeKernel, ref wire.Ref) {
			k.mu.Lock()
			k.tx.secret = bytes.Repeat([]byte{9}, 32)
			k.mu.Unlock()
			f.say(wire.TypeSent, ref)
		},
	} {
		t.Run(name, func(t *testing.T) {
			u, f, ref, k := keyed(t)
			f.send(rekeyMessage(wire.TypeWantUpdate, wire.Rekey{Ref: ref}))
			f.expectRekey(wire.TypePause, ref)
			f.say(wire.TypePaused, ref)
			f.expectRekey(wire.TypeSend, ref)
			lie(f, k, ref)
			if m := f.expect(wire.TypeContinue); m.Rekeys[0].Failed == "" {
				t.Fatal("the session goes on")
			}
			if n, _ := k.generation(ktls.Sending); n != 0 {
				t.Error("a key was set")
			}
			f.send(&wire.Message{Type: wire.TypeClosed, Closed: []wire.Closed{{Ref: ref, Reason: wire.ReasonLayer}}})
			f.expect(wire.TypeClosedAck)
			if c := u.counters(); c.lost != 1 {
				t.Errorf("lost %d, want 1", c.lost)
			}
		})
	}
	// What could never be true costs the channel.
	for name, m := range map[string]wire.Rekey{
		"count 0": {}, "a KeyUpdate that was never reached": {Count: 2}, "far away": {Count: 1 << 60},
	} {
		t.Run(name, func(t *testing.T) {
			u, f, ref, _ := keyed(t)
			m.Ref = ref
			f.send(rekeyMessage(wire.TypeKeyUpdate, m))
			u.until(func() bool { return f.w.ch == nil })
		})
	}
	t.Run("parked meanwhile", func(t *testing.T) {
		u, f, ref, _ := keyed(t)
		u.worker(2)
		u.retire(f, 2)
		try := f.expect(wire.TypeFreeze).Refs[0]
		f.send(rekeyMessage(wire.TypeWantUpdate, wire.Rekey{Ref: ref}))
		u.settle(f)
		u.s.call(func() { u.s.sessions[ref.ID].change().stage = stageSending })
		f.send(parkedItem(try, "parked"))
		u.until(func() bool { return f.w.ch == nil })
	})
}

// The worker dies at each step of a change of its sending key: its next owner has the
// session with the keys that the peer has, and pays what is owed.
func TestWorkerDiesWhileKeysChange(t *testing.T) {
	steps := []string{"asked", "paused", "send", "record out", "sent"}
	for at, name := range steps {
		t.Run(name, func(t *testing.T) {
			u, f, ref, k := keyed(t)
			next := u.worker(1)
			f.send(rekeyMessage(wire.TypeKeyUpdate, wire.Rekey{Ref: ref, Count: 1, Request: true}))
			f.expectRekey(wire.TypePause, ref)
			f.expectRekey(wire.TypeRekeyed, ref)
			sent := false
			for range 1 {
				if at == 0 {
					break
				}
				f.say(wire.TypePaused, ref)
				if at == 1 {
					break
				}
				f.expectRekey(wire.TypeSend, ref)
				if at == 2 {
					break
				}
				k.wrote(1)
				sent = true
				if at == 3 {
					break
				}
				f.say(wire.TypeSent, ref)
			}
			f.kill()
			m := next.expect(wire.TypeAdopt)
			try := m.Items[0].Ref
			if m.Items[0].Flags&wire.FlagInterrupted == 0 {
				t.Error("not marked as interrupted")
			}
			next.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(try)})
			next.expect(wire.TypeResume)
			if !sent {
				next.answer(k, try, false)
			}
			u.wantKeys(ref.ID, k, 1, 1, 0)
			// And it goes on from there.
			next.send(rekeyMessage(wire.TypeKeyUpdate, wire.Rekey{Ref: try, Count: 1}))
			next.expectRekey(wire.TypeRekeyed, try)
			u.wantKeys(ref.ID, k, 1, 2, 0)
			if c := u.counters(); c.lost != 0 || c.interrupted != 1 {
				t.Errorf("counters %+v", c)
			}
		})
	}
	// When the dead one wrote after its pause, nothing is certain.
	t.Run("wrote in its pause", func(t *testing.T) {
		u, f, ref, k := keyed(t)
		u.worker(1)
		f.send(rekeyMessage(wire.TypeWantUpdate, wire.Rekey{Ref: ref}))
		f.expectRekey(wire.TypePause, ref)
		f.say(wire.TypePaused, ref)
		f.expectRekey(wire.TypeSend, ref)
		k.wrote(2)
		f.kill()
		u.until(func() bool { return u.s.sessions[ref.ID] == nil })
		if c := u.counters(); c.lost != 1 {
			t.Errorf("counters %+v", c)
		}
		u.peerSeesEnd(ref.ID)
	})
}

// The supervisor dies at each step of a change of either key. The owner tells its
// successor how far things are, and no key is set twice.
func TestSupervisorDiesWhileKeysChange(t *testing.T) {
	for name, tc := range map[string]struct {
		run func(u *unit, f *fake, k *fakeKernel, ref wire.Ref) // to the point where it dies
		// what the owner says to the next one, and does
		then   func(f *fake, k *fakeKernel, ref wire.Ref)
		tx, rx int
	}{
		"KEY_UPDATE not read": {
			run:  func(*unit, *fake, *fakeKernel, wire.Ref) {},
			then: tellsOfKeyUpdate, rx: 1,
		},
		"before the receiving key is set": {
			run:  func(u *unit, f *fake, k *fakeKernel, ref wire.Ref) { u.dieSetting(f, k, ref, false) },
			then: tellsOfKeyUpdate, rx: 1,
		},
		"after the receiving key is set": {
			run:  func(u *unit, f *fake, k *fakeKernel, ref wire.Ref) { u.dieSetting(f, k, ref, true) },
			then: tellsOfKeyUpdate, rx: 1,
		},
		"REKEYED sent and told again": {
			run: func(u *unit, f *fake, k *fakeKernel, ref wire.Ref) {
				f.send(rekeyMessage(wire.TypeKeyUpdate, wire.Rekey{Ref: ref, Count: 1}))
				f.expectRekey(wire.TypeRekeyed, ref)
			},
			then: tellsOfKeyUpdate, rx: 1,
		},
		"PAUSE sent": {
			run: func(u *unit, f *fake, k *fakeKernel, ref wire.Ref) { f.wantUpdate(ref) },
			then: func(f *fake, k *fakeKernel, ref wire.Ref) {
				f.answer(k, ref, false) // what is owed is in the ledger
			}, tx: 1,
		},
		"SEND sent, not carried out": {
			run: func(u *unit, f *fake, k *fakeKernel, ref wire.Ref) {
				f.wantUpdate(ref)
				f.say(wire.TypePaused, ref)
				f.expectRekey(wire.TypeSend, ref)
			},
			then: func(f *fake, k *fakeKernel, ref wire.Ref) {
				f.say(wire.TypePaused, ref)
				f.expectRekey(wire.TypePause, ref) // the debt in the ledger; crosses
				f.expectRekey(wire.TypeSend, ref)
				k.wrote(1)
				f.say(wire.TypeSent, ref)
				f.expectRekey(wire.TypeContinue, ref)
			}, tx: 1,
		},
		"record out": {
			run: func(u *unit, f *fake, k *fakeKernel, ref wire.Ref) {
				f.wantUpdate(ref)
				f.say(wire.TypePaused, ref)
				f.expectRekey(wire.TypeSend, ref)
				k.wrote(1)
			},
			then: (*fake).sent, tx: 1,
		},
		"record out, and another is owed since": {
			run: func(u *unit, f *fake, k *fakeKernel, ref wire.Ref) {
				f.wantUpdate(ref)
				f.say(wire.TypePaused, ref)
				f.expectRekey(wire.TypeSend, ref)
				k.wrote(1)
			},
			then: func(f *fake, k *fakeKernel, ref wire.Ref) {
				f.send(rekeyMessage(wire.TypeWantUpdate, wire.Rekey{Ref: ref}))
				f.say(wire.TypeSent, ref)
				f.expectRekey(wire.TypePause, ref) // crosses
				f.expectRekey(wire.TypeContinue, ref)
				f.answer(k, ref, false)
			}, tx: 2,
		},
		"before the sending key is set": {
			run:  func(u *unit, f *fake, k *fakeKernel, ref wire.Ref) { u.dieSettingTX(f, k, ref, false) },
			then: (*fake).sent, tx: 1,
		},
		"after the sending key is set": {
			run:  func(u *unit, f *fake, k *fakeKernel, ref wire.Ref) { u.dieSettingTX(f, k, ref, true) },
			then: (*fake).sent, tx: 1,
		},
		"CONTINUE sent": {
			run: func(u *unit, f *fake, k *fakeKernel, ref wire.Ref) {
				f.send(rekeyMessage(wire.TypeWantUpdate, wire.Rekey{Ref: ref}))
				f.answer(k, ref, false)
			},
			then: func(f *fake, k *fakeKernel, ref wire.Ref) {}, tx: 1,
		},
	} {
		t.Run(name, func(t *testing.T) {
			u, f, ref, k := keyed(t)
			tc.run(u, f, k, ref)
			if !k.died {
				u.crash()
			}
			f.reply(wire.Held{Ref: ref, Phase: wire.PhaseActive})
			u.recovered()
			tc.then(f, k, ref)
			u.wantKeys(ref.ID, k, tc.tx, tc.rx, 0)
			if c := u.counters(); c.lost != 0 || c.interrupted != 0 {
				t.Errorf("counters %+v", c)
			}
		})
	}
}

// sent is a worker that has carried out SEND, and hears how it ends.
func (f *fake) sent(_ *fakeKernel, ref wire.Ref) {
	f.t.Helper()
	f.say(wire.TypeSent, ref)
	f.expectRekey(wire.TypePause, ref)
	f.expectRekey(wire.TypeContinue, ref)
}

// tellsOfKeyUpdate is an owner that read the client's first KeyUpdate.
func tellsOfKeyUpdate(f *fake, _ *fakeKernel, ref wire.Ref) {
	f.t.Helper()
	f.send(rekeyMessage(wire.TypeKeyUpdate, wire.Rekey{Ref: ref, Count: 1}))
	f.expectRekey(wire.TypeRekeyed, ref)
}

func (f *fake) wantUpdate(ref wire.Ref) {
	f.t.Helper()
	f.send(rekeyMessage(wire.TypeWantUpdate, wire.Rekey{Ref: ref}))
	f.expectRekey(wire.TypePause, ref)
}

// dieSetting has the supervisor die before or after it sets the receiving key.
func (u *unit) dieSetting(f *fake, k *fakeKernel, ref wire.Ref, after bool) {
	u.dieIn(k, after, func() { f.send(rekeyMessage(wire.TypeKeyUpdate, wire.Rekey{Ref: ref, Count: 1})) })
}

func (u *unit) dieSettingTX(f *fake, k *fakeKernel, ref wire.Ref, after bool) {
	f.wantUpdate(ref)
	f.say(wire.TypePaused, ref)
	f.expectRekey(wire.TypeSend, ref)
	k.wrote(1)
	u.dieIn(k, after, func() { f.say(wire.TypeSent, ref) })
}

// dieIn stops the supervisor's goroutine for good while a key is being set.
func (u *unit) dieIn(k *fakeKernel, after bool, start func()) {
	reached, dead := make(chan struct{}), make(chan struct{})
	k.mu.Lock()
	k.died = true
	k.die = func(now bool) bool {
		if now != after {
			return false
		}
		close(reached)
		<-dead
		return true
	}
	k.mu.Unlock()
	start()
	<-reached
	u.crash()
	k.mu.Lock()
	k.die = nil
	k.mu.Unlock()
	close(dead)
}

// Whoever supervises when the ledger's page is torn finds the keys before or after.
func TestKeysInTheLedger(t *testing.T) {
	l, _ := newLedger(t, 1)
	const n = 0
	if err := l.putFacts(n, &facts{Pool: "p", Base: []byte("base")}); err != nil {
		t.Fatal(err)
	}
	l.put(n, entry{ID: 7, Phase: slotOwned})
	tx, rx := bytes.Repeat([]byte{1}, 48), bytes.Repeat([]byte{2}, 48)
	if err := l.initKeys(n, tx, rx); err != nil {
		t.Fatal(err)
	}
	next := bytes.Repeat([]byte{3}, 48)
	k := l.keys(n, ktls.Sending)
	if err := l.prepare(n, ktls.Sending, &k, next, 77); err != nil { // TestKeysAtEveryByte tears it
		t.Fatal(err)
	}
	if got := l.keys(n, ktls.Sending); got.gen != 0 || !bytes.Equal(got.current, tx) || !bytes.Equal(got.next, next) || got.seq != 77 {
		t.Fatalf("prepared: %+v", got)
	}
	l.complete(n, ktls.Sending, 0)
	if got := l.keys(n, ktls.Sending); got.gen != 1 || !bytes.Equal(got.current, next) || got.next != nil {
		t.Fatalf("complete: %+v", got)
	}
	if bytes.Contains(l.mem, tx) {
		t.Error("the secret of the generation before is still in the ledger")
	}
	k = l.keys(n, ktls.Sending)
	if err := l.prepare(n, ktls.Sending, &k, tx, 5); err != nil {
		t.Fatal(err)
	}
	l.abort(n, ktls.Sending)
	if got := l.keys(n, ktls.Sending); got.gen != 1 || got.next != nil {
		t.Fatalf("abort: %+v", got)
	}
	if got := l.keys(n, ktls.Receiving); got.gen != 0 || !bytes.Equal(got.current, rx) {
		t.Fatalf("the other direction: %+v", got)
	}
	l.free(0)
	if bytes.Contains(l.mem, next) || bytes.Contains(l.mem, rx) {
		t.Error("a freed slot keeps secrets")
	}
	// Whoever was killed while a slot was freed may have left anything in it.
	k = keyState{}
	if err := l.prepare(n, ktls.Receiving, &k, next, 0); err != nil {
		t.Fatal(err)
	}
	if err := l.initKeys(n, tx, rx); err != nil {
		t.Fatal(err)
	}
	if got := l.keys(n, ktls.Receiving); got.next != nil {
		t.Fatal("a key of the session before is this one's next")
	}
	if err := l.initKeys(n, make([]byte, 49), rx); !errors.Is(err, errTooLarge) {
		t.Error(err)
	}
}

// A worker that does not know these messages would close its channel: it gets none.
func TestKeysOfAWorkerThatKnowsNothing(t *testing.T) {
	u, f, ref, k := keyed(t)
	u.s.call(func() { f.w.rekeys = false })
	done := make(chan error, 1)
	u.s.call(func() { u.s.updateKeys(u.s.sessions[ref.ID], false, func(err error) { done <- err }) })
	if err := <-done; !errors.Is(err, errNotTheWorker) {
		t.Errorf("the operator is told %v", err)
	}
	u.s.call(func() { u.s.startUpdate(u.s.sessions[ref.ID], owesUpdate) }) // left by its owner before
	u.silent(f)
	u.s.call(func() { f.w.rekeys = true })
	f.answer(k, ref, false)
	u.wantKeys(ref.ID, k, 1, 0, 0)
}
