package supervise

import (
	"bytes"
	"crypto/tls"
	"errors"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

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
