package load

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// A Report is what the fleet has seen so far. Durations are nanoseconds in
// JSON.
type Report struct {
	Sessions int `json:"sessions"`
	// Alive sessions have not been lost. After Stop, the ones that ended
	// uncleanly are counted here too, and in Unclean.
	Alive int `json:"alive"`
	// Lost sessions ended, or went wrong, before the client was done.
	Lost        int            `json:"lost"`
	LostReasons map[string]int `json:"lost_reasons,omitempty"`
	// Unclean sessions delivered every echo but did not answer the client's
	// close_notify with one of their own.
	Unclean int `json:"unclean"`
	// Interrupted is how many sessions had a gap in a phase that allows it.
	Interrupted int `json:"interrupted"`
	Counters
	// Phases are all phases in order, the current one last.
	Phases []PhaseReport `json:"phases"`
	// Examples describes the first few sessions that were lost or unclean.
	Examples []string `json:"examples,omitempty"`
}

// A PhaseReport is the part of a Report that happened in one phase. A gap
// belongs to the phase that allowed it, even if it was noticed later.
type PhaseReport struct {
	Name         string        `json:"name"`
	MayInterrupt bool          `json:"may_interrupt"`
	Duration     time.Duration `json:"duration_ns"`
	Lost         int           `json:"lost"`
	Interrupted  int           `json:"interrupted"`
	Counters
}

// Counters are what a Report and a PhaseReport have in common.
type Counters struct {
	FramesSent    int64 `json:"frames_sent"`
	FramesChecked int64 `json:"frames_checked"`
	BytesChecked  int64 `json:"bytes_checked"`
	// WrongBytes came back changed, doubled, out of order or unasked for, or
	// were missing where nothing may be.
	WrongBytes int64 `json:"wrong_bytes"`
	// BytesInterrupted were missing where a phase allows it.
	BytesInterrupted int64 `json:"bytes_interrupted"`
	// LongestStall is the longest that a sent frame waited for its echo, of
	// all sessions. Frames that still wait count with their age, and frames
	// that a crash took with the time until the stream went on.
	LongestStall time.Duration `json:"longest_stall_ns"`
	// LongestGap is the longest time between two echoes of one session. It
	// includes the interval between two frames, so it bounds from above what
	// LongestStall bounds from below: a frame may have been sent in the
	// middle of an outage.
	LongestGap time.Duration `json:"longest_gap_ns"`
	// StallP99 is the longest stall of the session that has more than 99 % of
	// the sessions below or at it.
	StallP99 time.Duration `json:"stall_p99_ns"`
	// ClientPause is the longest that the clients' own process did not get to
	// run, as a clock of 5 ms shows it. It is in the stalls: where the two are
	// about equal, the machine was too busy to tell.
	ClientPause time.Duration `json:"client_pause_ns"`
}

func (c *Counters) add(o Counters) {
	c.FramesSent += o.FramesSent
	c.FramesChecked += o.FramesChecked
	c.BytesChecked += o.BytesChecked
	c.WrongBytes += o.WrongBytes
	c.BytesInterrupted += o.BytesInterrupted
	c.LongestStall = max(c.LongestStall, o.LongestStall)
	c.LongestGap = max(c.LongestGap, o.LongestGap)
	c.ClientPause = max(c.ClientPause, o.ClientPause)
}

// p99 is the 99th percentile (nearest rank) of the sessions' longest stalls.
func p99(stalls []time.Duration) time.Duration {
	if len(stalls) == 0 {
		return 0
	}
	slices.Sort(stalls)
	return stalls[(len(stalls)*99+99)/100-1]
}

// Err is nil when every session lived, every byte was right and every end was
// clean. Interruptions are no error: only a phase that allows them has any.
func (r Report) Err() error {
	var what []string
	if r.Lost > 0 {
		what = append(what, fmt.Sprintf("%d of %d sessions lost", r.Lost, r.Sessions))
	}
	if r.WrongBytes > 0 {
		what = append(what, fmt.Sprintf("%d wrong bytes", r.WrongBytes))
	}
	if r.Unclean > 0 {
		what = append(what, fmt.Sprintf("%d unclean ends", r.Unclean))
	}
	if len(what) == 0 {
		return nil
	}
	s := strings.Join(what, ", ")
	if len(r.Examples) > 0 {
		s += "; " + strings.Join(r.Examples, "; ")
	}
	return errors.New("load: " + s)
}
