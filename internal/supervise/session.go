package supervise

import (
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// session is the ledger's view of one session in this process; what must survive
// the process is in its slot.
//
//	             +--- refused, target died ---+
//	             v                            |
//	parked --ADOPT--> adopting --ADOPTED--> owned --FREEZE--> freezing --PARKED--> adopting
//	                                          ^                  |                    |
//	                                          +------ THAW ------+--------------------+
//
// owner is nil only while the session is parked and no worker holds a copy.
type session struct {
	id    uint64
	slot  int
	pool  *pool
	owner *worker
	epoch wire.Epoch // of the ownership
	group string
	moves uint32

	accepted int64 // Unix nanoseconds
	software bool
	attempt  *attempt
	retryAt  time.Time // not frozen again before
	refusals int       // in a row, while parked
	// refusedBy names the workers that could not take it since it last moved.
	refusedBy []uint64

	wants     string // the group it waits to join
	joinFails int    // moves to a group's home that failed in a row
	bigFacts  []byte // facts too large for the slot

	estate *estate // its owner died, and it has no other yet; see estate.go

	// Changes of keys: see rekey.go.
	rekey  *rekeying // under way
	rxBase uint32
	owes   owed

	crashes uint8 // of workers in a row that were handling it; see poison.go

	// While owner is nil and attempt is nil: what an adopting worker gets.
	cargo wire.Cargo
	flags wire.Flags
}

func (ss *session) key() keeper.Key { return keeper.Key{Kind: keeper.KindSocket, ID: ss.id} }

func (ss *session) overflowKey() keeper.Key {
	return keeper.Key{Kind: keeper.KindBlob, ID: ss.id, Name: "facts"}
}

// step is how far an attempt has come.
type step uint8

const (
	stepFreezing step = iota // FREEZE sent
	stepParked               // PARKED here, waiting for the rest of its group
	stepAdopting             // ADOPT sent
)

// attempt is one try to give one session another owner, with an epoch of its own.
type attempt struct {
	s        *session
	epoch    wire.Epoch
	from     *worker // nil: the session is parked here
	to       *worker // nil until the target is chosen
	step     step
	began    time.Time
	deadline time.Time
	cargo    wire.Cargo
	flags    wire.Flags
	gm       *groupMove // the group it moves with
	dest     *worker    // wanted target (a group's home); nil: least loaded
	joins    string     // the group it moves for
	adopted  bool       // ADOPTED came; the group is not complete yet
}

// slotEntry is what the slot should say.
func (ss *session) slotEntry() entry {
	e := entry{ID: ss.id, Epoch: ss.epoch, Accepted: ss.accepted, Moves: ss.moves,
		Software: ss.software, Flags: ss.flags, Group: ss.group, Phase: slotParked,
		RXBase: ss.rxBase, Owes: ss.owes, Crashes: ss.crashes}
	if ss.owner != nil {
		e.Owner, e.Phase = ss.owner.id, slotOwned
	} else if ss.estate != nil {
		e.Owner, e.Phase = ss.estate.worker, slotOwned // what it can go on from is in that worker's arena
	}
	return e
}

func (s *Supervisor) nextEpoch() wire.Epoch {
	s.trim.Did(1) // a handshake, or a move
	s.epochs++
	return wire.NewEpoch(s.incarnation, s.epochs)
}

// end forgets a session that has ended and been counted. The keeper closes its
// duplicate of the socket.
func (s *Supervisor) end(ss *session) {
	if a := ss.attempt; a != nil {
		s.dropAttempt(a)
	}
	if ss.owner != nil {
		delete(ss.owner.sessions, ss.id)
	}
	s.leaveGroup(ss)
	s.settled(ss)
	if r := ss.rekey; r != nil {
		for _, f := range r.waiters {
			f(errSessionEnded)
		}
		ss.rekey = nil
	}
	delete(s.owing, ss.id)
	delete(s.sessions, ss.id)
	delete(ss.pool.parked, ss.id)
	delete(ss.pool.stays, ss.id)
	delete(ss.pool.ward.suspects, ss.id)
	s.retain.delete(ss.key())
	if f, err := s.led.facts(ss.slot); err == nil && f.Overflow {
		s.retain.delete(ss.overflowKey())
	}
	s.led.free(ss.slot)
	s.freeSlots = append(s.freeSlots, ss.slot)
	wipe(ss.cargo.Record)
}

// lose ends a session that no one can serve any more: its peer gets FIN.
func (s *Supervisor) lose(ss *session, why string) {
	s.led.count(cntLost, 1)
	s.log.Error("session lost", "session", sid(ss.id), "pool", ss.pool.name, "why", why)
	if op := ss.pool.op; op != nil {
		op.report.Lost++
		op.reason(why)
	}
	s.retain.shutdown(ss.id)
	s.end(ss)
}

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
