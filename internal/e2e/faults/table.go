package faults

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
)

// Outcomes of a case, the columns of the table.
const (
	Unnoticed   = "unnoticed"
	NotDone     = "not done"
	Stayed      = "stayed"
	Interrupted = "interrupted"
	LostSome    = "lost"
	NotReached  = "not reached"
	Wrong       = "WRONG"
)

var outcomes = []string{Unnoticed, NotDone, Stayed, Interrupted, LostSome, NotReached, Wrong}

// Outcome says how a case ended, in a word.
func (r *Result) Outcome() string {
	switch {
	case len(r.Wrong) > 0:
		return Wrong
	case !r.Reached:
		return NotReached
	case r.Counters.Lost > 0:
		return LostSome
	case r.Counters.Interrupted > 0:
		return Interrupted
	case r.Exit == 4 || r.Detached > 0:
		return Stayed
	case r.Exit > 0 || r.Refused > 0:
		return NotDone
	}
	return Unnoticed
}

// Section is the cases of one record layer on one machine.
type Section struct {
	Layer   string
	Where   string // "this machine", or a guest's kernel
	Results []*Result
}

var opText = map[string]string{
	Upgrade:    "A pool is upgraded to a new program; everything moves.",
	Adoption:   "A worker is killed with -9; its sessions are adopted by others.",
	Accept:     "New clients connect and say goodbye.",
	Rekey:      "The operator asks for new keys, and clients change theirs.",
	Succession: "The supervisor is replaced as planned.",
	Restart:    "In an upgrade the supervisor is killed before its first RESUME; the next one goes on, and then something else fails.",
	Return:     "In an upgrade a worker of the new generation is killed before its first ADOPTED; everything goes back, and then something else fails.",
	Traffic:    "Clients send and receive; a worker is killed at the writes of a journal and the calls that send and receive.",
	Exact:      "The same with workers that commit (examples/committing): no client misses a byte.",
	Committed:  "An upgrade of workers that commit: no client misses a byte, whatever is killed.",
}

const tableHead = `# What every fault costs

Made by ` + "`make faults`" + `; do not edit. Each case is a run of its own: keeper, supervisor and two
workers as they are shipped, but built with the tag ` + "`fault`" + `; %d clients, of which some send all
the time, some rest, one writes and does not read, and two may leave; one operation; and
one process that meets one fault at one step of it. Afterwards everybody who lives must be
served, another upgrade must succeed, every byte that came back must be right, the
clients' account must be the unit's, and the keeper must hold no descriptor more than
before.

Steps: *before-send* and *after-send* of a message, *recv* (taken from the channel, not
looked at) and *handled*; *keeper-…* is a call of the keeper's; *ledger* the writing of a
slot's entry, *half* of it with the old entry gone; *void* the end of a parked record
state; *export* and *import* of a record state; *memfd* a memory file; *key-intent*,
*set-key* and *key-complete* the change of a key in the kernel; *register* the writing of
a journal's register, *half* of it before it counts; *socket-recv* and *socket-send* the calls
themselves. A number in parentheses: not the first time, but that one.

Faults: **kill** -9; **stop** for 0.6 s, longer than freeze_timeout here; **close**: the control channel
ends, both ways; **drop**, **delay** (0.25 s), **repeat**: the message; **fill**: the peer's queue is full;
**fail=E…**: the system call fails so; **nofile**: no room for a descriptor for 0.4 s (EMFILE,
MSG_CTRUNC); **peer-close**, **-reset**, **-half**: two clients leave with close_notify, RST, or a bare FIN;
**kill-old**, **-new**, **-sup**: another process is killed just then. RESUME, INVENTORY and its
reply are not dropped: nobody would ask again before the next supervisor does, and the
socket that carries them loses none. *Lost* is, when a client is just being accepted, a
session that the keeper does not have yet.

Outcomes: *unnoticed*: the operation succeeded, and no client noticed. *not done*: the
operation was refused, rolled back or cut off (exit code 1), and no client noticed.
*stayed*: some sessions stay where they are, served (exit code 4, or a worker whose channel has ended). *interrupted*: the
connections live and are counted as interrupted: their owner was killed. *lost*: counted
as lost.
`

// Markdown writes the table.
func Markdown(w io.Writer, sections []Section) {
	fmt.Fprintf(w, tableHead, clients)
	for _, s := range sections {
		fmt.Fprintf(w, "\n## %s layer, %s\n\n%d cases: %s.\n", title(s.Layer), s.Where, len(s.Results), tally(s.Results))
		for _, op := range Operations {
			list := slices.DeleteFunc(slices.Clone(s.Results), func(r *Result) bool { return r.Op != op })
			if len(list) == 0 {
				continue
			}
			fmt.Fprintf(w, "\n### %s\n\n%s\n\n", title(op), opText[op])
			table(w, list)
		}
		wrongs(w, s.Results)
	}
}

func title(s string) string { return strings.ToUpper(s[:1]) + s[1:] }

func tally(list []*Result) string {
	n := map[string]int{}
	for _, r := range list {
		n[r.Outcome()]++
	}
	var parts []string
	for _, o := range outcomes {
		if n[o] > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n[o], o))
		}
	}
	return strings.Join(parts, ", ")
}

// table has a line for every step, and the faults in the columns of their outcomes.
func table(w io.Writer, list []*Result) {
	used := map[string]bool{}
	type row struct{ role, step string }
	var rows []row
	cells := map[row]map[string][]string{}
	for _, r := range list {
		k := row{r.Fault.Role, r.Fault.Step}
		if cells[k] == nil {
			cells[k] = map[string][]string{}
			rows = append(rows, k)
		}
		name := r.Fault.Action
		if r.Fault.N > 1 {
			name += fmt.Sprintf(" (%d)", r.Fault.N)
		}
		o := r.Outcome()
		cells[k][o], used[o] = append(cells[k][o], name), true
	}
	columns := slices.DeleteFunc(slices.Clone(outcomes), func(o string) bool { return !used[o] })
	fmt.Fprintf(w, "| process | step | %s |\n|---|---|%s\n", strings.Join(columns, " | "), strings.Repeat("---|", len(columns)))
	for _, k := range rows {
		fmt.Fprintf(w, "| %s | %s |", k.role, k.step)
		for _, o := range columns {
			fmt.Fprintf(w, " %s |", strings.Join(cells[k][o], ", "))
		}
		fmt.Fprintln(w)
	}
}

// wrongs names what must not be.
func wrongs(w io.Writer, list []*Result) {
	text := map[string]string{}
	for _, r := range list {
		if len(r.Wrong) > 0 {
			first, _, _ := strings.Cut(r.Wrong[0], "\n")
			text[r.Case.String()] = first[:min(len(first), 240)]
		}
	}
	if len(text) == 0 {
		return
	}
	fmt.Fprintf(w, "\n### Not as it must be\n\n")
	for _, c := range slices.Sorted(maps.Keys(text)) {
		fmt.Fprintf(w, "- `%s`: %s\n", c, text[c])
	}
}
