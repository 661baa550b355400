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

// What the supervisor, too, takes when it is told nothing.
const (
	defaultWait = 30 * time.Second
	defaultSoak = 30 * time.Second
)

// upgradeFlags are what the command line says of an upgrade.
type upgradeFlags struct {
	supervisor, asJSON, dryRun, abort bool
	command, canary                   string
	soak, probation                   time.Duration
	req                               admin.UpgradeRequest
}

func (a *app) upgradeCommand() *cobra.Command {
	var u upgradeFlags
	cmd := &cobra.Command{
		Use:   "upgrade [POOL]",
		Short: "Replace workers, or the supervisor, and keep every connection",
		Long: `Start a new generation of a pool's workers (of all pools when none is named), move
every session to it, and end the old one. Blocks until that is done. Any failure
leaves the old generation serving every session. A session that reaches no safe
point is asked again until --wait is over, then stays with its old worker.

With --canary a part of the sessions moves first, and gets as large a part of the new
ones, and is watched for --soak. When a new worker dies, breaks the protocol or says
that it is not well, when the new generation turns sessions down, or ends more of them
with an error than the old one, everything goes back to the old generation. With
--probation the old generation is kept for that long after everything has moved, and
gets it back when a new worker dies or says that it is not well.

--dry-run says what would happen to the live sessions, and starts nothing; with --probe
one worker of the new program, which gets no session and is ended when it has said which
states it restores. --abort takes back what is under way, and ends when it is back.

With --supervisor the ktlsvisor supervisor itself is replaced by the program that
is now at its path; workers and sessions are not touched.

Once started, an upgrade goes on even when this command is interrupted.

` + exitCodeDoc,
		Example: `  ktlsvisor upgrade
  ktlsvisor upgrade chat --command ./chat-v2 --wait 1m
  ktlsvisor upgrade --canary 5 --soak 1m --probation 30s
  ktlsvisor upgrade --dry-run
  ktlsvisor upgrade chat --command ./chat-v2 --dry-run --probe
  ktlsvisor upgrade --abort
  ktlsvisor upgrade --supervisor
  ktlsvisor upgrade --json | jq '.pools[].moved'`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := u.check(cmd, args); err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			switch {
			case u.supervisor:
				return a.upgradeSupervisor(ctx, u.asJSON)
			case u.abort:
				return a.abort(ctx, u.req.Pool, u.asJSON)
			case u.dryRun:
				return a.plan(ctx, u.req, u.command, u.asJSON)
			}
			return a.upgradePools(ctx, u.req, u.command, u.asJSON)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&u.supervisor, "supervisor", false, "replace the supervisor instead of workers")
	f.StringVar(&u.command, "command", "", "the pool's new program, from now on; its arguments stay")
	f.DurationVar(&u.req.Wait, "wait", defaultWait, "how long to ask sessions that reach no safe point; more than 0")
	f.StringVar(&u.canary, "canary", "", "move this part of the sessions first, in percent, and watch it")
	f.DurationVar(&u.soak, "soak", defaultSoak, "how long to watch the canary")
	f.DurationVar(&u.probation, "probation", 0, "how long to keep the old generation after everything has moved (default the pool's own)")
	f.BoolVar(&u.req.NoReturn, "no-return", false, "allow a canary or a probation although the old program cannot restore the new one's state")
	f.IntVar(&u.req.Rate, "rate", 0, "move at most so many sessions a second (default the pool's move_rate)")
	f.BoolVar(&u.req.Queue, "queue", false, "wait for what is under way, instead of being refused")
	f.BoolVar(&u.dryRun, "dry-run", false, "say what would happen, and start nothing")
	f.BoolVar(&u.req.Probe, "probe", false, "with --dry-run: start one worker of the new program, ask it which states it restores, and end it")
	f.BoolVar(&u.abort, "abort", false, "take back what is under way")
	f.BoolVar(&u.asJSON, "json", false, "answer in JSON")
	return cmd
}

