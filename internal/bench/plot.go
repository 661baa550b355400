package bench

import (
	"fmt"
	"html"
	"strings"
)

// bar is one bar of a plot; low and high are drawn as a line where they differ.
type bar struct {
	name         string
	v, low, high float64
	colour       string
}

const (
	blue = "#4878a8"
	grey = "#a0a0a0"
)

func (r Report) plots() map[string]string {
	var speed, cpu, idle []bar
	for _, c := range r.Results {
		name := c.Name
		if c.Layer == "kernel" {
			name += ", kernel " + c.Run.Guest
		}
		cpu = append(cpu, bar{name, c.CPU.Median, c.CPU.Low, c.CPU.High, blue})
		if !strings.HasPrefix(c.ID, "handshake") {
			speed = append(speed, bar{name, c.Speed.Median, c.Speed.Low, c.Speed.High, blue})
		}
	}
	for _, i := range r.Idle {
		name := i.Layer + " layer"
		if i.Run.Guest != "" {
			name += ", kernel " + i.Run.Guest
		}
		idle = append(idle, bar{"ktlsvisor, " + name, i.Ours.PerSession, i.Ours.PerSession, i.Ours.PerSession, blue})
		if i.Stock != nil {
			idle = append(idle, bar{"crypto/tls, goroutine and 4 KiB", i.Stock.PerSession, i.Stock.PerSession, i.Stock.PerSession, grey})
		}
	}
	return map[string]string{
		"speed.svg": plot("Rate, ktls divided by crypto/tls (more is better)", 1, "crypto/tls = 1", speed),
		"cpu.svg":   plot("CPU time, ktls divided by crypto/tls (less is better)", 1, "crypto/tls = 1", cpu),
		"idle.svg":  plot("KiB of resident memory for each idle session (less is better)", idleKiB, "target", idle),
	}
}

// plot draws bars, and a mark at a value.
func plot(title string, mark float64, label string, bars []bar) string {
	const left, width, row, top = 380, 400, 22, 44
	most := 1.5 * mark
	for _, c := range bars {
		most = max(most, c.v, c.high)
	}
	x := func(v float64) float64 { return left + v/most*width }
	bottom := top + row*len(bars)
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="13">
<rect width="100%%" height="100%%" fill="white"/>
<text x="12" y="24" font-size="15" font-weight="bold">%s</text>
`, left+width+60, bottom+30, html.EscapeString(title))
	for i, c := range bars {
		y := top + row*i
		fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end">%s</text>
<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>
<text x="%.1f" y="%d">%.2f</text>
`, left-8, y+15, html.EscapeString(c.name), left, y+4, x(c.v)-left, row-8, c.colour, max(x(c.v), x(c.high))+6, y+15, c.v)
		if c.low != c.high {
			fmt.Fprintf(&b, `<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#222" stroke-width="2"/>
`, x(c.low), y+row/2, x(c.high), y+row/2)
		}
	}
	fmt.Fprintf(&b, `<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#c03020" stroke-dasharray="4 3"/>
<text x="%.1f" y="%d" text-anchor="middle" fill="#c03020">%s</text>
</svg>
`, x(mark), top-6, x(mark), bottom+4, x(mark), bottom+20, html.EscapeString(label))
	return b.String()
}
