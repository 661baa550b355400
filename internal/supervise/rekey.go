package supervise

import (
	"errors"
	"fmt"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// Changes of keys in the kernel layer: the owner has no secrets, so it is told which
// record to send, and this process sets the keys on a duplicate of the socket. What is
// set is in the ledger before it is set, and what the ledger says is compared with the
// socket before anything is done: so this process and the owner may die at any step,
// and no key is ever set twice (I5).
//
//	receiving: KEY_UPDATE -> prepare -> set -> complete -> REKEYED
//	sending:   PAUSE -> PAUSED -> prepare, with the sequence number -> SEND -> SENT ->
//	           set, if the number has risen by one -> complete -> CONTINUE

// owed says what a session owes its peer, also over crashes.
type owed uint8

const (
	owesUpdate  owed = 1 // a KeyUpdate
	owesRequest owed = 2 // which asks for one in return
)

// stage is how far a change of the sending key has come.
type stage uint8

const (
	stageNone    stage = iota
	stagePausing       // PAUSE sent
	stagePaused        // PAUSED came; the socket is being looked at
	stageSending       // SEND sent
	stageSent          // SENT came; the key is being set
	stageSelf          // software layer: UPDATE sent
)

// rekeying is a change of keys under way.
type rekeying struct {
	stage   stage
	asked   owed // what SEND was sent for
	again   bool // something new is owed since; of a SEND of a supervisor before this one, too
	rx      bool // the receiving key is being set
	ops     int  // goroutines that work on the socket
	waiters []func(error)
	retryAt time.Time
	// settled is called, with the owner dead, when no goroutine works on the socket
	// any more.
	settled func()
}

// retryUpdate is when a KeyUpdate for which there was no room is tried again.
const retryUpdate = 2 * time.Second

// change is a session's rekeying, made when there is none.
func (ss *session) change() *rekeying {
	if ss.rekey == nil {
		ss.rekey = &rekeying{}
	}
	return ss.rekey
}

// rest forgets a rekeying in which nothing is under way.
func (ss *session) rest() {
	if r := ss.rekey; r != nil && r.stage == stageNone && !r.rx && !r.again && r.ops == 0 && len(r.waiters) == 0 && r.retryAt.IsZero() {
		ss.rekey = nil
	}
}

// owe records what a session owes, for whoever owns it and whoever supervises it.
func (s *Supervisor) owe(ss *session, o owed) {
	if ss.owes == o {
		return
	}
	ss.owes = o
	if ss.owner() != nil { // else interrupted records all of it, and how it comes to its next owner
		s.led.put(int(ss.slot), ss.slotEntry())
	}
	if o == 0 {
		delete(s.owing, ss.ID)
	} else {
		s.owing[ss.ID] = ss
	}
}

// onRekey handles a worker's part in changes of keys.
func (s *Supervisor) onRekey(w *worker, m *wire.Message) error {
	for i := range m.Rekeys {
		r := &m.Rekeys[i]
		ss := s.sessions[r.ID]
		if ss == nil {
			continue // it has ended meanwhile
		}
		if ss.owner() != w || ss.Epoch != r.Epoch {
			return fmt.Errorf("%w: %s for session %s, which it does not own", wire.ErrProtocol, m.Type, sid(r.ID))
		}
		if ss.software != (m.Type == wire.TypeSent && ss.rekey != nil && ss.rekey.stage == stageSelf) {
			if ss.software && m.Type == wire.TypeSent {
				continue // asked by a supervisor before this one
			}
			return fmt.Errorf("%w: %s for session %s, whose keys it has itself", wire.ErrProtocol, m.Type, sid(r.ID))
		}
		var err error
		switch m.Type {
		case wire.TypeKeyUpdate:
			err = s.onKeyUpdate(ss, r)
		case wire.TypeWantUpdate:
			o := owesUpdate
			if r.Request {
				o |= owesRequest
			}
			s.startUpdate(ss, o)
		case wire.TypePaused:
			s.onPaused(ss, r)
		case wire.TypeSent:
			s.onSent(ss, r)
		default:
		}
		if err != nil {
			return err
		}
		ss.rest()
	}
	return nil
}

// onKeyUpdate follows the peer to its next key.
func (s *Supervisor) onKeyUpdate(ss *session, m *wire.Rekey) error {
	k := s.led.keys(int(ss.slot), ktls.Receiving)
	defer k.wipe()
	goal := uint64(ss.rxBase) + m.Count
	if k.current == nil || m.Count == 0 || goal > uint64(k.gen)+1 {
		return fmt.Errorf("%w: KEY_UPDATE %d for session %s, which has followed %d", wire.ErrProtocol, m.Count, sid(ss.ID), k.gen-ss.rxBase)
	}
	if m.Request {
		s.owe(ss, ss.owes|owesUpdate)
	}
	switch {
	case goal <= uint64(k.gen):
		s.sayRekey(ss, wire.TypeRekeyed, wire.Rekey{Count: m.Count}) // done by a supervisor before this one
	case ss.rekey != nil && ss.rekey.rx: // told twice
	default:
		s.followKey(ss, m.Count)
	}
	if m.Request {
		s.startUpdate(ss, owesUpdate)
	}
	return nil
}

func (s *Supervisor) followKey(ss *session, count uint64) {
	c, k, err := s.keyChange(ss, ktls.Receiving)
	if err != nil {
		s.failKeys(ss, wire.TypeRekeyed, err)
		return
	}
	if k.next == nil { // otherwise a supervisor before this one may have set it already
		if err := s.led.prepare(int(ss.slot), ktls.Receiving, &k, c.Next, 0); err != nil {
			forget(c)
			s.failKeys(ss, wire.TypeRekeyed, err)
			return
		}
	}
	ss.change().rx = true
	s.onSocket(ss, func(fd int) error {
		defer forget(c)
		return s.keys.apply(fd, c)
	}, func(err error) {
		ss.rekey.rx = false
		if err != nil {
			s.failKeys(ss, wire.TypeRekeyed, err)
			return
		}
		s.led.complete(int(ss.slot), ktls.Receiving, k.gen)
		s.led.count(cntKeyUpdates, 1)
		s.sayRekey(ss, wire.TypeRekeyed, wire.Rekey{Count: count})
	})
}

// startUpdate begins to change a session's sending key, unless that is under way.
func (s *Supervisor) startUpdate(ss *session, o owed) {
	s.owe(ss, ss.owes|o)
	r := ss.change()
	if o != 0 && r.stage <= stagePausing && s.led.changing(int(ss.slot), ktls.Sending) {
		// A supervisor before this one had a KeyUpdate sent, perhaps before this was owed.
		r.again = true
	}
	switch {
	case r.stage == stageSending || r.stage == stageSent:
		// An answer to what came before is on its way. A request that came after it wants
		// another one.
		r.again = true
	case r.stage != stageNone, s.now().Before(r.retryAt), ss.Try != nil, ss.Withheld, ss.owner() == nil, !ss.owner().usable(), !ss.owner().rekeys:
		// Under way; or pump comes back to it, with whoever owns it then.
	default:
		r.retryAt = time.Time{}
		r.stage = stagePausing
		s.sayRekey(ss, wire.TypePause, wire.Rekey{})
	}
}

// payUpdates starts what is owed by sessions that could not pay before.
func (s *Supervisor) payUpdates() {
	for _, ss := range s.owing {
		if ss.rekey == nil || ss.rekey.stage == stageNone {
			s.startUpdate(ss, 0)
		}
	}
}

// onPaused notes where the sending direction stands, and has the KeyUpdate sent.
func (s *Supervisor) onPaused(ss *session, m *wire.Rekey) {
	r := ss.change()
	c, k, err := s.keyChange(ss, ktls.Sending)
	if err != nil {
		s.failKeys(ss, wire.TypeContinue, err)
		return
	}
	switch {
	case m.Failed != "": // the session is at its end, or does not send any more
		forget(c)
		if ss.Try == nil { // otherwise its next owner may have more luck
			s.owe(ss, 0)
		}
		s.endUpdate(ss, errors.New(m.Failed))
		return
	case r.stage == stagePaused || r.stage == stageSending || r.stage == stageSent:
		forget(c)
		return // told twice
	case k.next == nil && (ss.owes == 0 || ss.Try != nil):
		// Nothing to do any more; or the session is on its way to another owner, who does it.
		forget(c)
		s.continueWriting(ss, errMovesFirst)
		return
	}
	r.stage = stagePaused
	var next bool
	var seq uint64
	s.onSocket(ss, func(fd int) (err error) {
		next, seq, err = s.keys.position(fd, c)
		return err
	}, func(err error) {
		defer forget(c)
		switch {
		case err == nil && k.next == nil && !next:
			if err := s.led.prepare(int(ss.slot), ktls.Sending, &k, c.Next, seq); err != nil {
				s.failKeys(ss, wire.TypeContinue, err)
				return
			}
		case err == nil && k.next != nil && !next && seq == k.seq:
			// A supervisor before this one came as far as this; its SEND was not carried out.
		case err == nil && k.next != nil && (next || seq == k.seq+1):
			r.asked = ss.owes
			s.setSendingKey(ss)
			return
		default:
			s.failKeys(ss, wire.TypeContinue, doubt(err, k.seq, seq))
			return
		}
		r.stage, r.asked, r.again = stageSending, ss.owes, false
		s.sayRekey(ss, wire.TypeSend, wire.Rekey{Request: ss.owes&owesRequest != 0,
			Record: ktls.KeyUpdateMessage(ss.owes&owesRequest != 0)})
	})
}

// errMovesFirst is about a KeyUpdate that stays owed.
var errMovesFirst = errors.New("the session is on its way to another worker, which will send it")

func doubt(err error, was, is uint64) error {
	if err == nil {
		err = fmt.Errorf("sequence number %d, %d expected: %w", is, was, ktls.ErrKeyDoubt)
	}
	return err
}

// onSent sets the next sending key.
func (s *Supervisor) onSent(ss *session, m *wire.Rekey) {
	r := ss.change()
	switch {
	case r.stage == stageSelf:
		r.stage = stageNone
		var err error
		if m.Failed != "" {
			err = errors.New(m.Failed)
		}
		s.endUpdate(ss, err)
	case r.stage == stageSent || r.stage == stagePaused: // told twice
	case m.Failed == "":
		s.setSendingKey(ss)
	default:
		s.notSent(ss, errors.New(m.Failed))
	}
}

// notSent takes the intent back, when the socket says so too.
func (s *Supervisor) notSent(ss *session, why error) {
	r := ss.change()
	c, k, err := s.keyChange(ss, ktls.Sending)
	if err != nil || k.next == nil {
		if err == nil {
			forget(c)
		}
		s.continueWriting(ss, why)
		return
	}
	r.stage = stageSent
	var next bool
	var seq uint64
	s.onSocket(ss, func(fd int) (err error) {
		defer forget(c)
		next, seq, err = s.keys.position(fd, c)
		return err
	}, func(err error) {
		if err != nil || next || seq != k.seq {
			s.failKeys(ss, wire.TypeContinue, doubt(err, k.seq, seq))
			return
		}
		s.led.abort(int(ss.slot), ktls.Sending)
		r.retryAt = s.now().Add(retryUpdate)
		s.continueWriting(ss, why)
	})
}

// setSendingKey sets the key that follows the KeyUpdate that was sent.
func (s *Supervisor) setSendingKey(ss *session) {
	r := ss.change()
	c, k, err := s.keyChange(ss, ktls.Sending)
	switch {
	case err != nil:
		s.failKeys(ss, wire.TypeContinue, err)
		return
	case k.next == nil: // done by a supervisor before this one
		forget(c)
		s.continueWriting(ss, nil)
		return
	}
	if r.stage == stageNone || r.stage == stagePausing {
		// A supervisor before this one had it sent; what is owed since, the owner tells.
		r.asked = ss.owes
	}
	r.stage = stageSent
	s.onSocket(ss, func(fd int) error {
		defer forget(c)
		next, seq, err := s.keys.position(fd, c)
		switch {
		case err != nil || next:
			return err
		case seq != k.seq+1:
			return doubt(nil, k.seq+1, seq)
		}
		return s.keys.apply(fd, c)
	}, func(err error) {
		if err != nil {
			s.failKeys(ss, wire.TypeContinue, err)
			return
		}
		s.sentKeySet(ss, k.gen)
		s.continueWriting(ss, nil)
	})
}

// sentKeySet records that the sending key of the generation after gen is in force.
func (s *Supervisor) sentKeySet(ss *session, gen uint32) {
	s.led.complete(int(ss.slot), ktls.Sending, gen)
	s.led.count(cntKeyUpdates, 1)
	left := ss.owes &^ ss.change().asked
	if ss.change().again {
		left |= owesUpdate
	}
	s.owe(ss, left)
}

// continueWriting ends a pause.
func (s *Supervisor) continueWriting(ss *session, err error) {
	s.sayRekey(ss, wire.TypeContinue, wire.Rekey{})
	s.endUpdate(ss, err)
}

// endUpdate tells whoever asked for a KeyUpdate how it went.
func (s *Supervisor) endUpdate(ss *session, err error) {
	r := ss.change()
	r.stage, r.asked, r.again = stageNone, 0, false
	list := r.waiters
	r.waiters = nil
	for _, f := range list {
		f(err)
	}
	if err == nil && ss.owes != 0 {
		s.startUpdate(ss, 0)
	}
}

// failKeys ends a session whose keys are in doubt.
func (s *Supervisor) failKeys(ss *session, answer wire.Type, err error) {
	s.log.Error("session closed: its keys could not be changed", "session", sid(ss.ID), "error", err)
	s.owe(ss, 0)
	s.sayRekey(ss, answer, wire.Rekey{Failed: wire.Clip("keys could not be changed: " + err.Error())})
	s.endUpdate(ss, err)
	if ss.owner() == nil {
		s.lose(ss, "its keys are in doubt: "+err.Error())
	}
}

func (s *Supervisor) sayRekey(ss *session, t wire.Type, r wire.Rekey) {
	if ss.owner() == nil {
		return
	}
	r.Ref = wire.Ref{ID: ss.ID, Epoch: ss.Epoch}
	s.send(ss.owner(), &wire.Message{Type: t, Rekeys: []wire.Rekey{r}})
}

// parkedKeys is told that a session was parked. Its owner had to end a change of keys
// before; only a PAUSE may have crossed.
func (s *Supervisor) parkedKeys(ss *session) error {
	r := ss.rekey
	if r == nil {
		return nil
	}
	if r.rx || r.stage > stagePausing && r.stage != stageSelf {
		return fmt.Errorf("%w: PARKED for session %s, whose keys are being changed", wire.ErrProtocol, sid(ss.ID))
	}
	switch r.stage {
	case stageNone:
	case stageSelf:
		s.endUpdate(ss, errOnTheMove)
	default:
		s.endUpdate(ss, errMovesFirst)
	}
	ss.rest()
	return nil
}
