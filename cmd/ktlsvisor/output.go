package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// printJSON writes one indented JSON document.
func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// answer prints the report of a command, which has its exit code in it.
func answer[R any](a *app, asJSON bool, rep R, forPeople func(io.Writer, R), code admin.Outcome) error {
	if asJSON {
		if err := printJSON(a.out, rep); err != nil {
			return err
		}
	} else {
		forPeople(a.out, rep)
	}
	return quietly(int(code))
}

// noReport is the answer of such a command when it failed before there was a report:
// with --json an empty one that says why. It returns err with its exit code.
func (a *app) noReport(err error, asJSON bool, empty any, code int) error {
	if asJSON {
		if perr := printJSON(a.out, empty); perr != nil {
			return perr
		}
	}
	return &codedError{code, err}
}

// failed is the answer of a command that has none: with --json that is an object too,
// with the field error, so that scripts need not tell an empty answer from a broken
// one. It returns err.
func (a *app) failed(err error, asJSON bool) error {
	if asJSON {
		if perr := printJSON(a.out, struct {
			Error string `json:"error"`
		}{err.Error()}); perr != nil {
			return perr
		}
	}
	return err
}

// table writes rows with aligned columns, two spaces apart.
func table(w io.Writer, rows [][]string) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		for i, cell := range row {
			if i > 0 {
				_, _ = io.WriteString(tw, "\t")
			}
			_, _ = io.WriteString(tw, clean(cell))
		}
		_, _ = io.WriteString(tw, "\n")
	}
	_ = tw.Flush()
}

// clean makes a string harmless on a terminal: server names and the like are what
// a stranger sent.
func clean(s string) string {
	ok := func(r rune) bool { return r != unicode.ReplacementChar && unicode.IsPrint(r) }
	if strings.IndexFunc(s, func(r rune) bool { return !ok(r) }) < 0 {
		return s
	}
	return strings.Map(func(r rune) rune {
		if ok(r) {
			return r
		}
		return '?'
	}, s)
}

// shorten cuts a text to at most n characters; the JSON form has all of it.
func shorten(s string, n int) string {
	r := []rune(s)
	if len(r) <= n {
		return s
	}
	return string(r[:n-1]) + "…"
}

// orDash stands in for nothing, so that columns can be counted.
func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// age is a duration as people say it.
func age(seconds float64) string {
	d := time.Duration(seconds * float64(time.Second))
	switch {
	case d < 10*time.Second:
		return d.Round(100 * time.Millisecond).String()
	case d < time.Hour:
		return d.Round(time.Second).String()
	case d < 24*time.Hour:
		return d.Round(time.Minute).Truncate(time.Minute).String()[:len(d.Round(time.Minute).String())-2]
	}
	return fmt.Sprintf("%dd%dh", int(d.Hours())/24, int(d.Hours())%24)
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// progressPrinter shows how an operation goes on: on a terminal one line that
// changes, elsewhere a line for each new text and at most one a second besides.
type progressPrinter struct {
	w    io.Writer
	tty  bool
	text string
	last time.Time
	open bool // the terminal's line is not ended
}

func newProgress(w io.Writer) *progressPrinter {
	return &progressPrinter{w: w, tty: isTerminal(w)}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	rc, err := f.SyscallConn()
	if err != nil {
		return false
	}
	tty := false
	err = rc.Control(func(fd uintptr) { tty = sys.IsTerminal(int(fd)) })
	return err == nil && tty
}

func (p *progressPrinter) show(pr admin.Progress) {
	text := clean(pr.Text)
	if pr.Total > 0 {
		text = fmt.Sprintf("%s %d of %d", text, pr.Done, pr.Total)
	}
	if p.tty {
		fmt.Fprintf(p.w, "\r\x1b[K%s", text)
		p.open = true
		return
	}
	now := time.Now()
	if pr.Text == p.text && pr.Done < pr.Total && now.Sub(p.last) < time.Second {
		return
	}
	p.text, p.last = pr.Text, now
	fmt.Fprintln(p.w, text)
}

// end clears the terminal's line.
func (p *progressPrinter) end() {
	if p.open {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.open = false
	}
}
