package supervise

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

type rekeyAnswer struct {
	rep *admin.RekeyReport
	err error
}

// rekey asks as the admin API does; the answer comes later.
func (u *unit) rekey(r admin.RekeyRequest) <-chan rekeyAnswer {
	b := &backend{s: u.s, ended: make(chan struct{})}
	done := make(chan rekeyAnswer, 1)
	go func() {
		rep, err := b.Rekey(context.Background(), r, func(admin.Progress) {})
		done <- rekeyAnswer{rep, err}
	}()
	return done
}

func (u *unit) answered(c <-chan rekeyAnswer) *admin.RekeyReport {
	u.t.Helper()
	select {
	case a := <-c:
		if a.err != nil {
			u.t.Fatal(a.err)
		}
		return a.rep
	case <-time.After(patience):
		u.t.Fatal("no answer")
	}
	return nil
}

// soft admits a session of the software layer that f owns.
func (u *unit) soft(f *fake, version uint16) wire.Ref {
	u.t.Helper()
	ref := u.owned(f, true)
	u.s.call(func() {
		if err := u.s.led.putFacts(int(u.s.sessions[ref.ID].slot), &facts{Pool: "p", Version: version}); err != nil {
			u.t.Error(err)
		}
	})
	return ref
}

// One of each kind: every session is in the report once, under what became of it.
func TestRekeyAllSessions(t *testing.T) {
	u, f, kernel, k := keyed(t)
	soft, old, full := u.soft(f, tls.VersionTLS13), u.soft(f, tls.VersionTLS12), u.soft(f, tls.VersionTLS13)
	ends := u.soft(f, tls.VersionTLS13)
	answer := u.rekey(admin.RekeyRequest{RequestPeer: true})

	// In the order of their ids.
	f.expectRekey(wire.TypePause, kernel)
	for _, ref := range []wire.Ref{soft, full, ends} {
		if m := f.expectRekey(wire.TypeUpdate, ref); !m.Request {
			t.Error("UPDATE without the request")
		}
	}
	f.say(wire.TypePaused, kernel)
	if m := f.expectRekey(wire.TypeSend, kernel); !m.Request || m.Record[4] != 1 {
		t.Errorf("SEND %+v without the request", m)
	}
	k.wrote(1)
	f.say(wire.TypeSent, kernel)
	f.expectRekey(wire.TypeContinue, kernel)
	f.say(wire.TypeSent, soft)
	f.send(rekeyMessage(wire.TypeSent, wire.Rekey{Ref: full, Failed: "no room"}))
	f.send(&wire.Message{Type: wire.TypeClosed, Closed: []wire.Closed{{Ref: ends, Reason: wire.ReasonPeer}}})
	f.expect(wire.TypeClosedAck)

	rep := u.answered(answer)
	want := admin.RekeyReport{Outcome: admin.OutcomeStay, Updated: 2, Ended: 1, FailedCount: 1, UnsupportedCount: 1,
		Failed:      []admin.SessionNote{{Session: sid(full.ID), Why: "no room"}},
		Unsupported: []admin.SessionNote{{Session: sid(old.ID), Why: "TLS 1.2 has no KeyUpdate"}}}
	rep.DurationSecs = 0
	if got, want := fmt.Sprintf("%+v", *rep), fmt.Sprintf("%+v", want); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	u.wantKeys(kernel.ID, k, 1, 0, 0)
}

// Sessions that cannot ever, or not now, are not touched, and it is said why.
func TestRekeyLeavesAlone(t *testing.T) {
	for name, tc := range map[string]struct {
		change      func(u *unit, ss *session)
		why         string
		unsupported bool
	}{
		"a kernel that cannot":            {func(u *unit, _ *session) { u.s.kernel.Rekey = false }, "6.14", true},
		"a worker that cannot be reached": {func(_ *unit, ss *session) { ss.owner().state = workerDetached }, "cannot be reached", false},
		"a session on the move":           {func(_ *unit, ss *session) { ss.Try = &attempt{Session: &ss.Session} }, "on its way to another worker", false},
		"a session of nobody":             {func(_ *unit, ss *session) { ss.Owner = nil }, "on its way to another worker", false},
	} {
		t.Run(name, func(t *testing.T) {
			u, f, ref, _ := keyed(t)
			var saved session
			var state workerState
			u.s.call(func() {
				saved, state = *u.s.sessions[ref.ID], f.w.state
				tc.change(u, u.s.sessions[ref.ID])
			})
			rep := u.answered(u.rekey(admin.RekeyRequest{Sessions: []string{sid(ref.ID), sid(ref.ID)}}))
			u.s.call(func() { *u.s.sessions[ref.ID], f.w.state = saved, state })
			list, n := rep.Failed, rep.FailedCount
			if tc.unsupported {
				list, n = rep.Unsupported, rep.UnsupportedCount
			}
			if n != 1 || len(list) != 1 || list[0].Session != sid(ref.ID) || !strings.Contains(list[0].Why, tc.why) {
				t.Errorf("report %+v", rep)
			}
			if want := map[bool]admin.Outcome{true: admin.OutcomeMoved, false: admin.OutcomeStay}[tc.unsupported]; rep.Outcome != want {
				t.Errorf("exit code %d, want %d", rep.Outcome, want)
			}
			u.silent(f)
			u.s.call(func() {
				if ss := u.s.sessions[ref.ID]; ss.owes != 0 || ss.rekey != nil {
					t.Errorf("something is under way: owes %d, %+v", ss.owes, ss.rekey)
				}
			})
		})
	}
}

