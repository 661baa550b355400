package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
)

// defaultWait is what the supervisor, too, takes when it is told nothing.
const defaultWait = 30 * time.Second

func (a *app) upgradeCommand() *cobra.Command {
	var (
		supervisor, asJSON bool
		command            string
		wait               time.Duration
	)
	cmd := &cobra.Command{
		Use:   "upgrade [POOL]",
		Short: "Replace workers, or the supervisor, and keep every connection",
		Long: `Start a new generation of a pool's workers (of all pools when none is named), move
every session to it, and end the old one. Blocks until that is done. Any failure
leaves the old generation serving every session. A session that reaches no safe
point is asked again until --wait is over, then stays with its old worker.

With --supervisor the ktlsvisor supervisor itself is replaced by the program that
is now at its path; workers and sessions are not touched.

Once started, an upgrade goes on even when this command is interrupted.

` + exitCodeDoc,
		Example: `  ktlsvisor upgrade
  ktlsvisor upgrade chat --command ./chat-v2 --wait 1m
  ktlsvisor upgrade --supervisor
  ktlsvisor upgrade --json | jq '.pools[].moved'`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			if supervisor {
				if len(args) > 0 || command != "" || cmd.Flags().Changed("wait") {
					return usagef("--supervisor goes with neither a pool nor --command nor --wait")
				}
				return a.upgradeSupervisor(ctx, asJSON)
			}
			if wait <= 0 {
				return usagef("--wait %s is not positive: say how long to ask sessions again, or leave it out for %s", wait, defaultWait)
			}
			req := admin.UpgradeRequest{Wait: wait}
			if len(args) > 0 {
				req.Pool = args[0]
				if req.Pool == "" {
					return usagef("the pool's name is empty")
				}
			}
			return a.upgradePools(ctx, req, command, asJSON)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&supervisor, "supervisor", false, "replace the supervisor instead of workers")
	f.StringVar(&command, "command", "", "the pool's new program, from now on; its arguments stay")
	f.DurationVar(&wait, "wait", defaultWait, "how long to ask sessions that reach no safe point; more than 0")
	f.BoolVar(&asJSON, "json", false, "answer in JSON")
	return cmd
}

func (a *app) upgradePools(ctx context.Context, req admin.UpgradeRequest, command string, asJSON bool) error {
	c := a.client()
	before, err := c.Status(ctx)
	if err != nil {
		return a.upgradeFailed(err, asJSON, exitFailed)
	}
	if command != "" {
		if req.Pool == "" {
			if len(before.Pools) != 1 {
				return usagef("--command needs the name of its pool: %s", poolNames(before))
			}
			req.Pool = before.Pools[0].Name
		}
		if req.Command, err = executable(command); err != nil {
			return a.upgradeFailed(err, asJSON, exitFailed)
		}
	}
	p := newProgress(a.err)
	rep, err := c.Upgrade(ctx, req, p.show)
	p.end()
	if err != nil {
		return a.upgradeFailed(err, asJSON, a.codeOfFailure(ctx, err, before))
	}
	return answer(a, asJSON, rep, printUpgrade, rep.Outcome)
}

// upgradeFailed reports an upgrade that has no report of its own.
func (a *app) upgradeFailed(err error, asJSON bool, code int) error {
	return a.noReport(err, asJSON, admin.UpgradeReport{Outcome: admin.Outcome(code), Pools: []admin.PoolReport{}, Error: err.Error()}, code)
}

// codeOfFailure: where the supervisor died over an upgrade, its successor has
// counted what that cost.
func (a *app) codeOfFailure(ctx context.Context, err error, before *admin.Status) int {
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(a.err, "The upgrade goes on in the supervisor; see \"ktlsvisor status\".")
		return exitSignal
	case !errors.Is(err, admin.ErrInterrupted):
		return exitFailed
	}
	after, serr := a.client().Status(ctx)
	switch {
	case serr != nil:
		fmt.Fprintf(a.err, "The outcome is not known: %v\n", serr)
	case after.Counters.Lost > before.Counters.Lost:
		return exitLost
	default:
		fmt.Fprintln(a.err, "The supervisor was restarted; no session is lost. Upgrade again if \"ktlsvisor status\" shows the old generation.")
	}
	return exitFailed
}

