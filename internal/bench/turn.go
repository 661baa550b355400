package bench

import (
	"fmt"
	"slices"
	"syscall"
	"time"
)

// turn is what one turn cost.
type turn struct {
	wall time.Duration
	cpu  time.Duration // user and system; of both ends, except for handshakes
}

// cpuTime is what this process has used so far.
func cpuTime() (time.Duration, error) { return usedBy(syscall.RUSAGE_SELF) }

func usedBy(who int) (time.Duration, error) {
	var u syscall.Rusage
	if err := syscall.Getrusage(who, &u); err != nil {
		return 0, fmt.Errorf("getrusage: %w", err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), nil
}

func timed(clock func() (time.Duration, error), work func() error) (turn, error) {
	cpu, err := clock()
	if err != nil {
		return turn{}, err
	}
	begin := time.Now()
	if err := work(); err != nil {
		return turn{}, err
	}
	t := turn{wall: time.Since(begin)}
	after, err := clock()
	t.cpu = after - cpu
	return t, err
}

// Comparison is one measurement of both libraries. Ratios are ours divided by
// crypto/tls's, so a Speed above 1 and a CPU below 1 are good.
type Comparison struct {
	Name   string `json:"name"`
	Unit   string `json:"unit"`    // of OursRate and StockRate
	CPUFor string `json:"cpu_for"` // what OursCPU and StockCPU are the nanoseconds of

	OursRate  float64 `json:"ktls_rate"`
	StockRate float64 `json:"crypto_tls_rate"`
	OursCPU   float64 `json:"ktls_cpu_ns"`
	StockCPU  float64 `json:"crypto_tls_cpu_ns"`

	Speed float64 `json:"speed_ratio"`
	// SpeedLow and SpeedHigh are the quartiles of the turns' ratios.
	SpeedLow  float64 `json:"speed_ratio_q1"`
	SpeedHigh float64 `json:"speed_ratio_q3"`
	CPU       float64 `json:"cpu_ratio"`
	CPULow    float64 `json:"cpu_ratio_q1"`
	CPUHigh   float64 `json:"cpu_ratio_q3"`
	Turns     int     `json:"turns"`
}

// compare lets both libraries work in turns. amount is what one turn does, in
// units of the rate; cpuUnits is the same in what the CPU time is for.
func compare(name string, turns int, amount, cpuUnits float64, work map[library]func() error) (Comparison, error) {
	return compareBy(cpuTime, name, turns, amount, cpuUnits, work)
}

func compareBy(clock func() (time.Duration, error), name string, turns int, amount, cpuUnits float64, work map[library]func() error) (Comparison, error) {
	rates, cpus := map[library][]float64{}, map[library][]float64{}
	for i := -1; i < turns; i++ { // the first turn is for warming up
		for j := range libraries {
			lib := libraries[(i+1+j)%len(libraries)] // who is first changes
			t, err := timed(clock, work[lib])
			if err != nil {
				return Comparison{}, fmt.Errorf("%s, %s: %w", name, lib, err)
			}
			if i >= 0 {
				rates[lib] = append(rates[lib], amount/t.wall.Seconds())
				cpus[lib] = append(cpus[lib], float64(t.cpu.Nanoseconds())/cpuUnits)
			}
		}
	}
	speed, cpu := ratios(rates[ours], rates[stock]), ratios(cpus[ours], cpus[stock])
	return Comparison{
		Name:     name,
		OursRate: quantile(rates[ours], .5), StockRate: quantile(rates[stock], .5),
		OursCPU: quantile(cpus[ours], .5), StockCPU: quantile(cpus[stock], .5),
		Speed: quantile(speed, .5), SpeedLow: quantile(speed, .25), SpeedHigh: quantile(speed, .75),
		CPU: quantile(cpu, .5), CPULow: quantile(cpu, .25), CPUHigh: quantile(cpu, .75), Turns: turns,
	}, nil
}

func ratios(a, b []float64) []float64 {
	r := make([]float64, len(a))
	for i := range a {
		r[i] = a[i] / b[i]
	}
	return r
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
