package supervise

import (
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// pace decides how many sessions of a worker are under way at once. Few make messages
// that cost more than what is in them; many wait for each other, and a client whose
// session waits is kept waiting. So there are as many as come through in a few
// milliseconds on this machine, with what else it does at this moment. Where not even the
// fewest do, fewer only make more messages, and what counts is that many do not take much
// longer than few. It belongs to the ledger's goroutine.
type pace struct {
	n       int                  // 0: nothing is known yet
	few     time.Duration        // what the fewest took when there were so few last, or less since
	offered map[uint64]time.Time // when PARKED came, for the last session of each message
	slower  time.Time            // it was slowed down last
}

const (
	paceFirst = 32
	paceLeast = 16
	// From PARKED to ADOPTED, which no handler can delay.
	paceQuick = 3 * time.Millisecond
	paceSlow  = 6 * time.Millisecond
	// So many batches later the fewest are tried anew: the machine may be quicker then.
	paceMemory = 64
	// Far from adoptTimeout.
	paceLongest = 2 * time.Second
)

// window is how many sessions of one worker may be under way.
func (p *pace) window() int {
	if p.n == 0 {
		p.n = paceFirst
	}
	return p.n
}

func (p *pace) parked(m *wire.Message, now time.Time) {
	if len(m.Items) == 0 {
		return
	}
	if p.offered == nil || len(p.offered) > 4*window { // of sessions that nobody adopted
		p.offered = map[uint64]time.Time{}
	}
	p.offered[m.Items[len(m.Items)-1].ID] = now
}

func (p *pace) adopted(m *wire.Message, now time.Time) {
	for _, r := range m.Refs {
		if at, ok := p.offered[r.ID]; ok {
			delete(p.offered, r.ID)
			p.took(now.Sub(at), now)
		}
	}
}

func (p *pace) took(d time.Duration, now time.Time) {
	n := p.window()
	p.few -= p.few / paceMemory
	if n == paceLeast || d < p.few {
		p.few = d
	}
	switch {
	case d < max(paceQuick, p.few*3/2):
		p.n = min(window, n+n/4)
	case d > max(paceSlow, min(p.few*3, paceLongest)) && now.Sub(p.slower) > d: // what is under way says the same once more
		p.n, p.slower = max(paceLeast, n-n/4), now
	}
}
