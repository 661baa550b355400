package supervise

import (
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// sure has a worker answer, so that it is certain what it has heard.
func (u *unit) sure(f *fake) {
	u.t.Helper()
	u.s.call(func() { u.s.ping(f.w) })
	m := f.expect(wire.TypePing)
	f.send(&wire.Message{Type: wire.TypePong, Nonce: m.Nonce})
	u.until(func() bool { return !f.w.beat.open })
}

// surePlayed is sure for a worker that is played.
func (u *unit) surePlayed(f *fake) {
	u.t.Helper()
	u.s.call(func() { u.s.ping(f.w) })
	u.until(func() bool { return !f.w.beat.open })
}

// A worker whose channel ends before it has certainly read RESUME may have forgotten the
// session, and nobody else would serve it: it is killed, seen dead, and the session goes
// on in another. One that has answered since is left alone with what it serves.
func TestWorkerThatMayNotHaveHeardIsKilled(t *testing.T) {
	for name, end := range map[string]func(f *fake){
		"it hangs up":            func(f *fake) { _ = f.ch.Close() },
		"it breaks the protocol": func(f *fake) { f.send(nonsense) },
	} {
		for _, sure := range []bool{false, true} {
			t.Run(name+map[bool]string{true: ", having answered"}[sure], func(t *testing.T) {
				u := newUnit(t)
				f := u.worker(1)
				ref := u.owned(f, false)
				if sure {
					u.sure(f)
				}
				end(f)
				if sure {
					u.until(func() bool { return f.w.state == workerDetached })
					if owner, _ := u.owner(ref.ID); owner != f.w.ID {
						t.Errorf("owner %d, want the worker that serves it", owner)
					}
					return
				}
				other := u.worker(1)
				m := other.expect(wire.TypeAdopt)
				if m.Items[0].ID != ref.ID || m.Items[0].Flags&wire.FlagInterrupted == 0 {
					t.Errorf("ADOPT %+v", m.Items)
				}
				u.s.call(func() {
					if u.s.workers[f.w.ID] != nil {
						t.Error("offered before its owner was seen dead")
					}
				})
			})
		}
	}
}
