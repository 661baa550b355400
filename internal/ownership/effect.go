package ownership

import "github.com/ktlsvisor/ktlsvisor/internal/wire"

// Kind is what an effect asks for.
type Kind uint8

// The effects. Those that send name the worker, the session and the epoch.
const (
	// Put: write owner, epoch and group of the session to memory that outlives this
	// process. With an owner it had not before, this is the commit.
	Put Kind = iota
	// Keep: store the parked record state, which nobody but this process has now.
	Keep
	// Void: what was stored of the record state must never be used again (I5).
	Void
	SendFreeze
	SendAdopt
	SendResume
	SendRelease
	SendThaw
	SendAbort
	SendClosedAck
	// SendClose: a worker serves a session that is not its own. This cannot happen
	// unless it breaks the protocol.
	SendClose
	// KeepGroup: nobody but this process has the group's shared state now.
	KeepGroup
	// Kill: nobody can find out any more what the worker has; end it.
	Kill
	// Detached: store that the worker's channel has ended, after its Kill if there is
	// one. A machine that does not find this asks it what it has.
	Detached
	// Settle: the session's owner, Worker, is dead. Find out how far it came, then call
	// SettledHeld, SettledGone or SettledLost.
	Settle
	// Moved: count a move, from From to Worker. From is nil for a session that
	// nobody owned.
	Moved
	// Returned: an attempt came to nothing, and nobody owns the session: it is held.
	Returned
	// GroupReady: all members are parked; call OfferGroup or UndoGroup.
	GroupReady
	// GroupDone: the group's move has ended, one way or another.
	GroupDone
	// End: the session ended, How; count it. The session is no longer in the machine.
	End
)

func (k Kind) String() string {
	return [...]string{"put", "keep", "void", "FREEZE", "ADOPT", "RESUME", "RELEASE", "THAW", "ABORT", "CLOSED_ACK", "CLOSE",
		"keep group", "kill", "detached", "settle", "moved", "returned", "group ready", "group done", "end"}[k]
}

// How a session ended.
type How uint8

// Every session ends in one of these ways, once.
const (
	Closed  How = iota + 1 // its owner said so, and why
	Gone                   // its owner is dead, and the connection is closed
	Lost                   // nobody can serve it any more
	Stopped                // the unit was told to stop
)

// Effect is one thing to do. Effects are carried out in order; a process that dies
// between two of them has done the first and not the second.
type Effect struct {
	Kind    Kind
	Session *Session
	Worker  *Worker
	From    *Worker
	Ref     wire.Ref   // of messages
	Group   *Group     // of messages: those of one kind belong together
	Last    bool       // and this is the last one
	Move    *GroupMove // GroupReady, GroupDone
	Try     *Try       // SendAdopt: what is offered. Put, Moved, Returned: the attempt that ended, or nil
	How     How
	Reason  wire.Reason // How is Closed
	Why     string      // How is Lost
}

func (m *Machine) emit(e Effect) { m.out = append(m.out, e) }

// Next returns the next thing to do; false when nothing is left. What carrying it out
// brings about may be told to the machine at once: its effects come after those that
// are there already.
func (m *Machine) Next() (Effect, bool) {
	if m.head == len(m.out) {
		m.out, m.head = m.out[:0], 0
		return Effect{}, false
	}
	e := m.out[m.head]
	m.out[m.head] = Effect{}
	m.head++
	return e, true
}
