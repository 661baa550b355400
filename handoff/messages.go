package handoff

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// handle takes one message of the supervisor. An error means that the supervisor
// cannot be trusted any further; the message's descriptors are then still its own.
func (w *worker) handle(m *wire.Message) error {
	if w.gone != nil {
		m.Dispose()
		return nil
	}
	switch m.Type {
	case wire.TypeWelcome:
		return w.welcomed(m)
	case wire.TypePing:
		w.ping(m.Nonce)
		return nil
	case wire.TypeInventory:
		w.inventory(m.Nonce)
		return nil
	case wire.TypeStop:
		if m.Drain {
			w.draining = true
		} else {
			w.stop(millis(m.Millis))
		}
		return nil
	}
	if w.welcome == nil {
		return fmt.Errorf("%w: %s before WELCOME", wire.ErrProtocol, m.Type)
	}
	switch m.Type {
	case wire.TypeAdopt:
		w.adopt(m)
	case wire.TypeResume:
		w.resume(m)
	case wire.TypeAbort:
		for _, r := range m.Refs {
			if s := w.sessions[r.ID]; s != nil && s.phase == phaseAdopted && s.owner == r.Epoch {
				w.forget(s)
			} else {
				w.stale("ABORT", r)
			}
		}
	case wire.TypeFreeze:
		w.freeze(m)
		w.sendParked() // those at rest: all of them are there
	case wire.TypeThaw:
		w.thaw(m)
	case wire.TypeRelease:
		for _, r := range m.Refs {
			if s := w.sessions[r.ID]; s != nil && s.phase == phaseParked && s.attempt == r.Epoch && s.sent == r.Epoch {
				w.forget(s)
			} else {
				w.stale("RELEASE", r)
			}
		}
	case wire.TypeClosedAck:
		for _, r := range m.Refs {
			if e, ok := w.tombs[r.ID]; ok && e.Epoch == r.Epoch {
				delete(w.tombs, r.ID)
			} else {
				w.stale("CLOSED_ACK", r)
			}
		}
	case wire.TypeClose:
		w.kick(m.Refs)
	case wire.TypeGrouped:
		w.grouped(m.Refs[0], m.Group, m.Text)
	case wire.TypeCheckpointed:
		w.checkpointed(m.Nonce, m.Text)
	case wire.TypeMarks:
		return w.takeMarks(m)
	case wire.TypeRekeyed, wire.TypePause, wire.TypeSend, wire.TypeContinue, wire.TypeUpdate:
		w.rekey(m)
	default:
		return fmt.Errorf("%w: %s is not for a worker", wire.ErrProtocol, m.Type)
	}
	return nil
}

// millis is a time limit of the supervisor's, at most about 11 days.
func millis(n int64) time.Duration {
	return time.Duration(min(max(n, 0), 1e9)) * time.Millisecond
}

// stale notes a message about a session or an attempt that is over, which is normal:
// messages cross.
func (w *worker) stale(what string, r wire.Ref) {
	w.log.Debug("message about something that is over", "message", what, "session", r.ID, "epoch", uint64(r.Epoch))
}

func (w *worker) welcomed(m *wire.Message) error {
	hello := m.Welcome
	if w.welcome != nil {
		return fmt.Errorf("%w: a second WELCOME", wire.ErrProtocol)
	}
	if hello.Version != wire.Version {
		return fmt.Errorf("%w: the supervisor wants protocol version %d, this worker speaks %d; build both from one release", wire.ErrProtocol, hello.Version, wire.Version)
	}
	w.welcome = hello
	w.openArena(m)
	if hello.Keeper != 0 {
		w.bare = true
		if err := sys.AllowTracer(hello.Keeper); err != nil {
			w.log.Warn("if this process hangs, its sessions may be lost", "error", err)
		}
	}
	if w.ready == nil {
		w.send(&wire.Message{Type: wire.TypeReady})
		return nil
	}
	ctx, cancel := context.WithCancel(w.base)
	go func() {
		defer cancel()
		err := guard(func() error { return w.ready(ctx) })
		w.in.post(func() {
			if err != nil {
				w.failed = fmt.Errorf("worker is not ready: %w", err)
				return
			}
			w.send(&wire.Message{Type: wire.TypeReady})
		})
	}()
	return nil
}

// resume starts the handlers of adopted sessions; those of a group together, when
// its last member was named.
func (w *worker) resume(m *wire.Message) {
	refs := m.Refs
	if m.Group != "" {
		refs = append(w.resuming[m.Group], refs...)
		if len(refs) > len(w.sessions)+wire.MaxItems {
			refs = refs[len(refs)-len(w.sessions)-wire.MaxItems:] // repetitions
		}
		if !m.Last {
			w.resuming[m.Group] = refs
			return
		}
		delete(w.resuming, m.Group)
	}
	var list []*session
	var conns []*Conn
	for _, r := range refs {
		s := w.sessions[r.ID]
		if s == nil || s.owner != r.Epoch || s.phase != phaseAdopted {
			w.stale("RESUME", r) // or asked twice
			continue
		}
		s.phase = phaseIdle
		s.conn.session().Remind()
		list, conns = append(list, s), append(conns, s.conn)
	}
	var bar *barrier
	if m.Group != "" {
		bar = w.newBarrier(m.Group, conns)
	}
	for _, s := range list {
		s.barrier = bar
		w.step(s)
	}
}