// check finds what does not go together, and completes the request.
func (u *upgradeFlags) check(cmd *cobra.Command, args []string) error {
	given := func(names ...string) bool { return slices.ContainsFunc(names, cmd.Flags().Changed) }
	options := []string{"command", "wait", "canary", "soak", "probation", "no-return", "rate", "queue", "dry-run", "probe"}
	switch {
	case u.supervisor && (len(args) > 0 || u.abort || given(options...)):
		return usagef("--supervisor goes with neither a pool nor any option but --json")
	case u.abort && given(options...):
		return usagef("--abort goes with no option but --json")
	case u.req.Probe && !u.dryRun:
		return usagef("--probe goes with --dry-run: an upgrade always asks the new program before anything moves")
	case u.req.Wait <= 0:
		return usagef("--wait %s is not positive: say how long to ask sessions again, or leave it out for %s", u.req.Wait, defaultWait)
	case given("soak") && !given("canary"):
		return usagef("--soak is how long a canary is watched: say how large it is with --canary")
	case given("soak") && u.soak <= 0:
		return usagef("--soak %s is not positive", u.soak)
	case given("rate") && u.req.Rate <= 0:
		return usagef("--rate %d is not positive: say how many sessions may move in a second, or leave it out for the pool's move_rate", u.req.Rate)
	case u.probation < 0:
		return usagef("--probation %s is negative", u.probation)
	}
	if given("canary") {
		pct, err := strconv.ParseFloat(strings.TrimSuffix(u.canary, "%"), 64)
		if err != nil || !(pct > 0 && pct < 100) {
			return usagef("--canary %q is no part of the sessions in percent: more than 0, less than 100", u.canary)
		}
		u.req.Canary, u.req.Soak = pct, u.soak
	}
	if given("probation") {
		u.req.Probation = &u.probation
	}
	if len(args) > 0 {
		if u.req.Pool = args[0]; u.req.Pool == "" {
			return usagef("the pool's name is empty")
		}
	}
	return nil
}

func (a *app) upgradePools(ctx context.Context, req admin.UpgradeRequest, command string, asJSON bool) error {
	c := a.client()
	before, err := c.Status(ctx)
	if err == nil {
		err = completeCommand(&req, command, before)
	}
	var coded *codedError
	if errors.As(err, &coded) {
		return err
	} else if err != nil {
		return a.upgradeFailed(err, asJSON, exitFailed)
	}
	p := newProgress(a.err)
	rep, err := c.Upgrade(ctx, req, p.show)
	p.end()
	if err != nil {
		return a.upgradeFailed(err, asJSON, a.codeOfFailure(ctx, err, before))
	}
	return answer(a, asJSON, rep, printUpgrade, rep.Outcome)
}

// completeCommand puts the new program into a request, for the pool that there is when
// none is named.
func completeCommand(req *admin.UpgradeRequest, command string, st *admin.Status) (err error) {
	if command == "" {
		return nil
	}
	if req.Pool == "" {
		if len(st.Pools) != 1 {
			return usagef("--command needs the name of its pool: %s", poolNames(st))
		}
		req.Pool = st.Pools[0].Name
	}
	req.Command, err = executable(command)
	return err
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
	printUpgradeTable(w, rep)
	fmt.Fprintf(w, "%s (%.2f s)\n", outcomeText(rep.Outcome), rep.DurationSecs)
}

// printUpgradeTable prints all of a report but its last line.
func printUpgradeTable(w io.Writer, rep *admin.UpgradeReport) {
	rows := [][]string{{"POOL", "GENERATION", "MOVED", "STAYED", "RETURNED", "DRAINED", "INTERRUPTED", "LOST", "ENDED", "STALL p50/p99/max", "OLD WORKERS", "NEW WORKERS"}}
	for _, p := range rep.Pools {
		rows = append(rows, []string{
			p.Pool, fmt.Sprintf("%d -> %d", p.From, p.To),
			strconv.Itoa(p.Moved), strconv.Itoa(p.Stayed), strconv.Itoa(p.Returned), strconv.Itoa(p.Drained), strconv.Itoa(p.Interrupted), strconv.Itoa(p.Lost), strconv.Itoa(p.Closed),
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
		if p.OneWay != "" && !strings.Contains(p.Error, p.OneWay) {
			fmt.Fprintf(w, "pool %s: %s\n", clean(p.Pool), clean(p.OneWay))
		}
		for _, r := range byCount(p.Reasons) {
			fmt.Fprintf(w, "pool %s: %d × %s\n", clean(p.Pool), p.Reasons[r], clean(r))
		}
	}
	if rep.Error != "" && !said {
		fmt.Fprintln(w, clean(rep.Error))
	}
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
