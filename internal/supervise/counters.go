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
	cntClosedByPeer
	cntClosedByOwner
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

// countClosed counts the end of a session under its reason, and under the
// contract's two sums: a peer's close, an owner's close.
func (l *ledger) countClosed(r wire.Reason) {
	b := l.mem[hdrReasons+8*int(r):]
	binary.LittleEndian.PutUint64(b, binary.LittleEndian.Uint64(b)+1)
	switch r {
	case wire.ReasonPeer, wire.ReasonPeerAbrupt, wire.ReasonProtocol, wire.ReasonKeyUpdate:
		l.count(cntClosedByPeer, 1)
	case wire.ReasonLayer:
		l.count(cntLost, 1)
	default:
		l.count(cntClosedByOwner, 1)
	}
}

func (l *ledger) counters() admin.Counters {
	return admin.Counters{
		Accepted: l.counter(cntAccepted), Moved: l.counter(cntMoved), Returned: l.counter(cntReturned),
		Interrupted: l.counter(cntInterrupted), Lost: l.counter(cntLost),
		ClosedByPeer: l.counter(cntClosedByPeer), ClosedByOwner: l.counter(cntClosedByOwner),
		ClosedUnknown: l.counter(cntClosedUnknown), KeyUpdates: l.counter(cntKeyUpdates),
		Hangs: l.counter(cntHangs), Quarantined: l.counter(cntQuarantined),
	}
}

func (l *ledger) reasons() map[string]uint64 {
	out := map[string]uint64{}
	for r := wire.ReasonPeer; r <= wire.LastReason; r++ {
		if n := binary.LittleEndian.Uint64(l.mem[hdrReasons+8*int(r):]); n > 0 {
			out[r.String()] = n
		}
	}
	return out
}
