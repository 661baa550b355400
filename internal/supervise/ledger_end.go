package supervise

import (
	"encoding/binary"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// Ends of sessions. Every session ends in one way, and is counted under it once, also
// when the supervisor is killed in the middle: the entry that frees the slot names the
// way and the number that its counter is to have then, and the counter is written after
// it. Whoever finds a freed slot whose number is higher than the counter counts that end.

// endCode is the way in which a session ended: a wire.Reason, or one of these.
type endCode = uint64

const (
	endUnknown endCode = 64 // its owner is dead or does not know why, and the connection is closed
	endLost    endCode = 65 // nobody could serve it any more
)

// count64 is a counter in the ledger's memory.
type count64 []byte

func (c count64) get() uint64  { return binary.LittleEndian.Uint64(c) }
func (c count64) set(n uint64) { binary.LittleEndian.PutUint64(c, n) }

func (l *ledger) endCount(code endCode) count64 {
	switch {
	case code == endUnknown:
		return l.mem[hdrCounters+8*int(cntClosedUnknown):][:8]
	case code >= uint64(wire.ReasonPeer) && code <= uint64(wire.LastReason):
		return l.mem[hdrReasons+8*int(code):][:8]
	default:
		return l.mem[hdrCounters+8*int(cntLost):][:8]
	}
}

// end counts the end of the session in slot i, and frees the slot.
func (l *ledger) end(i int, code endCode) {
	n := l.endCount(code).get() + 1
	l.vacate(i, entry{Phase: slotFree, Owner: code, Accepted: int64(n)}, func() { l.endCount(code).set(n) })
}

// settleEnd counts the end that a freed slot tells of, unless that was done.
func (l *ledger) settleEnd(e entry) {
	if e.Phase != slotFree || e.Owner == 0 {
		return
	}
	if c := l.endCount(e.Owner); c.get() < uint64(e.Accepted) {
		c.set(uint64(e.Accepted))
	}
}

// balance makes good an accepted session that a dead supervisor had not counted yet:
// what is there and what has ended was accepted.
func (l *ledger) balance(sessions int) {
	peer, owner, lost := l.closed()
	n := uint64(sessions) + peer + owner + lost + l.counter(cntLost) + l.counter(cntClosedUnknown)
	if have := l.counter(cntAccepted); have < n {
		l.count(cntAccepted, n-have)
	}
}
