package supervise

import (
	"encoding/binary"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// counter is the place of a counter in the ledger's header: counters survive the
// supervisor. Only the goroutine that owns the ledger writes them.
type counter int

const (
	cntAccepted counter = iota
	cntMoved
	cntReturned
	cntInterrupted
	cntLost
	_ // were sums
	_
	cntClosedUnknown
	cntHandshakeFailed
	cntHandshakeTimeout
	cntHandshakeRefused
	cntWorkerDeaths
	cntProtocolErrors
	cntKeyUpdates
	cntHangs
	cntQuarantined
)

func (l *ledger) count(c counter, n uint64) {
	b := l.mem[hdrCounters+8*int(c):]
	binary.LittleEndian.PutUint64(b, binary.LittleEndian.Uint64(b)+n)
}

func (l *ledger) counter(c counter) uint64 {
	return binary.LittleEndian.Uint64(l.mem[hdrCounters+8*int(c):])
}

// closed sums up the ends of sessions by reason: the contract's closed_by_peer and
// closed_by_owner, and what was lost in the owner's hands. What counts an end is one
// store, so that a supervisor killed in it has counted it or not (endOf).
func (l *ledger) closed() (peer, owner, lost uint64) {
	for r := wire.ReasonPeer; r <= wire.LastReason; r++ {
		n := l.endCount(uint64(r)).get()
		switch r {
		case wire.ReasonPeer, wire.ReasonPeerAbrupt, wire.ReasonProtocol, wire.ReasonKeyUpdate:
			peer += n
		case wire.ReasonLayer:
			lost += n
		default:
			owner += n
		}
	}
	return peer, owner, lost
}

func (l *ledger) counters() admin.Counters {
	peer, owner, lost := l.closed()
	return admin.Counters{
		Accepted: l.counter(cntAccepted), Moved: l.counter(cntMoved), Returned: l.counter(cntReturned),
		Interrupted: l.counter(cntInterrupted), Lost: l.counter(cntLost) + lost,
		ClosedByPeer: peer, ClosedByOwner: owner,
		ClosedUnknown: l.counter(cntClosedUnknown), KeyUpdates: l.counter(cntKeyUpdates),
		Hangs: l.counter(cntHangs), Quarantined: l.counter(cntQuarantined),
	}
}

func (l *ledger) reasons() map[string]uint64 {
	out := map[string]uint64{}
	for r := wire.ReasonPeer; r <= wire.LastReason; r++ {
		if n := l.endCount(uint64(r)).get(); n > 0 {
			out[r.String()] = n
		}
	}
	return out
}