// freeze starts an attempt to move sessions away.
func (w *worker) freeze(m *wire.Message) {
	if w.deferFreeze(m) {
		return
	}
	var b *batch
	if m.Group != "" {
		if b = w.batches[m.Group]; b == nil {
			b = &batch{group: m.Group, members: map[uint64]*session{}, thawed: map[uint64]bool{}}
			w.batches[m.Group] = b
		}
		b.last = m.Last
	}
	var list []*session
	for _, r := range m.Refs {
		s := w.sessions[r.ID]
		if e, ended := w.tombs[r.ID]; ended && s == nil {
			w.send(&wire.Message{Type: wire.TypeClosed, Closed: []wire.Closed{e}}) // it has not been heard
			continue
		}
		if !s.freezable(r.Epoch) {
			w.stale("FREEZE", r)
			continue
		}
		s.attempt, s.seen, s.next, s.frozen = r.Epoch, r.Epoch, 0, true
		s.conn.freeze()
		if j := s.join; j != nil {
			s.join = nil
			j.done(ErrMoving)
		}
		if b != nil {
			s.batch = b
			b.members[s.id] = s
		}
		list = append(list, s)
	}
	if b != nil {
		w.advance(b)
		return
	}
	for _, s := range list {
		w.step(s)
	}
}

// freezable reports that a FREEZE with this epoch is news for s, which may be nil.
func (s *session) freezable(e wire.Epoch) bool {
	return s != nil && s.phase != phaseAdopted && s.phase != phaseClosing && e > s.seen && e > s.next
}

// deferFreeze puts off a FREEZE that meets an earlier attempt of a group: a
// supervisor that starts a new attempt has given up the old one, which has to be
// undone first. A group of which PARKED was sent is only undone for all its members.
// Until then next tells what is to come.
func (w *worker) deferFreeze(m *wire.Message) bool {
	var earlier []*batch
	for _, r := range m.Refs {
		s := w.sessions[r.ID]
		if !s.freezable(r.Epoch) || s.batch == nil {
			continue
		}
		if s.batch.stage == batchParked {
			s.batch.thawed[s.id] = true
		}
		if !slices.Contains(earlier, s.batch) {
			earlier = append(earlier, s.batch)
		}
	}
	if b := w.batches[m.Group]; m.Group != "" && b != nil && !slices.Contains(earlier, b) && (b.last || b.stage != batchGathering) {
		earlier = append(earlier, b) // its last part has come, so this is another attempt
	}
	for _, b := range earlier {
		w.cancelBatch(b)
		w.advance(b)
	}
	for _, b := range earlier {
		if w.batches[b.group] != b {
			continue
		}
		for _, r := range m.Refs {
			if s := w.sessions[r.ID]; s.freezable(r.Epoch) {
				s.next = r.Epoch
			}
		}
		b.deferred = append(b.deferred, m)
		return true
	}
	return false
}

// thaw calls off an attempt. One that had to wait had taken the place of the one in
// force, which ends with it.
func (w *worker) thaw(m *wire.Message) {
	for _, r := range m.Refs {
		s := w.sessions[r.ID]
		if s == nil || r.Epoch == 0 || s.next != r.Epoch && s.attempt != r.Epoch {
			w.stale("THAW", r)
			continue
		}
		if s.next == r.Epoch {
			s.next = 0
		}
		b := s.batch
		switch {
		case s.attempt == 0:
		case b != nil && b.stage == batchParked:
			b.thawed[s.id] = true
			w.advance(b)
		case b != nil:
			w.cancelBatch(b)
		default:
			s.attempt = 0
			if s.phase == phaseRunning {
				s.conn.thaw()
			}
			w.step(s)
		}
	}
}

// kick ends sessions on the operator's behalf. One that is parked may belong to
// somebody else by now: it is only noted, for the case that it comes back.
func (w *worker) kick(refs []wire.Ref) {
	for _, r := range refs {
		s := w.sessions[r.ID]
		if s == nil || s.owner != r.Epoch && s.attempt != r.Epoch || s.phase == phaseAdopted {
			w.stale("CLOSE", r)
			continue
		}
		s.kicked = true
		if s.phase == phaseRunning || s.phase == phaseIdle {
			w.end(s, wire.ReasonOperator, nil)
		}
	}
}

// inventory tells a new supervisor everything; the channel keeps the order, so it
// reflects all that was received before.
func (w *worker) inventory(nonce uint64) {
	held := make([]wire.Held, 0, len(w.sessions)+len(w.tombs))
	for _, s := range w.sessions {
		held = append(held, s.held())
	}
	for _, e := range w.tombs {
		held = append(held, wire.Held{Ref: e.Ref, Phase: wire.PhaseClosed, Reason: e.Reason})
	}
	for len(held) > wire.MaxItems {
		w.send(&wire.Message{Type: wire.TypeInventoryReply, Nonce: nonce, Held: held[:wire.MaxItems]})
		held = held[wire.MaxItems:]
	}
	w.send(&wire.Message{Type: wire.TypeInventoryReply, Nonce: nonce, Held: held, Last: true})
	for _, s := range w.sessions {
		if s.join != nil { // the old supervisor may have taken the question with it
			w.sendGroup(s, s.join.name)
		}
	}
	w.tellRekeys()
	w.askCheckpoints()
}

func (s *session) held() wire.Held {
	h := wire.Held{Ref: wire.Ref{ID: s.id, Epoch: s.owner}, Attempt: s.attempt, Group: s.group, Phase: wire.PhaseActive}
	switch {
	case s.phase == phaseAdopted:
		h.Phase = wire.PhaseAdopted
	case s.next != 0:
		h.Phase, h.Attempt = wire.PhaseFreezing, s.next
	case s.attempt == 0:
	case s.phase == phaseParked && s.sent == s.attempt:
		h.Phase = wire.PhaseParked
	default:
		h.Phase = wire.PhaseFreezing
	}
	return h
}
