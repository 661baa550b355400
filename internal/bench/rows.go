package bench

import (
	"fmt"
	"strings"
)

// row is one line of a table: one figure of one measurement.
type row struct {
	what        string
	ours, stock string
	ratio       *Ratio
	target      string
	met         string // "yes", "no", "" without a target
}

// The targets. Ratios are ours divided by crypto/tls's.
const (
	bulkRate     = 1.3
	bulkCPU      = 1.0
	pingPongRate = 1.1
	handshakeCPU = 1.08
	idleKiB      = 6
	holdersKiB   = 1
	noAllocs     = 0.005 // a record; below, it rounds to 0.00
)

func (c Comparison) rows() []row {
	rate := row{what: c.Name + ": rate", ours: amount(c.OursRate) + " " + c.Unit, stock: amount(c.StockRate) + " " + c.Unit, ratio: &c.Speed}
	cpu := row{what: fmt.Sprintf("%s: CPU of %s", c.Name, c.CPUOf), ours: nanos(c.OursCPU, c.CPUFor), stock: nanos(c.StockCPU, c.CPUFor), ratio: &c.CPU}
	var rows []row
	kind, _, _ := strings.Cut(c.ID, "-")
	switch {
	case c.Layer == "kernel":
		rows = []row{rate, cpu}
	case strings.HasPrefix(kind, "bulk"):
		rows = []row{rate.atLeast(bulkRate), cpu.atMost(bulkCPU)}
	case kind == "pingpong":
		rows = []row{rate.atLeast(pingPongRate), cpu}
	case kind == "handshake":
		return []row{cpu.atMost(handshakeCPU)}
	default:
		rows = []row{rate, cpu}
	}
	if c.Allocs != nil && c.Layer == "software" {
		rows = append(rows, row{what: c.Name + ": allocations a record", ours: fmt.Sprintf("%.2f", c.Allocs.Ours),
			stock: fmt.Sprintf("%.2f", c.Allocs.Stock), target: "0", met: yes(c.Allocs.Ours < noAllocs)})
	}
	return rows
}

func (r row) atLeast(v float64) row {
	r.target, r.met = fmt.Sprintf("≥ %.2f", v), yes(r.ratio.Median >= v)
	return r
}

func (r row) atMost(v float64) row {
	r.target, r.met = fmt.Sprintf("≤ %.2f", v), yes(r.ratio.Median <= v)
	return r
}

func yes(ok bool) string {
	if ok {
		return "yes"
	}
	return "**no**"
}

func (i Idle) row() row {
	r := row{what: fmt.Sprintf("idle session, %s layer, slope from %d to %d", i.Layer, i.Few, i.Many),
		ours: fmt.Sprintf("%.1f KiB", i.Ours.PerSession), target: fmt.Sprintf("≤ %d KiB", idleKiB), met: yes(i.Ours.PerSession <= idleKiB)}
	if i.Stock != nil {
		r.stock = fmt.Sprintf("%.1f KiB", i.Stock.PerSession)
		v := i.Ours.PerSession / i.Stock.PerSession
		r.ratio = &Ratio{v, v, v}
	}
	return r
}

// holders is what supervisor and keeper take of it.
func (i Idle) holders() row {
	v := i.Ours.Parts["supervisor"] + i.Ours.Parts["keeper"]
	what := fmt.Sprintf("of it supervisor and keeper, %s layer", i.Layer)
	if i.Run.Guest != "" {
		what += ", Linux " + i.Run.Kernel
	}
	return row{what: what, ours: fmt.Sprintf("%.1f KiB", v), target: fmt.Sprintf("≤ %d KiB", holdersKiB), met: yes(v <= holdersKiB)}
}

func amount(v float64) string {
	if v < 10 {
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.0f", v)
}

func nanos(ns float64, what string) string {
	if ns >= 1000 {
		return fmt.Sprintf("%.1f µs a %s", ns/1000, what)
	}
	return fmt.Sprintf("%.2f ns a %s", ns, what)
}

func table(rows []row) string {
	var b strings.Builder
	b.WriteString("| what | ktls | crypto/tls | ratio | 95 % interval | target | met |\n|---|---:|---:|---:|---:|---:|---|\n")
	for _, r := range rows {
		ratio, spread := "", ""
		if r.ratio != nil {
			ratio = fmt.Sprintf("**%.2f**", r.ratio.Median)
			if r.ratio.Low != r.ratio.High {
				spread = fmt.Sprintf("%.2f to %.2f", r.ratio.Low, r.ratio.High)
			}
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %s |\n", r.what, r.ours, r.stock, ratio, spread, r.target, r.met)
	}
	return b.String()
}
