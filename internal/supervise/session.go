package supervise

import (
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/ownership"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// session is what this process knows of one session; who owns it is internal/ownership's
// to decide, and what must survive the process is in its slot.
type session struct {
	ownership.Session
	slot  int
	pool  *pool
	moves uint32

	accepted int64 // Unix nanoseconds
	software bool
	retryAt  time.Time // not frozen again before
	refusals int       // in a row, while nobody owns it
	refused  string    // why the attempt that is being undone came to nothing
	// refusedBy names the workers that could not take it since it last moved.
	refusedBy []uint64

	wants     string // the group it waits to join
	joinFails int    // moves to a group's home that failed in a row
	bigFacts  []byte // facts too large for the slot

	// Changes of keys: see rekey.go.
	rekey  *rekeying // under way
	rxBase uint32
	owes   owed

	away    bool    // the keeper has no duplicate of its socket; see bare.go
	estate  *estate // its owner died, and it has no other yet; see estate.go
	crashes uint8   // of workers in a row that were handling it; see poison.go

	// What an adopting worker gets: of a session that nobody owns, or that its owner
	// has parked.
	cargo wire.Cargo
	flags wire.Flags
}

// attempt is one try to give one session another owner.
type attempt = ownership.Try

func sessionOf(s *ownership.Session) *session { return s.X.(*session) }

func workerOf(w *ownership.Worker) *worker {
	if w == nil {
		return nil
	}
	return w.X.(*worker)
}

// owner is nil while nobody owns the session.
func (ss *session) owner() *worker { return workerOf(ss.Owner) }

func (ss *session) groupName() string {
	if ss.Group == nil {
		return ""
	}
	return ss.Group.Key.Name
}

func (ss *session) key() keeper.Key { return keeper.Key{Kind: keeper.KindSocket, ID: ss.ID} }

func (ss *session) overflowKey() keeper.Key {
	return keeper.Key{Kind: keeper.KindBlob, ID: ss.ID, Name: "facts"}
}

// slotEntry is what the slot should say.
func (ss *session) slotEntry() entry {
	e := entry{ID: ss.ID, Epoch: ss.Epoch, Accepted: ss.accepted, Moves: ss.moves,
		Software: ss.software, Flags: ss.flags, Group: ss.groupName(), Phase: slotParked,
		RXBase: ss.rxBase, Owes: ss.owes, Crashes: ss.crashes}
	if ss.Owner != nil {
		e.Owner, e.Phase = ss.Owner.ID, slotOwned
	} else if ss.estate != nil {
		e.Owner, e.Phase = ss.estate.worker, slotOwned // what it can go on from is in that worker's arena
	}
	return e
}

// forget counts the end of a session and drops it. The keeper closes its
// duplicate of the socket.
func (s *Supervisor) forget(ss *session, how endCode) {
	s.settled(ss)
	if r := ss.rekey; r != nil {
		for _, f := range r.waiters {
			f(errSessionEnded)
		}
		ss.rekey = nil
	}
	delete(s.owing, ss.ID)
	delete(s.sessions, ss.ID)
	delete(ss.pool.parked, ss.ID)
	delete(ss.pool.stays, ss.ID)
	delete(ss.pool.ward.suspects, ss.ID)
	s.retain.delete(ss.key())
	if f, err := s.led.facts(ss.slot); err == nil && f.Overflow {
		s.retain.delete(ss.overflowKey())
	}
	s.led.end(ss.slot, how)
	s.freeSlots = append(s.freeSlots, ss.slot)
	wipe(ss.cargo.Record)
}

// lose ends a session that no one can serve any more: its peer gets FIN.
func (s *Supervisor) lose(ss *session, why string) { s.m.Lose(&ss.Session, why) }

func wipe(b []byte) {
	for i := range b {
		b[i] = 0
	}
}

// facts returns the ktls facts of a session.
func (ss *session) facts(l *ledger) []byte {
	if ss.bigFacts != nil {
		return ss.bigFacts
	}
	if b, ok := l.ktlsFacts(ss.slot); ok {
		return b
	}
	f, err := l.facts(ss.slot)
	if err != nil {
		return nil // its import is refused, with a word
	}
	return f.Facts
}
