package handoff

import (
	"errors"
	"os"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// A worker has no keys of sessions in the kernel layer: the supervisor changes them,
// and this file does the owner's part. See PROTOCOL.md, Changing keys.

// relay passes on what a session's record layer needs. It is called with locks held.
type relay struct {
	w    *worker
	s    *session
	base uint64 // the client's KeyUpdates since the adoption, before this Conn
}

func (r relay) KeyUpdateReceived(n uint64, requested bool) {
	r.post(&wire.Message{Type: wire.TypeKeyUpdate, Rekeys: []wire.Rekey{{Count: r.base + n, Request: requested}}})
}

func (r relay) KeyUpdateWanted(request bool) {
	r.post(&wire.Message{Type: wire.TypeWantUpdate, Rekeys: []wire.Rekey{{Request: request}}})
}

func (r relay) post(m *wire.Message) {
	r.w.in.post(func() {
		if r.w.sessions[r.s.id] != r.s || r.s.phase == phaseClosing {
			return
		}
		if r.w.gone != nil {
			r.w.keysStay(r.s)
			return
		}
		m.Rekeys[0].Ref = r.s.ownership()
		r.s.updates = max(r.s.updates, m.Rekeys[0].Count)
		r.w.send(m)
	})
}

func (s *session) ownership() wire.Ref { return wire.Ref{ID: s.id, Epoch: s.owner} }

// relayed leaves changes of a session's keys to the supervisor, if it can. A session that
// was parked and goes on here has another Conn, and the same count.
func (w *worker) relayed(s *session, t *ktls.Conn) {
	s.base = s.updates
	if w.vault != nil {
		w.vault.give(s.id, t)
		return
	}
	if w.welcome != nil && w.welcome.Rekey {
		t.SetRelay(relay{w, s, s.base})
	}
}

// keysStay ends a session whose keys would have to change, when nobody is left to
// change them.
func (w *worker) keysStay(s *session) {
	if s.phase == phaseRunning || s.phase == phaseIdle {
		w.end(s, wire.ReasonKeyUpdate, errors.New("its keys cannot be changed: the supervisor is gone"))
	}
}

// lentOut says whether a session takes part in a change of keys, so that it cannot be
// parked now.
func (s *session) lentOut() bool { return s.pausing || s.conn.session().Lent() }

// rekey handles the supervisor's part of changes of keys. A session that ends in a pause
// goes on with it to its end: nothing could be sent before, not even close_notify.
func (w *worker) rekey(m *wire.Message) {
	for i := range m.Rekeys {
		r := m.Rekeys[i]
		s := w.sessions[r.ID]
		if s == nil || s.owner != r.Epoch || s.phase == phaseAdopted || s.phase == phaseClosing && !s.pausing {
			w.stale(m.Type.String(), r.Ref)
			continue
		}
		switch m.Type {
		case wire.TypePause:
			s.pause = true
			w.startPause(s)
		case wire.TypeSend:
			w.sendUpdate(s, r)
		case wire.TypeUpdate:
			w.updateBySelf(s, r)
		case wire.TypeRekeyed:
			if r.Failed != "" {
				w.keysFailed(s, r.Failed)
				continue
			}
			if r.Count > s.base {
				s.conn.session().Rekeyed(r.Count - s.base)
			}
			w.returnedHome(s)
		case wire.TypeContinue:
			s.pause, s.pausing = false, false
			if r.Failed != "" {
				w.keysFailed(s, r.Failed)
				continue
			}
			switch {
			case s.phase == phaseClosing:
				go s.conn.session().Continue() // waits for the end's part in it
			case s.attached():
				s.conn.session().Continue()
			}
			w.returnedHome(s)
		default:
		}
	}
}

// attached reports that the session is on its Conn.
func (s *session) attached() bool { return s.phase == phaseRunning || s.phase == phaseIdle }

// startPause begins the pause that the supervisor asked for, if the session is on its
// Conn; if it is parked, its next owner is asked.
func (w *worker) startPause(s *session) {
	if !s.pause || !s.attached() {
		return
	}
	s.pause = false
	if s.pausing {
		return // PAUSED was or will be said, to a new supervisor after its INVENTORY
	}
	s.pausing = true
	t := s.conn.session()
	go func() {
		err := t.Pause()
		w.in.post(func() {
			if !s.pausing { // called off
				t.Continue()
				return
			}
			if err != nil {
				s.pausing = false
			}
			w.sayRekey(wire.TypePaused, s, err)
			w.returnedHome(s)
		})
	}()
}

func (w *worker) sendUpdate(s *session, r wire.Rekey) {
	if !s.pausing || !s.attached() {
		w.sayRekey(wire.TypeSent, s, errors.New("the session is in no pause"))
		return
	}
	request, ok := ktls.KeyUpdateRequest(r.Record)
	if !ok {
		w.sayRekey(wire.TypeSent, s, errors.New("this worker sends KeyUpdates only"))
		return
	}
	t := s.conn.session()
	go func() {
		err := t.SendKeyUpdate(request)
		w.in.post(func() { w.sayRekey(wire.TypeSent, s, err) })
	}()
}

// updateBySelf sends a KeyUpdate of a session whose keys are in this process.
func (w *worker) updateBySelf(s *session, r wire.Rekey) {
	if !s.attached() {
		w.sayRekey(wire.TypeSent, s, ErrMoving)
		return
	}
	t := s.conn.session()
	go func() {
		err := t.KeyUpdate(r.Request)
		w.in.post(func() { w.sayRekey(wire.TypeSent, s, err) })
	}()
}

func (w *worker) sayRekey(t wire.Type, s *session, err error) {
	if w.sessions[s.id] != s || s.given() {
		return // it has ended, or may be somebody else's by now
	}
	r := wire.Rekey{Ref: s.ownership()}
	if err != nil {
		r.Failed = wire.Clip(err.Error())
	}
	w.send(&wire.Message{Type: t, Rekeys: []wire.Rekey{r}})
}

// returnedHome does what had to wait for the end of a change of keys.
func (w *worker) returnedHome(s *session) {
	if w.sessions[s.id] != s || s.phase != phaseIdle || !s.parkLater || s.lentOut() {
		return
	}
	s.parkLater = false
	switch b := s.batch; {
	case b != nil && b.stage == batchExporting, b == nil && s.attempt != 0:
		w.park(s)
	default:
		w.step(s)
	}
}

// keysFailed closes a session of whose keys nobody can be sure any more.
func (w *worker) keysFailed(s *session, why string) {
	err := errors.New(why)
	w.log.Error("session closed: its keys could not be changed", "session", s.id, "error", why)
	s.conn.session().RelayFailed(err)
	if s.attached() {
		w.end(s, wire.ReasonLayer, err)
	}
}

// tellRekeys says again, to a new supervisor, how far changes of keys have come.
func (w *worker) tellRekeys() {
	for _, s := range w.sessions {
		if !s.attached() {
			continue
		}
		t := s.conn.session()
		paused, sent := t.Pausing()
		t.Remind()
		switch {
		case !s.pausing:
		case sent:
			w.sayRekey(wire.TypeSent, s, nil)
		case paused:
			w.sayRekey(wire.TypePaused, s, nil)
		}
	}
}

// KeyUpdate goes to the next sending key of a TLS 1.3 session, and asks the client to
// do the same when requestPeer is set (RFC 8446 section 4.6.3). It happens by itself
// before a key's limit of use. It is an error where version or kernel cannot do it,
// and ErrMoving while a move is wanted.
func (c *Conn) KeyUpdate(requestPeer bool) error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	s, err := c.staying()
	if err != nil {
		return err
	}
	err = s.KeyUpdate(requestPeer)
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if expired := !c.wdl.IsZero() && !time.Now().Before(c.wdl); c.wantsOutLocked() && !expired {
		c.told = true
		return ErrMoving
	}
	return err
}
