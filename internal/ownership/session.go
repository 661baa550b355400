package ownership

import (
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// Worker is one process that may own sessions.
type Worker struct {
	ID       uint64
	Sessions map[uint64]*Session // those it owns
	Incoming int                 // attempts that bring it a session
	// Awaited: a new machine does not know yet what it has. Nothing is given to it or
	// taken from it until Reconcile.
	Awaited bool
	X       any             // the driver's
	told    uint32          // orders to go on with a session that were sent to it
	sure    uint32          // of these, those that it has certainly read
	ended   map[uint64]bool // while Awaited: ended since it was asked
	cut     bool
	dead    bool
}

// Reachable says whether messages reach it: it is alive and its channel is open.
func (w *Worker) Reachable() bool { return !w.cut && !w.dead }

// Usable says whether sessions can be given to it and taken from it.
func (w *Worker) Usable() bool { return w.Reachable() && !w.Awaited }

// Told counts the orders to go on (RESUME, THAW) that were sent to it; Sure says that
// it has read the first n of them, for it answered to something that came later, or its
// channel was emptied. An owner that has not read such an order does not serve the
// session, and nobody else would know.
func (w *Worker) Told() uint32 { return w.told }

// Sure is described at Told.
func (w *Worker) Sure(n uint32) {
	if n > w.sure && n <= w.told {
		w.sure = n
	}
}

// Behind says that it has not answered since it was last told to go on with a session.
func (w *Worker) Behind() bool { return w.told != w.sure }

// unsure says whether there is a session of which nobody knows if it is served. read
// says whether everything that the worker sent was read: what it was asked to park, it
// may have parked otherwise.
func (w *Worker) unsure(read bool) bool {
	if w.Awaited {
		return true
	}
	for _, s := range w.Sessions {
		if s.Withheld { // it has forgotten it
			return true
		}
	}
	if read && w.told == w.sure {
		return false
	}
	for _, s := range w.Sessions {
		if s.told > w.sure || !read && s.Try != nil && s.Try.Step == Freezing {
			return true
		}
	}
	return false
}

func (w *Worker) goOn(s *Session) {
	w.told++
	s.told = w.told
}

// Session is one row of the ledger. The fields are for reading; events change them.
type Session struct {
	ID       uint64
	Owner    *Worker    // nil: nobody
	Epoch    wire.Epoch // of the ownership
	Try      *Try       // the attempt under way to give it another owner
	Group    *Group     // nil: none
	X        any        // the driver's
	told     uint32     // the last order to its owner to go on with it
	Doubt    bool       // its owner was seen dead; how far it came is being found out
	Ended    bool
	Withheld bool // not to be served by its owner yet; see split.go
}

// Step is how far an attempt has come.
type Step uint8

// The steps of an attempt.
const (
	Freezing Step = iota // FREEZE sent
	Parked               // PARKED came; where it goes is to be decided
	Offered              // ADOPT sent
)

// Try is one attempt to give one session another owner.
type Try struct {
	Session *Session
	Epoch   wire.Epoch
	From    *Worker    // nil: nobody owns the session
	To      *Worker    // nil until it is offered
	Move    *GroupMove // the group it moves with
	Joins   *GroupKey  // it moves in order to join this group
	Step    Step
	Adopted bool // ADOPTED came; the rest of the group is awaited
	stray   bool // it moves one member of a group without the others

	// Of the driver: when it began, when it is to be given up, where it should go.
	Began    time.Time
	Deadline time.Time
	Dest     *Worker
}

// Phase of a session, as in the drawing above.
type Phase uint8

// The phases of a session.
const (
	PhaseHeld Phase = iota
	PhaseOffered
	PhaseOwned
	PhaseFreezing
	PhaseParked
	PhaseGiven // parked by its owner and offered to another
	PhaseDoubt
	PhaseEnded
)

func (p Phase) String() string {
	return [...]string{"held", "offered", "owned", "freezing", "parked", "given", "in doubt", "ended"}[p]
}

// Phase returns where the session stands.
func (s *Session) Phase() Phase {
	switch {
	case s.Ended:
		return PhaseEnded
	case s.Doubt:
		return PhaseDoubt
	case s.Try == nil && s.Owner == nil:
		return PhaseHeld
	case s.Try == nil:
		return PhaseOwned
	case s.Try.Step == Offered && s.Try.From == nil:
		return PhaseOffered
	case s.Try.Step == Offered:
		return PhaseGiven
	case s.Try.Step == Parked && s.Try.From == nil:
		return PhaseHeld // with its group, about to be offered
	case s.Try.Step == Parked:
		return PhaseParked
	default:
		return PhaseFreezing
	}
}

// GroupKey names a group.
type GroupKey struct {
	Pool string
	Name string
}

// Group is a set of sessions with shared application state.
type Group struct {
	Key     GroupKey
	Home    *Worker // where its members are; nil while nobody has them
	Members map[uint64]*Session
	Move    *GroupMove
	// Blob is the shared state while no worker has the group.
	Blob []byte
}

// GroupMove is an attempt to give a group another owner: all members, or none.
type GroupMove struct {
	Group    *Group
	From, To *Worker // From is nil when nobody has the group
	Members  map[uint64]*Session
	Blob     []byte // nil: none came
	Last     bool   // the owner said that no more members come
	Offered  bool

	// Of the driver.
	Deadline time.Time
	Dest     *Worker
}