func poolNames(st *admin.Status) string {
	var names []string
	for _, p := range st.Pools {
		names = append(names, p.Name)
	}
	return strings.Join(names, ", ")
}

// executable is an absolute path for the supervisor, whose directory is another.
func executable(command string) (string, error) {
	path, err := exec.LookPath(command)
	if errors.Is(err, exec.ErrDot) {
		err = nil
	}
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return "", fmt.Errorf("--command: %w", err)
	}
	return path, nil
}

func printUpgrade(w io.Writer, rep *admin.UpgradeReport) {
	rows := [][]string{{"POOL", "GENERATION", "MOVED", "STAYED", "RETURNED", "INTERRUPTED", "LOST", "ENDED", "STALL p50/p99/max", "OLD WORKERS", "NEW WORKERS"}}
	for _, p := range rep.Pools {
		rows = append(rows, []string{
			p.Pool, fmt.Sprintf("%d -> %d", p.From, p.To),
			strconv.Itoa(p.Moved), strconv.Itoa(p.Stayed), strconv.Itoa(p.Returned), strconv.Itoa(p.Interrupted), strconv.Itoa(p.Lost), strconv.Itoa(p.Closed),
			fmt.Sprintf("%.1f/%.1f/%.1f ms", p.StallP50, p.StallP99, p.StallMax),
			pids(p.OldPIDs), pids(p.NewPIDs),
		})
	}
	if len(rep.Pools) > 0 {
		table(w, rows)
	}
	said := false
	for _, p := range rep.Pools {
		if p.Error != "" {
			said = said || p.Error == rep.Error
			fmt.Fprintf(w, "pool %s: %s\n", clean(p.Pool), clean(p.Error))
		}
		for _, r := range byCount(p.Reasons) {
			fmt.Fprintf(w, "pool %s: %d × %s\n", clean(p.Pool), p.Reasons[r], clean(r))
		}
	}
	if rep.Error != "" && !said {
		fmt.Fprintln(w, clean(rep.Error))
	}
	fmt.Fprintf(w, "%s (%.2f s)\n", outcomeText(rep.Outcome), rep.DurationSecs)
}

// byCount lists reasons, the most frequent first.
func byCount(reasons map[string]int) []string {
	return slices.SortedFunc(maps.Keys(reasons), func(a, b string) int {
		return cmp.Or(cmp.Compare(reasons[b], reasons[a]), cmp.Compare(a, b))
	})
}

func outcomeText(o admin.Outcome) string {
	switch o {
	case admin.OutcomeMoved:
		return "Upgraded: everything moved, nothing lost."
	case admin.OutcomeRefused:
		return "Not upgraded: the old generation serves on, nothing lost."
	case admin.OutcomeStay:
		return "Upgraded in part: some sessions stay with the old generation for now, nothing lost."
	case admin.OutcomeLost:
		return "Something was lost."
	}
	return fmt.Sprintf("Outcome %d.", int(o))
}

func pids(list []int) string {
	var s []string
	for _, p := range list {
		s = append(s, strconv.Itoa(p))
	}
	return orDash(strings.Join(s, ","))
}

func (a *app) upgradeSupervisor(ctx context.Context, asJSON bool) error {
	c := a.client()
	p := newProgress(a.err)
	rep, err := c.UpgradeSupervisor(ctx, p.show)
	p.end()
	if err != nil {
		code := exitFailed
		if ctx.Err() != nil {
			code = exitSignal
		}
		return a.noReport(err, asJSON, admin.SupervisorReport{Outcome: admin.Outcome(code), Error: err.Error()}, code)
	}
	return answer(a, asJSON, rep, printSupervisor, rep.Outcome)
}

func printSupervisor(w io.Writer, rep *admin.SupervisorReport) {
	if rep.Outcome == admin.OutcomeMoved {
		fmt.Fprintf(w, "The supervisor was replaced: pid %d -> %d (%.2f s). Workers and sessions were not touched.\n", rep.OldPID, rep.NewPID, rep.DurationSecs)
		return
	}
	fmt.Fprintf(w, "The supervisor was not replaced; pid %d serves on: %s\n", rep.OldPID, clean(rep.Error))
}
