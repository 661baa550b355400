package supervise

import (
	"fmt"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/ownership"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// letter is a message to one worker in the making: all that was decided for it in a
// row, of one kind and about one group.
type letter struct {
	kind  ownership.Kind
	group *ownership.Group
	last  bool
	refs  []wire.Ref
	items []wire.Item // ADOPT
	blob  []byte
}

// carryOut does what has been decided, in order: what goes into the ledger's memory at
// once, what is sent in as few messages as the order allows, when nothing is left to
// decide. What goes wrong in it may bring new decisions, which come after.
func (s *Supervisor) carryOut() {
	if s.carrying {
		return // they are seen to by the loop that is under way
	}
	s.carrying = true
	defer func() { s.carrying = false }()
	for {
		e, ok := s.m.Next()
		if ok {
			s.effect(&e)
			continue
		}
		if len(s.mailed) == 0 && len(s.awake) == 0 {
			return
		}
		if len(s.mailed) == 0 { // those that wait hear of it after those that were under way
			k := s.awake[0]
			s.awake = s.awake[1:]
			s.wakeWaiters(k)
			continue
		}
		list := s.mailed
		s.mailed = nil
		for _, w := range list {
			s.deliverAll(w)
		}
	}
}

func (s *Supervisor) effect(e *ownership.Effect) {
	switch e.Kind {
	case ownership.Put:
		s.putEntry(sessionOf(e.Session), e)
	case ownership.Keep:
		if ss := sessionOf(e.Session); !ss.Ended && ss.estate == nil { // what an estate has is kept in the arena
			s.putParked(ss, ss.rare().cargo.Record)
		}
	case ownership.Void:
		if ss := sessionOf(e.Session); !ss.Ended {
			s.voidParked(ss)
			ss.unload()
		}
	case ownership.Moved:
		s.moved(sessionOf(e.Session), e.Try)
	case ownership.Returned:
		s.returned(sessionOf(e.Session))
	case ownership.Settle:
		s.settle(sessionOf(e.Session), e.Worker.ID)
	case ownership.GroupReady:
		s.offerGroup(e.Move)
	case ownership.GroupDone:
		s.awake = append(s.awake, e.Move.Group.Key)
		s.groupDone(e.Move.Group.Key)
	case ownership.KeepGroup:
		s.keepGroup(e.Group.Key, e.Group.Blob)
	case ownership.Kill:
		w := workerOf(e.Worker)
		w.doubtful = true
		if w.closedAt.IsZero() { // else it is most likely dying by itself, and gets a moment
			s.kill(w, notToldWhy)
		}
	case ownership.Detached:
		s.keepDetached(workerOf(e.Worker))
	case ownership.End:
		s.ended(sessionOf(e.Session), e)
	case ownership.SendClose:
		s.log.Error("a worker serves a session that is not its own; it is told to end it", "pid", workerOf(e.Worker).pid, "session", sid(e.Ref.ID))
		s.write(e)
	default:
		s.write(e)
	}
}

// write puts a message about one session among those to its worker.
func (s *Supervisor) write(e *ownership.Effect) {
	w := workerOf(e.Worker)
	if w.ch == nil {
		return
	}
	if len(w.mail) == 0 {
		s.mailed = append(s.mailed, w)
	}
	n := len(w.mail)
	if n == 0 || w.mail[n-1].kind != e.Kind || w.mail[n-1].group != e.Group || w.mail[n-1].last {
		w.mail = append(w.mail, letter{kind: e.Kind, group: e.Group})
		n++
	}
	l := &w.mail[n-1]
	l.last = e.Group != nil && e.Last
	if e.Kind != ownership.SendAdopt {
		l.refs = append(l.refs, e.Ref)
		return
	}
	l.items = append(l.items, s.item(e.Try))
	if l.last && e.Try.Move != nil {
		l.blob = e.Try.Move.Blob
	}
}

var kinds = map[ownership.Kind]wire.Type{
	ownership.SendFreeze: wire.TypeFreeze, ownership.SendResume: wire.TypeResume, ownership.SendRelease: wire.TypeRelease,
	ownership.SendThaw: wire.TypeThaw, ownership.SendAbort: wire.TypeAbort, ownership.SendClosedAck: wire.TypeClosedAck,
	ownership.SendClose: wire.TypeClose,
}

func (s *Supervisor) deliverAll(w *worker) {
	mail := w.mail
	w.mail = nil
	for i := range mail {
		s.deliver(w, &mail[i])
	}
}

// deliver sends one letter.
func (s *Supervisor) deliver(w *worker, l *letter) {
	name := ""
	if l.group != nil {
		name = l.group.Key.Name
	}
	if l.kind == ownership.SendAdopt {
		batches := wire.BatchItems(l.items)
		for i, b := range batches {
			m := &wire.Message{Type: wire.TypeAdopt, Group: name, Items: b, Last: l.last && i == len(batches)-1}
			if m.Last && l.blob != nil {
				m.Blobs = []wire.Blob{{Group: name, Data: l.blob}}
			}
			s.send(w, m)
		}
		return
	}
	batches := wire.BatchRefs(l.refs)
	for i, b := range batches {
		s.send(w, &wire.Message{Type: kinds[l.kind], Group: name, Refs: b, Last: l.last && i == len(batches)-1})
	}
}

// item is what the target of an attempt gets.
func (s *Supervisor) item(t *attempt) wire.Item {
	ss := sessionOf(t.Session)
	cargo := ss.rare().cargo
	it := wire.Item{Ref: wire.Ref{ID: ss.ID, Epoch: t.Epoch}, Group: ss.groupName(), Flags: ss.flags,
		Cargo: wire.Cargo{Facts: ss.facts(s.led), Record: cargo.Record, App: cargo.App}}
	if t.Joins != nil {
		it.Group = t.Joins.Name
	}
	return it
}

// putEntry records who owns a session. With a new owner it is the commit: from here on
// that worker owns the session, whatever dies.
func (s *Supervisor) putEntry(ss *session, e *ownership.Effect) {
	if ss.Ended {
		return
	}
	switch {
	case e.Try != nil:
		if e.Try.From != nil {
			ss.moves++
		}
		ss.flags, ss.kept, ss.blamed = 0, 0, false // only the new owner knows from now on which bytes and sequence numbers are spent (I5)
		if m := ss.more; m != nil {
			m.refusals, m.refusedBy = 0, nil
		}
		if !ss.software {
			k := s.led.keys(int(ss.slot), ktls.Receiving)
			ss.rxBase = k.gen
			k.wipe()
		}
	case e.From != nil: // back to whom an earlier supervisor had it from: it counts on from its own adoption
		if b, ok := s.led.before(int(ss.slot)); ok && b.ID == ss.ID && b.Epoch == ss.Epoch {
			ss.rxBase = b.RXBase
		}
	}
	s.led.put(int(ss.slot), ss.slotEntry())
}

// moved counts a commit.
func (s *Supervisor) moved(ss *session, t *attempt) {
	s.trim.Did(1)
	s.waitNoMore(ss) // its new owner asks by itself
	if t.From != nil {
		s.led.count(cntMoved, 1)
		op := ss.pool.op
		if op != nil {
			op.committed(t, s.now())
		}
		if op != nil && workerOf(t.To).gen < workerOf(t.From).gen {
			s.led.count(cntReturned, 1)
		}
	}
	delete(ss.pool.stays, ss.ID)
	s.settled(ss)
	if g := ss.Group; g != nil && g.Home == ss.Owner && g.Move == nil {
		s.awake = append(s.awake, g.Key) // it has found a home
	}
}

// ended counts the end of a session.
func (s *Supervisor) ended(ss *session, e *ownership.Effect) {
	op, code := ss.pool.op, endLost
	switch e.How {
	case ownership.Closed:
		code = uint64(max(e.Reason, wire.ReasonPeer))
	case ownership.Gone:
		code = endUnknown
		if e.From != nil {
			s.log.Warn("session ended, its worker does not know why", "session", sid(ss.ID), "pid", workerOf(e.From).pid)
		}
	case ownership.Stopped:
		code = uint64(wire.ReasonOperator)
		s.retain.shutdown(ss.ID)
	case ownership.Lost:
		s.log.Error("session lost", "session", sid(ss.ID), "pool", ss.pool.name, "why", e.Why)
		if op != nil {
			op.report.Lost++
			op.reason(e.Why)
		}
		s.retain.shutdown(ss.ID)
	}
	s.forget(ss, code)
}

// returned is told that nobody owns a session and that nobody is being asked. Refused
// by too many, it is lost.
func (s *Supervisor) returned(ss *session) {
	if ss.Ended || ss.Owner != nil || ss.Try != nil {
		return
	}
	why := ss.rare().refused
	if why != "" {
		ss.more.refused = ""
		if p := ss.pool; p.starting == 0 && p.op == nil && p.restartAt.IsZero() && p.count(p.serving, workerReady) >= p.cfg.Workers {
			ss.more.refusals++ // nobody else is to come who might take it
		}
		n := ss.more.refusals
		if n >= maxRefusals {
			s.lose(ss, fmt.Sprintf("no worker could take it (%d tried); the last said: %s", n, why))
			return
		}
		ss.retryAt = momentOf(s.now().Add(min(100*time.Millisecond<<n, 2*time.Second)))
	}
	ss.pool.parked[ss.ID] = ss
}
