package bench

import (
	"fmt"
	"math"
	"runtime"
	"slices"
	"syscall"
	"time"
)

// turn is what one turn cost.
type turn struct {
	wall   time.Duration
	cpu    time.Duration // user and system
	allocs uint64        // 0 where they are not counted
}

// cpuTime is what this process has used so far.
func cpuTime() (time.Duration, error) {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0, fmt.Errorf("getrusage: %w", err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), nil
}

// timed measures work by the clocks of this process.
func timed(work func() error) (turn, error) {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	cpu, err := cpuTime()
	if err != nil {
		return turn{}, err
	}
	begin := time.Now()
	if err := work(); err != nil {
		return turn{}, err
	}
	t := turn{wall: time.Since(begin)}
	end, err := cpuTime()
	t.cpu = end - cpu
	runtime.ReadMemStats(&after)
	t.allocs = after.Mallocs - before.Mallocs
	return t, err
}

// effort is what one turn does: in units of the rate, in what the CPU time is for, and
// in records.
type effort struct {
	rate, cpu float64
	records   int
}

// Comparison is one measurement of both libraries. Ratios are ours divided by
// crypto/tls's, so a Speed above 1 and a CPU below 1 are good.
type Comparison struct {
	ID     string `json:"id"`
	Name   string `json:"name"`
	Layer  string `json:"layer"`   // software or kernel
	Unit   string `json:"unit"`    // of OursRate and StockRate
	CPUFor string `json:"cpu_for"` // what OursCPU and StockCPU are the nanoseconds of
	CPUOf  string `json:"cpu_of"`  // whose time it is

	OursRate  float64 `json:"ktls_rate"`
	StockRate float64 `json:"crypto_tls_rate"`
	OursCPU   float64 `json:"ktls_cpu_ns"`
	StockCPU  float64 `json:"crypto_tls_cpu_ns"`

	Speed Ratio `json:"speed_ratio"`
	CPU   Ratio `json:"cpu_ratio"`
	Turns int   `json:"turns"`

	// Allocations of both ends for each record; nil where they are not counted.
	Allocs *Allocs `json:"allocs_per_record,omitempty"`

	Run Run `json:"run"`
}

// Ratio is the median of the ratios of neighbouring turns, with the bounds of its 95 %
// confidence interval (order statistics, as benchstat has it).
type Ratio struct {
	Median float64 `json:"median"`
	Low    float64 `json:"low"`
	High   float64 `json:"high"`
}

// Allocs are heap objects, medians of the turns.
type Allocs struct {
	Ours  float64 `json:"ktls"`
	Stock float64 `json:"crypto_tls"`
}

// compare lets both libraries work in turns.
func compare(turns int, e effort, work map[library]func() (turn, error)) (Comparison, error) {
	rates, cpus, allocs := map[library][]float64{}, map[library][]float64{}, map[library][]float64{}
	for i := -1; i < turns; i++ { // the first turn is for warming up
		for j := range libraries {
			lib := libraries[(i+1+j)%len(libraries)] // who is first changes
			t, err := work[lib]()
			if err != nil {
				return Comparison{}, fmt.Errorf("%s: %w", lib, err)
			}
			if i >= 0 {
				rates[lib] = append(rates[lib], e.rate/t.wall.Seconds())
				cpus[lib] = append(cpus[lib], float64(t.cpu.Nanoseconds())/e.cpu)
				allocs[lib] = append(allocs[lib], float64(t.allocs)/float64(max(e.records, 1)))
			}
		}
	}
	c := Comparison{
		OursRate: quantile(rates[ours], .5), StockRate: quantile(rates[stock], .5),
		OursCPU: quantile(cpus[ours], .5), StockCPU: quantile(cpus[stock], .5),
		Speed: ratio(rates[ours], rates[stock]), CPU: ratio(cpus[ours], cpus[stock]), Turns: turns,
	}
	if e.records > 0 {
		c.Allocs = &Allocs{Ours: quantile(allocs[ours], .5), Stock: quantile(allocs[stock], .5)}
	}
	return c, nil
}

func ratio(a, b []float64) Ratio {
	r := make([]float64, len(a))
	for i := range a {
		r[i] = a[i] / b[i]
	}
	slices.Sort(r)
	k := outside(len(r))
	return Ratio{Median: quantile(r, .5), Low: r[k], High: r[len(r)-1-k]}
}

// outside is how many of n sorted values may be left out at each end so that the rest
// spans the median of what they were drawn from with a probability of 95 %: each value
// is below it as a coin falls.
func outside(n int) int {
	p, below := math.Pow(.5, float64(n)), 0.0
	for k := range n / 2 {
		below += p
		if 2*below > .05 {
			return max(k-1, 0)
		}
		p *= float64(n-k) / float64(k+1)
	}
	return 0
}

// quantile of v, interpolated; v is not empty.
func quantile(v []float64, q float64) float64 {
	s := slices.Sorted(slices.Values(v))
	at := q * float64(len(s)-1)
	i := int(at)
	if i+1 == len(s) {
		return s[i]
	}
	return s[i] + (s[i+1]-s[i])*(at-float64(i))
}