func TestRekeyRefused(t *testing.T) {
	u, f, ref, _ := keyed(t)
	for name, r := range map[string]admin.RekeyRequest{
		"a session that is not there": {Sessions: []string{sid(ref.ID), "s4711"}},
		"a pool that is not there":    {Pool: "q"},
	} {
		a := <-u.rekey(r)
		if !errors.Is(a.err, admin.ErrBadRequest) {
			t.Errorf("%s: %+v", name, a)
		}
	}
	u.s.call(func() { u.s.quiescing = true })
	if a := <-u.rekey(admin.RekeyRequest{}); !errors.Is(a.err, admin.ErrBusy) {
		t.Errorf("while a successor starts: %+v", a)
	}
	u.s.call(func() { u.s.quiescing = false })
	u.silent(f)
}

// A session that does not answer costs the request its time and nothing else: the
// change stays under way, and others have their turn.
func TestRekeyBounds(t *testing.T) {
	u := newUnit(t)
	f := u.worker(1)
	var all []wire.Ref
	for range rekeyWindow + 1 - 4 { // the ledger of these tests has 64 slots
		all = append(all, u.soft(f, tls.VersionTLS13))
	}
	first := all[0]
	answer := u.rekey(admin.RekeyRequest{Pool: "p", Wait: 3 * rekeySlow / 2})
	for _, ref := range all {
		f.expectRekey(wire.TypeUpdate, ref)
	}
	for _, ref := range all[1:] {
		f.say(wire.TypeSent, ref)
	}
	rep := u.answered(answer)
	if rep.Updated != len(all)-1 || rep.FailedCount != 1 || rep.Failed[0].Session != sid(first.ID) ||
		!strings.Contains(rep.Failed[0].Why, "stays under way") || rep.Outcome != admin.OutcomeStay {
		t.Errorf("report %+v", rep)
	}
	f.say(wire.TypeSent, first) // late
	u.settle(f)
}

// The window: no more than so many at a time, and slow ones do not stop the rest.
func TestRekeyWindow(t *testing.T) {
	u := newUnit(t)
	r := &rekeyRun{s: u.s, pending: map[uint64]time.Time{}, results: make(chan rekeyResult, 1000)}
	for id := range uint64(3 * rekeyWindow) {
		r.ids = append(r.ids, id+1000) // that have ended
	}
	for i, want := range []int{2 * rekeyWindow, 2 * rekeyWindow} {
		if !r.start() || len(r.ids) != want {
			t.Fatalf("start %d: %d left, want %d", i, len(r.ids), want)
		}
	}
	for id := range r.pending {
		r.pending[id] = time.Now().Add(-2 * rekeySlow)
	}
	if r.start(); len(r.ids) != rekeyWindow {
		t.Errorf("with %d slow ones: %d left, want %d", rekeyWindow, len(r.ids), rekeyWindow)
	}
}

// A supervisor that goes away over it says what it did.
func TestRekeyWhileReplaced(t *testing.T) {
	u, f, ref, _ := keyed(t)
	answer := u.rekey(admin.RekeyRequest{})
	f.expectRekey(wire.TypePause, ref)
	u.crash()
	rep := u.answered(answer)
	if rep.FailedCount != 1 || !strings.Contains(rep.Failed[0].Why, "being replaced") {
		t.Errorf("report %+v", rep)
	}
	f.reply(wire.Held{Ref: ref, Phase: wire.PhaseActive})
	u.recovered()
	u.until(func() bool { return u.s.sessions[ref.ID].owes != 0 }) // and the successor does it
	f.expectRekey(wire.TypePause, ref)
}

func TestRekeyListsAreBounded(t *testing.T) {
	r := &rekeyRun{pending: map[uint64]time.Time{}}
	for id := range uint64(admin.MaxRekeyListed + 5) {
		r.count(rekeyResult{id, errNoKeyUpdate})
	}
	if r.rep.UnsupportedCount != admin.MaxRekeyListed+5 || len(r.rep.Unsupported) != admin.MaxRekeyListed {
		t.Errorf("%d counted, %d listed", r.rep.UnsupportedCount, len(r.rep.Unsupported))
	}
}
