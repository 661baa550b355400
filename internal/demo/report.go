package demo

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/load"
)

// Report is what happened; `ktlsvisor demo --json` prints it.
type Report struct {
	OK          bool           `json:"ok"`
	Sessions    int            `json:"sessions"`
	Open        int            `json:"open"` // still connected after the last step
	Lost        int            `json:"lost"`
	WrongBytes  int64          `json:"wrong_bytes"`
	Interrupted int            `json:"interrupted"` // had data in flight in a worker that was killed
	Layer       string         `json:"layer"`       // kernel, software or mixed
	Steps       []Step         `json:"steps"`
	Reasons     map[string]int `json:"lost_reasons,omitempty"`
	Checked     int64          `json:"bytes_checked"`
	Seconds     float64        `json:"duration_seconds"`

	fleet *load.Report
}

// Step is one line of the table.
type Step struct {
	Name               string  `json:"name"`
	What               string  `json:"what"`
	OldPIDs            []int   `json:"old_pids,omitempty"`
	NewPIDs            []int   `json:"new_pids,omitempty"`
	Before             int     `json:"connections_before"`
	After              int     `json:"connections_after"`
	Lost               int     `json:"lost"`
	WrongBytes         int64   `json:"wrong_bytes"`
	Interrupted        int     `json:"interrupted"`
	LongestStallMillis float64 `json:"longest_stall_ms"`
	BackMillis         float64 `json:"back_after_ms,omitempty"` // from the death to the successor's first answer
}

// conclude fills in the totals from the clients' own account.
func (r *Report) conclude() {
	if r.Steps == nil {
		r.Steps = []Step{}
	}
	if r.fleet == nil {
		return
	}
	f := r.fleet
	r.Open, r.Lost, r.WrongBytes, r.Interrupted = f.Alive, f.Lost, f.WrongBytes, f.Interrupted
	r.Checked, r.Reasons = f.BytesChecked, f.LostReasons
	// A client that gets no close_notify at the end was not lost, but not served
	// well either.
	if f.Unclean > 0 {
		if r.Reasons == nil {
			r.Reasons = make(map[string]int)
		}
		r.Reasons["ended without close_notify"] += f.Unclean
	}
	r.OK = r.Open == r.Sessions && r.Lost == 0 && r.WrongBytes == 0 && f.Unclean == 0
}

// Print writes the table and the last line for people.
func (r *Report) Print(w io.Writer) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "STEP\tWHAT HAPPENED\tCONNECTIONS\tLOST\tWRONG BYTES\tLONGEST STALL")
	for _, s := range r.Steps {
		fmt.Fprintf(tw, "%s\t%s\t%d -> %d\t%d\t%d\t%.0f ms\n", s.Name, s.What, s.Before, s.After, s.Lost, s.WrongBytes, s.LongestStallMillis)
	}
	_ = tw.Flush()
	fmt.Fprintln(w)
	if r.Interrupted > 0 {
		fmt.Fprintf(w, "%d connections had data in the worker that was killed: they stay open, that data is gone.\n", r.Interrupted)
	}
	for reason, n := range r.Reasons {
		fmt.Fprintf(w, "%d × %s\n", n, strings.TrimSpace(reason))
	}
	fmt.Fprintf(w, "%d of %d connections are still open. %d lost, %d wrong bytes. (%s layer, %s checked, %.1f s)\n",
		r.Open, r.Sessions, r.Lost, r.WrongBytes, r.Layer, bytesText(r.Checked), r.Seconds)
}

func bytesText(n int64) string {
	if n < 1<<20 {
		return fmt.Sprintf("%.1f KB", float64(n)/1e3)
	}
	return fmt.Sprintf("%.1f MB", float64(n)/1e6)
}

// teller prints steps as they happen.
type teller struct {
	w     io.Writer
	color bool
	began time.Time
	n     int
}

func newTeller(w io.Writer, color bool) *teller {
	if w == nil {
		w = io.Discard
	}
	return &teller{w: w, color: color, began: time.Now()}
}

func (t *teller) step(format string, args ...any) {
	t.n++
	t.line("", "%d. "+format, append([]any{t.n}, args...)...)
}

func (t *teller) done(format string, args ...any) { t.line("32", "   "+format, args...) }

func (t *teller) line(color, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if t.color && color != "" {
		text = "\x1b[" + color + "m" + text + "\x1b[0m"
	}
	fmt.Fprintf(t.w, "%5.1fs  %s\n", time.Since(t.began).Seconds(), text)
}
