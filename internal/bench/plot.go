package bench

import (
	"fmt"
	"html"
	"strings"
)

// plot draws one bar a result, with a line from quartile to quartile, and a mark
// at 1, where both libraries are equal.
func plot(title string, results []Comparison, of func(Comparison) (v, low, high float64)) string {
	const left, width, row, top = 290, 400, 24, 44
	most := 1.5
	for _, c := range results {
		_, _, high := of(c)
		most = max(most, high)
	}
	x := func(v float64) float64 { return left + v/most*width }
	bottom := top + row*len(results)
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="13">
<rect width="100%%" height="100%%" fill="white"/>
<text x="12" y="24" font-size="15" font-weight="bold">%s</text>
`, left+width+60, bottom+30, html.EscapeString(title))
	for i, c := range results {
		v, low, high := of(c)
		y := top + row*i
		fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end">%s</text>
<rect x="%d" y="%d" width="%.1f" height="%d" fill="#4878a8"/>
<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#222" stroke-width="2"/>
<text x="%.1f" y="%d">%.2f</text>
`, left-8, y+16, html.EscapeString(c.Name), left, y+4, x(v)-left, row-8,
			x(low), y+row/2, x(high), y+row/2, max(x(v), x(high))+6, y+16, v)
	}
	fmt.Fprintf(&b, `<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#c03020" stroke-dasharray="4 3"/>
<text x="%.1f" y="%d" text-anchor="middle" fill="#c03020">crypto/tls = 1</text>
</svg>
`, x(1), top-6, x(1), bottom+4, x(1), bottom+20)
	return b.String()
}
