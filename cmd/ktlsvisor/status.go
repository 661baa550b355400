package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
)

func (a *app) statusCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the supervisor, its pools and how many sessions there are",
		Long: `Show the supervisor, its listeners, pools and workers, and the sessions they hold.

Exit code 1: no ktlsvisor runs there, or it does not answer.`,
		Example: `  ktlsvisor status
  ktlsvisor status --json | jq .sessions.total`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			st, err := a.client().Status(cmd.Context())
			if err != nil {
				return a.failed(err, asJSON)
			}
			if asJSON {
				return printJSON(a.out, st)
			}
			printStatus(a.out, st)
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "answer in JSON")
	return cmd
}

func printStatus(w io.Writer, st *admin.Status) {
	s := st.Supervisor
	table(w, [][]string{
		{"supervisor", fmt.Sprintf("pid %d, generation %d, version %s, up %s, ready after %d ms", s.PID, s.Generation, s.Version, age(s.UptimeSeconds), s.ReadyMillis)},
		{"keeper", fmt.Sprintf("pid %d", s.KeeperPID)},
		{"kernel", kernelText(st.Kernel)},
		{"sessions", sessionsText(st.Sessions)},
		{"handshakes", fmt.Sprintf("%d accepted, %d failed, %d timed out, %d refused", st.Counters.Accepted, st.Handshakes.Failed, st.Handshakes.TimedOut, st.Handshakes.Refused)},
		{"moves", fmt.Sprintf("%d moved, %d returned, %d interrupted, %d lost", st.Counters.Moved, st.Counters.Returned, st.Counters.Interrupted, st.Counters.Lost)},
		{"keys", fmt.Sprintf("%d changed in the kernel", st.Counters.KeyUpdates)},
		{"closed", closedText(st)},
	})
	fmt.Fprintln(w)
	rows := [][]string{{"LISTENER", "POOL"}}
	for _, l := range st.Listeners {
		rows = append(rows, []string{l.Address, l.Pool})
	}
	table(w, rows)
	fmt.Fprintln(w)
	rows = [][]string{{"POOL", "GENERATION", "WORKER", "STATE", "SESSIONS", "COMMAND"}}
	for _, p := range st.Pools {
		command := strings.Join(p.Command, " ")
		if p.Operation != "" {
			command += " (" + p.Operation + ")"
		}
		if len(p.Workers) == 0 {
			rows = append(rows, []string{p.Name, fmt.Sprint(p.Generation), "-", "no worker", "-", command})
		}
		for _, wk := range p.Workers {
			rows = append(rows, []string{p.Name, fmt.Sprint(wk.Generation), strconv.Itoa(wk.PID), workerState(wk), strconv.Itoa(wk.Sessions), command})
		}
		if q := p.Quarantine; q != nil {
			rows = append(rows, []string{p.Name, fmt.Sprint(q.Generation), strconv.Itoa(q.PID), "quarantine, " + workerState(*q), strconv.Itoa(q.Sessions), command})
		}
	}
	table(w, rows)
}

// workerState is a worker's state, and what is wrong with it.
func workerState(w admin.WorkerStatus) string {
	state := w.State
	if w.Exposed > 0 {
		state += fmt.Sprintf(", no room for crashes for %d", w.Exposed)
	}
	if w.Unhealthy != "" {
		state += ", not well: " + w.Unhealthy
	}
	return state
}

func kernelText(k admin.KernelStatus) string {
	text := k.Release
	switch {
	case k.KTLS && k.Rekey:
		text += ": kernel TLS with rekey"
	case k.KTLS:
		text += ": kernel TLS without rekey"
	default:
		text += ": no kernel TLS; the software layer is used"
	}
	if k.Reason != "" {
		text += ": " + k.Reason
	}
	return text
}

func sessionsText(t admin.SessionTotals) string {
	text := fmt.Sprintf("%d: %d in the kernel layer, %d in the software layer", t.Total, t.Kernel, t.Software)
	if t.Relay > 0 {
		text += fmt.Sprintf(", %d relayed", t.Relay)
	}
	if t.Parked > 0 {
		text += fmt.Sprintf("; %d between two workers", t.Parked)
	}
	return text
}

func closedText(st *admin.Status) string {
	c := st.Counters
	text := fmt.Sprintf("%d by the peer, %d by the owner", c.ClosedByPeer, c.ClosedByOwner)
	if c.ClosedUnknown > 0 {
		text += fmt.Sprintf(", %d unseen", c.ClosedUnknown)
	}
	var reasons []string
	for _, r := range slices.Sorted(maps.Keys(st.Reasons)) {
		reasons = append(reasons, fmt.Sprintf("%s %d", r, st.Reasons[r]))
	}
	if len(reasons) > 0 {
		text += " (" + strings.Join(reasons, ", ") + ")"
	}
	return text
}

func (a *app) sessionsCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "sessions",
		Short: "List the live TLS sessions",
		Long: `List the live TLS sessions: who is connected, which worker has them, and which
record layer they use.

Exit code 1: no ktlsvisor runs there, or it does not answer.`,
		Example: `  ktlsvisor sessions
  ktlsvisor sessions --json | jq '.[] | select(.layer == "software")'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			list, err := a.client().Sessions(cmd.Context())
			if err != nil {
				return a.failed(err, asJSON)
			}
			if asJSON {
				if list == nil {
					list = []admin.Session{}
				}
				return printJSON(a.out, list)
			}
			printSessions(a.out, list)
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "answer in JSON")
	return cmd
}

func printSessions(w io.Writer, list []admin.Session) {
	rows := [][]string{{"ID", "PEER", "POOL", "WORKER", "PHASE", "LAYER", "VERSION", "SUITE", "NAME", "ALPN", "AGE", "MOVES", "NOTE"}}
	for _, s := range list {
		worker := "-"
		if s.WorkerPID > 0 {
			worker = strconv.Itoa(s.WorkerPID)
		}
		rows = append(rows, []string{
			s.ID, s.Peer, s.Pool, worker, s.Phase, s.Layer, s.Version, s.Suite,
			orDash(s.ServerName), orDash(s.ALPN), age(s.AgeSeconds), fmt.Sprint(s.Moves), shorten(s.Reason, 32),
		})
	}
	table(w, rows)
	fmt.Fprintln(w, plural(len(list), "session"))
}
