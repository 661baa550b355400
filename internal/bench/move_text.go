package bench

import (
	"fmt"
	"slices"
	"strings"
)

// moveRate is the least number of sessions that one unit should move in a second.
const moveRate = 50000

// movesText is the part about moves of docs/benchmarks.
func movesText(list []Move) string {
	if len(list) == 0 {
		return ""
	}
	var b strings.Builder
	b.WriteString(`
## Moves

An upgrade of a whole unit: keeper, supervisor and one worker of each generation, in
processes of their own. Every session is a TCP connection with a record state and 1 KiB of
application state; it is frozen, parked, offered with its socket from the keeper, adopted,
committed in the ledger, resumed and released. Sessions do nothing meanwhile; at the end
each client has a byte echoed. Keys are made up by both sides instead of handshakes. The
time is from the word that the new generation is ready to the end of the last RELEASE.
Medians of the turns, lowest and highest in brackets. The limit is what SCM_RIGHTS does
alone, in batches of 64 over the same kind of socket to a process that closes them, in the
same run. The rows of a program that upgrades itself are two processes and nobody else
(handoff.Upgrader): sessions of real handshakes go from the old process to the new one, as
above but without keeper and ledger. The time is from the word that the new process is
ready to the acknowledgement of the last commit. *At rest* means that no handler waits for the session (handoff.WithRest). *Other load* is
the load average of the machine before the measurement, so of other programs: with two
processors, a figure above 2 means that the unit had to share them, and that processor time
says more than the rate.

`)
	b.WriteString(movesTable(list))
	b.WriteString(growthText(list))
	var runs []string
	for _, m := range list {
		line := fmt.Sprintf("- %s, %d cores; Linux %s; %s; %s, commit %s\n", m.Run.CPU, m.Run.Cores, m.Run.Kernel, m.Run.Go, m.Run.Date, m.Run.Commit)
		if !slices.Contains(runs, line) {
			runs = append(runs, line)
		}
	}
	b.WriteString("\n" + strings.Join(runs, ""))
	return b.String()
}

// growthText compares what a session takes in guests, where only ratios say anything.
func growthText(list []Move) string {
	var b strings.Builder
	for _, few := range list {
		for _, many := range list {
			if few.Run.Guest == "" || many.Run.Guest != few.Run.Guest || few.Sessions != 10000 || many.Sessions <= few.Sessions {
				continue
			}
			fmt.Fprintf(&b, "- Linux %s: a session among %d takes %.2f times as long as one among %d, and %.2f times the processor time\n",
				few.Run.Kernel, many.Sessions, few.Rate/many.Rate, few.Sessions, many.allCPU()/few.allCPU())
		}
	}
	if b.Len() == 0 {
		return ""
	}
	return `
In an emulated machine (QEMU without KVM) a move takes twenty times the processor time and
more, because going from one process to another takes so long. All processes are told not
to interrupt each other (SCHED_BATCH) and to use one processor each (GOMAXPROCS=1). What
can be read there is growth, as far as other programs of the machine left it alone:

` + b.String()
}

// allCPU is the processor time of all processes for a session, in µs.
func (m *Move) allCPU() (sum float64) {
	for _, v := range m.CPU {
		sum += v
	}
	return sum
}

func movesTable(list []Move) string {
	var b strings.Builder
	b.WriteString(`| sessions | | moved a second | descriptors alone | target | met | stall p50 | p99 | longest | processor time a session | other load |
|---:|---|---:|---:|---:|---|---:|---:|---:|---|---:|
`)
	for _, m := range list {
		what := fmt.Sprintf("%s layer, workers: %d, a handler waits in Read", m.Layer, m.Workers)
		if m.Rest {
			what = fmt.Sprintf("%s layer, workers: %d, at rest", m.Layer, m.Workers)
		}
		stalls := fmt.Sprintf("%.1f ms | %.1f ms | %.1f ms", m.StallP50, m.StallP99, m.StallMax)
		if m.Self {
			what, stalls = "a program that upgrades itself, software layer, at rest", " | | "
		}
		target, met := fmt.Sprintf("≥ %d", moveRate), yes(m.Rate >= moveRate)
		if m.Run.Guest != "" {
			what += ", Linux " + m.Run.Kernel + " (emulated)"
			target, met = "", ""
		}
		var cpu []string
		for _, name := range sorted(m.CPU) {
			cpu = append(cpu, fmt.Sprintf("%s %.1f", name, m.CPU[name]))
		}
		fmt.Fprintf(&b, "| %d | %s | %.0f (%.0f to %.0f) | %.0f | %s | %s | %s | %.0f µs: %s | %.0f |\n", m.Sessions, what,
			m.Rate, m.Low, m.High, m.RawRate, target, met, stalls, m.allCPU(), strings.Join(cpu, ", "), m.Load)
	}
	return b.String()
}

// movesQuote is what the README shows of them.
func movesQuote(list []Move) string {
	if len(list) == 0 {
		return ""
	}
	return "\nSessions moved in a second by an upgrade, with 1 KiB of application state each, commit and\n" +
		"acknowledgement included, and the bare passing of descriptors in the same run as the limit.\n" +
		"Other load is the machine's load average before, from other programs:\n\n" + movesTable(list)
}
