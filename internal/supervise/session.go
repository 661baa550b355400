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
	pool *pool
	more *more // nil while there is nothing in it

	accepted int64     // Unix nanoseconds
	retryAt  moment    // not frozen again before
	rekey    *rekeying // of keys, under way; see rekey.go
	estate   *estate   // its owner died, and it has no other yet; see estate.go

	slot   uint32
	kept   uint32 // its piece in the ledger, as in entry
	moves  uint32
	rxBase uint32 // see rekey.go

	software bool
	away     bool // the keeper has no duplicate of its socket; see bare.go
	owes     owed
	crashes  uint8      // of workers in a row that were handling it; see poison.go
	blamed   bool       // the death of its owner is among them
	flags    wire.Flags // for an adopting worker, like cargo
}

// more is what a session at rest does not have: there may be very many of them.
type more struct {
	refusals int    // in a row, while nobody owns it
	refused  string // why the attempt that is being undone came to nothing
	// refusedBy names the workers that could not take it since it last moved.
	refusedBy []uint64

	wants     string // the group it waits to join
	joinFails int    // moves to a group's home that failed in a row
	bigFacts  []byte // facts too large for the slot

	// What an adopting worker gets: of a session that nobody owns, or that its owner
	// has parked.
	cargo wire.Cargo
}

// rare is for reading.
func (ss *session) rare() (m more) {
	if ss.more != nil {
		m = *ss.more
	}
	return m
}

// edit is for writing.
func (ss *session) edit() *more {
	if ss.more == nil {
		ss.more = &more{}
	}
	return ss.more
}

// slim forgets more when there is nothing in it.
func (ss *session) slim() {
	m := ss.more
	if m != nil && m.refusals == 0 && m.refused == "" && m.refusedBy == nil && m.wants == "" && m.joinFails == 0 &&
		m.bigFacts == nil && m.cargo.Record == nil && m.cargo.App == nil {
		ss.more = nil
	}
}

// unload forgets what an adopting worker was to get.
func (ss *session) unload() {
	if ss.more != nil {
		wipe(ss.more.cargo.Record)
		ss.more.cargo = wire.Cargo{}
		ss.slim()
	}
}

// moment is a time in the few bytes that a session has for it; 0 is long ago.
type moment int64

var origin = time.Now()

func momentOf(t time.Time) moment { return moment(t.Sub(origin)) }

// waits says whether it is not to be frozen yet.
func (ss *session) waits(now time.Time) bool { return momentOf(now) < ss.retryAt }

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
		RXBase: ss.rxBase, Owes: ss.owes, Crashes: ss.crashes, Blamed: ss.blamed, Kept: ss.kept}
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
	s.waitNoMore(ss)
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
	if ss.rare().bigFacts != nil {
		s.retain.delete(ss.overflowKey())
	}
	s.led.end(int(ss.slot), how)
	s.freeSlots = append(s.freeSlots, int(ss.slot))
	ss.unload()
}

// lose ends a session that no one can serve any more: its peer gets FIN.
func (s *Supervisor) lose(ss *session, why string) { s.m.Lose(&ss.Session, why) }

func wipe(b []byte) {
	for i := range b {
		b[i] = 0
	}
}

// allFacts returns what the ledger knows of a session since its handshake.
func (ss *session) allFacts(l *ledger) (*facts, error) {
	return l.facts(int(ss.slot), ss.rare().bigFacts)
}

// facts returns the ktls facts of a session.
func (ss *session) facts(l *ledger) []byte {
	if big := ss.rare().bigFacts; big != nil {
		return big
	}
	if b, ok := l.ktlsFacts(int(ss.slot)); ok {
		return b
	}
	f, err := ss.allFacts(l)
	if err != nil {
		return nil // its import is refused, with a word
	}
	return f.Facts
}
