package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
)

// taskFlags are those of scale, drain and rebalance.
type taskFlags struct {
	wait          time.Duration
	queue, asJSON bool
}

func (t *taskFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.DurationVar(&t.wait, "wait", defaultWait, "how long to ask sessions that reach no safe point; more than 0")
	f.BoolVar(&t.queue, "queue", false, "wait for what is under way, instead of being refused")
	f.BoolVar(&t.asJSON, "json", false, "answer in JSON")
}

func (t *taskFlags) check() error {
	if t.wait <= 0 {
		return usagef("--wait %s is not positive", t.wait)
	}
	return nil
}

const taskCodes = `Exit code 0: done; 1: refused, or failed and taken back; nothing was lost; 2: the command
line is wrong; 3: something was lost; 4: some sessions stay where they are for now. Once
started it goes on even when this command is interrupted; "ktlsvisor upgrade --abort"
takes it back.`

func (a *app) scaleCommand() *cobra.Command {
	var t taskFlags
	cmd := &cobra.Command{
		Use:   "scale [POOL] N",
		Short: "Change how many workers a pool has, and keep every connection",
		Long: `Have a pool run N workers, until it is scaled again or ktlsvisor ends; the configuration
stays as it is. New workers get their part of the live sessions. Workers that are too
many are emptied by moving their sessions to the others, and end. Blocks until that is
done. The pool may be left out where there is only one.

` + taskCodes,
		Example: `  ktlsvisor scale 4
  ktlsvisor scale chat 1 --wait 2m`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := t.check(); err != nil {
				return err
			}
			req := admin.ScaleRequest{Wait: t.wait, Queue: t.queue}
			n, err := strconv.Atoi(args[len(args)-1])
			if err != nil || n < 1 || n > admin.MaxWorkers {
				return usagef("%q is no number of workers: 1 to %d are possible", args[len(args)-1], admin.MaxWorkers)
			}
			req.Workers = n
			if len(args) == 2 {
				if req.Pool = args[0]; req.Pool == "" {
					return usagef("the pool's name is empty")
				}
			}
			return a.task(cmd.Context(), t.asJSON, "scale", func(ctx context.Context, c *admin.Client, say func(admin.Progress)) (*admin.TaskReport, error) {
				return c.Scale(ctx, req, say)
			})
		},
	}
	t.add(cmd)
	return cmd
}

func (a *app) drainCommand() *cobra.Command {
	var t taskFlags
	cmd := &cobra.Command{
		Use:   "drain PID",
		Short: "Empty a worker, end and replace it, and keep every connection",
		Long: `Start a worker in the place of the one with this pid (see "ktlsvisor status"), move the
sessions of the old one to the others, and end it. Blocks until that is done. What
reaches no safe point within --wait stays with it; it is asked again from time to time,
and the worker ends when it is empty.

` + taskCodes,
		Example: `  ktlsvisor drain 4711
  ktlsvisor drain 4711 --wait 5m --json`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := t.check(); err != nil {
				return err
			}
			pid, err := strconv.Atoi(args[0])
			if err != nil || pid < 1 {
				return usagef("%q is no pid of a worker; \"ktlsvisor status\" has them", args[0])
			}
			req := admin.DrainRequest{PID: pid, Wait: t.wait, Queue: t.queue}
			return a.task(cmd.Context(), t.asJSON, "drain", func(ctx context.Context, c *admin.Client, say func(admin.Progress)) (*admin.TaskReport, error) {
				return c.Drain(ctx, req, say)
			})
		},
	}
	t.add(cmd)
	return cmd
}

func (a *app) rebalanceCommand() *cobra.Command {
	var t taskFlags
	cmd := &cobra.Command{
		Use:   "rebalance [POOL]",
		Short: "Spread the sessions of a pool evenly over its workers",
		Long: `Move sessions from the workers that have most to those that have fewest, until none has
more than one session, or 5 % of the mean, more than another. Groups move whole, and may
leave a larger difference. Blocks until that is done. The pool may be left out where
there is only one.

` + taskCodes,
		Example: `  ktlsvisor rebalance
  ktlsvisor rebalance chat --json`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := t.check(); err != nil {
				return err
			}
			req := admin.RebalanceRequest{Wait: t.wait, Queue: t.queue}
			if len(args) > 0 {
				if req.Pool = args[0]; req.Pool == "" {
					return usagef("the pool's name is empty")
				}
			}
			return a.task(cmd.Context(), t.asJSON, "rebalance", func(ctx context.Context, c *admin.Client, say func(admin.Progress)) (*admin.TaskReport, error) {
				return c.Rebalance(ctx, req, say)
			})
		},
	}
	t.add(cmd)
	return cmd
}

// task runs one of them to its end.
func (a *app) task(ctx context.Context, asJSON bool, name string, run func(context.Context, *admin.Client, func(admin.Progress)) (*admin.TaskReport, error)) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	p := newProgress(a.err)
	rep, err := run(ctx, a.client(), p.show)
	p.end()
	if err != nil {
		code := exitFailed
		switch {
		case ctx.Err() != nil:
			code = exitSignal
			fmt.Fprintln(a.err, "It goes on in the supervisor; see \"ktlsvisor status\".")
		case errors.Is(err, admin.ErrInterrupted):
			fmt.Fprintln(a.err, "The supervisor was restarted; no session is lost over that. A scale goes on, ask again for the rest.")
		}
		return a.noReport(err, asJSON, admin.TaskReport{Outcome: admin.Outcome(code), Operation: name, Error: err.Error()}, code)
	}
	return answer(a, asJSON, rep, printTask, rep.Outcome)
}

func printTask(w io.Writer, rep *admin.TaskReport) {
	rows := [][]string{{"WORKER", "STATE", "SESSIONS"}}
	for _, wk := range rep.Spread {
		rows = append(rows, []string{strconv.Itoa(wk.PID), wk.State, strconv.Itoa(wk.Sessions)})
	}
	table(w, rows)
	name := clean(rep.Pool)
	fmt.Fprintf(w, "pool %s: %s moved, %d stay, %d drained, %d interrupted, %d lost; stall p50/p99/max %.1f/%.1f/%.1f ms\n", name,
		plural(rep.Moved, "session"), rep.Stayed, rep.Drained, rep.Interrupted, rep.Lost, rep.StallP50, rep.StallP99, rep.StallMax)
	if rep.Error != "" {
		fmt.Fprintf(w, "pool %s: %s\n", name, clean(rep.Error))
	}
	for _, r := range byCount(rep.Reasons) {
		fmt.Fprintf(w, "pool %s: %d × %s\n", name, rep.Reasons[r], clean(r))
	}
	var text string
	switch rep.Outcome {
	case admin.OutcomeMoved:
		text = fmt.Sprintf("Done: %s, nothing lost.", plural(rep.Workers, "worker"))
	case admin.OutcomeRefused:
		text = fmt.Sprintf("Not done: %s, nothing lost.", plural(rep.Workers, "worker"))
	case admin.OutcomeStay:
		text = "Done in part: some sessions stay where they are for now, nothing lost."
	default:
		text = outcomeText(rep.Outcome)
	}
	fmt.Fprintf(w, "%s (%.2f s)\n", text, rep.DurationSecs)
}
