package supervise

import (
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

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

// tellsOfKeyUpdate is an owner that read the client's first KeyUpdate.
func tellsOfKeyUpdate(f *fake, _ *fakeKernel, ref wire.Ref) {
	f.t.Helper()
	f.send(rekeyMessage(wire.TypeKeyUpdate, wire.Rekey{Ref: ref, Count: 1}))
	f.expectRekey(wire.TypeRekeyed, ref)
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
