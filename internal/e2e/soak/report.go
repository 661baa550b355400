package soak

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/load"
)

// end lets the clients go and compares the accounts.
func (s *soak) end() {
	var all load.Report
	for _, f := range s.fleet {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		r := f.Stop(ctx)
		cancel()
		if err := r.Err(); err != nil {
			s.wrong("%v", err)
		}
		all.Sessions += r.Sessions
		all.Lost += r.Lost
		all.Unclean += r.Unclean
		all.Interrupted += r.Interrupted
		all.FramesChecked += r.FramesChecked
		all.BytesChecked += r.BytesChecked
		all.WrongBytes += r.WrongBytes
		all.BytesInterrupted += r.BytesInterrupted
		all.LongestStall = max(all.LongestStall, r.LongestStall)
		for _, p := range r.Phases {
			if p.Interrupted > 0 && !p.MayInterrupt {
				s.wrong("%d sessions miss bytes after %q", p.Interrupted, p.Name)
			}
		}
	}
	s.rep.Clients = all
	st, err := s.unit.Await(patience, "all sessions to have ended", func(st *admin.Status) bool { return st.Sessions.Total == 0 })
	if err != nil {
		s.wrong("%v", err)
		return
	}
	c := st.Counters
	s.rep.Counters = c
	if sum := c.ClosedByPeer + c.ClosedByOwner + c.ClosedUnknown + c.Lost; sum != c.Accepted || c.Lost != uint64(all.Lost) {
		s.wrong("%d accepted, %d ended, %d lost (the clients: %d): %+v", c.Accepted, sum, c.Lost, all.Lost, c)
	}
	if uint64(all.Interrupted) > c.Interrupted {
		s.wrong("%d clients miss bytes, the unit counts %d interrupted", all.Interrupted, c.Interrupted)
	}
	if len(s.rep.Wrong) == 0 {
		if err := s.unit.Stop(); err != nil {
			s.wrong("%v", err)
		}
	}
	s.flat()
}

// slopeAfter is how many upgrades make a slope of memory: in fewer the keeper's heap has
// not been collected often enough.
const slopeAfter = 200

// Bounds of growth: for 100 upgrades, and before slopeAfter in all.
const (
	maxFDs   = 1.0
	maxKiB   = 256.0
	firstKiB = 64 << 10 // with the race detector
)

// flat looks whether the keeper, which is one process all the time, grows.
func (s *soak) flat() {
	n := len(s.rep.Samples)
	if n == 0 {
		return
	}
	a, z := s.rep.Samples[0], s.rep.Samples[n-1]
	if z.KeeperFDs > a.KeeperFDs+2 {
		s.wrong("the keeper's descriptors have grown from %d to %d: from %v to %v", a.KeeperFDs, z.KeeperFDs, a.KeeperKinds, z.KeeperKinds)
	}
	if z.KeeperKiB > a.KeeperKiB+firstKiB {
		s.wrong("the keeper's memory has grown from %d to %d KiB", a.KeeperKiB, z.KeeperKiB)
	}
	if s.rep.Upgrades < slopeAfter {
		return
	}
	fds, kib := s.rep.Slopes()
	if fds > maxFDs || kib > maxKiB {
		s.wrong("the keeper grows by %.2f descriptors and %.0f KiB in 100 upgrades", fds, kib)
	}
}

// Slopes is by how much the keeper's descriptors and memory grow in 100 upgrades, by
// least squares over the later half of the samples.
func (r *Report) Slopes() (fds, kib float64) {
	list := r.Samples[len(r.Samples)/2:]
	return slope(list, func(p Sample) int { return p.KeeperFDs }), slope(list, func(p Sample) int { return p.KeeperKiB })
}

func slope(list []Sample, of func(Sample) int) float64 {
	var n, x, y, xx, xy float64
	for _, p := range list {
		a, b := float64(p.Upgrades)/100, float64(of(p))
		n, x, y, xx, xy = n+1, x+a, y+b, xx+a*a, xy+a*b
	}
	if d := n*xx - x*x; d > 0 {
		return (n*xy - x*y) / d
	}
	return 0
}

// Print writes the report for people.
func (r *Report) Print(w io.Writer) {
	c := r.Clients
	fmt.Fprintf(w, "%v, seed %d\n", r.Took.Round(time.Second), r.Seed)
	for _, name := range slices.Sorted(maps.Keys(r.Done)) {
		fmt.Fprintf(w, "%6d  %s\n", r.Done[name], name)
	}
	fmt.Fprintf(w, "%d upgrades begun, %d sessions moved, %d returned\n", r.Upgrades, r.Counters.Moved, r.Counters.Returned)
	fmt.Fprintf(w, "%d clients that stayed, %d that came and went: %d lost, %d frames and %d bytes checked, %d bytes wrong\n",
		c.Sessions, r.Visits, c.Lost, c.FramesChecked, c.BytesChecked, c.WrongBytes)
	fmt.Fprintf(w, "%d adoptions counted as interrupted; %d times a client missed bytes (%d bytes) that a killed worker had in hand\n",
		r.Counters.Interrupted, c.Interrupted, c.BytesInterrupted)
	fmt.Fprintf(w, "longest stall %v\n", c.LongestStall.Round(time.Millisecond))
	if n := len(r.Samples); n > 0 {
		a, z := r.Samples[0], r.Samples[n-1]
		fmt.Fprintf(w, "keeper: %d -> %d descriptors, %d -> %d KiB; supervisor: %d -> %d descriptors, %d -> %d KiB\n",
			a.KeeperFDs, z.KeeperFDs, a.KeeperKiB, z.KeeperKiB, a.SupervisorFDs, z.SupervisorFDs, a.SupervisorKiB, z.SupervisorKiB)
		if r.Upgrades >= slopeAfter {
			fds, kib := r.Slopes()
			fmt.Fprintf(w, "keeper, growth for 100 upgrades: %.2f descriptors, %.0f KiB\n", fds, kib)
		}
	}
	for _, x := range r.Wrong {
		fmt.Fprintln(w, "WRONG:", x)
	}
}
