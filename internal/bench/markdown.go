package bench

import (
	"fmt"
	"os"
	"slices"
	"strings"
)

// in are the parts of a report that were measured in one guest; "" is this machine.
func (r Report) in(guest string) (p Report) {
	for _, c := range r.Results {
		if c.Run.Guest == guest {
			p.Results = append(p.Results, c)
		}
	}
	for _, i := range r.Idle {
		if i.Run.Guest == guest {
			p.Idle = append(p.Idle, i)
		}
	}
	return p
}

// guests are those that something was measured in, in the order of their measurement.
func (r Report) guests() (list []string) {
	add := func(g string) {
		if g != "" && !slices.Contains(list, g) {
			list = append(list, g)
		}
	}
	for _, c := range r.Results {
		add(c.Run.Guest)
	}
	for _, i := range r.Idle {
		add(i.Run.Guest)
	}
	return list
}

// runs describes where the parts of a report come from, each way once.
func (r Report) runs() string {
	var lines []string
	add := func(u Run) {
		line := fmt.Sprintf("- %s, %d cores; Linux %s; %s; %s, commit %s\n", u.CPU, u.Cores, u.Kernel, u.Go, u.Date, u.Commit)
		if !slices.Contains(lines, line) {
			lines = append(lines, line)
		}
	}
	for _, c := range r.Results {
		add(c.Run)
	}
	for _, i := range r.Idle {
		add(i.Run)
	}
	return strings.Join(lines, "")
}

func (r Report) rows() (rows []row) {
	for _, c := range r.Results {
		rows = append(rows, c.rows()...)
	}
	return rows
}

func (r Report) markdown() string {
	var b strings.Builder
	b.WriteString(`# Benchmarks

Written by ` + "`make bench`" + `; the same figures are in [results.json](results.json). Nothing
here was measured in a test: timed tests lie on busy machines. What reloads of other
servers do to the same clients is in [peers.md](peers.md) (` + "`make peers`" + `).

Both libraries take turns of a fraction of a second in one run. A ratio is ktls's figure
divided by crypto/tls's: the median over pairs of neighbouring turns, with the 95 %
confidence interval of that median (order statistics, as benchstat has it), so that the
load of other programs meets both. Rates and times are medians of the turns.

## Software layer

`)
	host := r.in("")
	b.WriteString(host.runs())
	b.WriteString(`
Over the loopback, with the same library at both ends. CPU time is user and system time;
for handshakes that of a server in a process of its own, with accepting and collecting
garbage, without closing. crypto/tls lets nobody choose AES-256-GCM in TLS 1.3; ChaCha20-Poly1305
in TLS 1.3 is measured in processes that are told that there are no AES instructions.

`)
	b.WriteString(table(host.rows()))
	b.WriteString("\n![rates](speed.svg)\n\n![CPU time](cpu.svg)\n")
	b.WriteString(`
## Idle sessions

Resident memory (the kernel's proportional set size, in which shared pages count once) of
**all** processes of ` + "`ktlsvisor run`" + ` with one worker, ` + "`examples/echo`" + `: keeper, supervisor,
worker. Each session has echoed a byte and then does nothing. The figure is the slope
between two numbers of sessions, read when memory has not changed by more than 1 % for
8 s (90 s at most). Memory of the kernel (sockets) is not in it, and neither are the
clients, which are a process of their own. The reference is a crypto/tls echo server with
a goroutine and a buffer of 4 KiB for each connection.

`)
	var rows []row
	for _, i := range r.Idle {
		w := i.row()
		if i.Run.Guest != "" {
			w.what += ", Linux " + i.Run.Kernel
		}
		rows = append(rows, w)
	}
	for _, i := range r.Idle {
		rows = append(rows, i.holders())
	}
	b.WriteString(table(rows))
	for _, i := range r.Idle {
		var parts []string
		for _, name := range sorted(i.Ours.Parts) {
			parts = append(parts, fmt.Sprintf("%s %.1f KiB", name, i.Ours.Parts[name]))
		}
		fmt.Fprintf(&b, "\n%s layer, Linux %s: %s.\n", i.Layer, i.Run.Kernel, strings.Join(parts, ", "))
	}
	b.WriteString("\n![idle memory](idle.svg)\n")
	b.WriteString(movesText(r.Moves))
	for _, g := range r.guests() {
		part := r.in(g)
		if len(part.Results) == 0 {
			continue
		}
		fmt.Fprintf(&b, "\n## Kernel layer, Linux %s\n\n", part.Results[0].Run.Kernel)
		b.WriteString(part.runs())
		b.WriteString(`
In an emulated machine (QEMU without KVM), where instructions for AES have no speed of
their own: read the ratios, and those as what emulation makes of them. The file goes out
by sendfile; its client is crypto/tls in a process of its own and does not count.

`)
		b.WriteString(table(part.rows()))
	}
	return b.String()
}

// The README quotes the figures between these marks.
const (
	quoteBegin = "<!-- make bench: begin -->\n"
	quoteEnd   = "<!-- make bench: end -->\n"
)

// quoted are the measurements that the README shows.
var quoted = []string{"bulk16-tls13-aes128", "bulk64-tls13-aes128", "pingpong-tls13-aes128", "handshake-tls13", "file-tls13-aes128"}

func (r Report) quote() string {
	var rows []row
	for _, id := range quoted {
		for _, c := range r.Results {
			if c.ID != id || c.Layer == "kernel" && !strings.HasPrefix(id, "file") {
				continue
			}
			for _, w := range c.rows() {
				if strings.HasSuffix(w.what, "allocations a record") {
					continue
				}
				if c.Layer == "kernel" {
					w.what += ", kernel layer (sendfile), Linux " + c.Run.Kernel + ", emulated"
				}
				rows = append(rows, w)
			}
		}
	}
	for _, i := range r.Idle {
		w := i.row()
		if i.Run.Guest != "" {
			w.what += ", Linux " + i.Run.Kernel
		}
		rows = append(rows, w)
	}
	return quoteBegin + table(rows) + movesQuote(r.Moves) + quoteEnd
}

// Quote puts the figures into the README.
func (r Report) Quote(file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	text := string(b)
	i, j := strings.Index(text, quoteBegin), strings.Index(text, quoteEnd)
	if i < 0 || j < i {
		return fmt.Errorf("%s has no place for figures: %q, then %q", file, quoteBegin, quoteEnd)
	}
	return os.WriteFile(file, []byte(text[:i]+r.quote()+text[j+len(quoteEnd):]), 0o644)
}
