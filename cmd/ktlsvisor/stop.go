package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/pidfd"
)

// stopMargin is how long, beyond the sessions' grace, workers and processes may
// take to end.
const stopMargin = 30 * time.Second

// keeperMargin is how long, beyond the grace, the keeper's process may take to end
// after nobody answers on the admin socket any more.
const keeperMargin = 5 * time.Second

func (a *app) stopCommand() *cobra.Command {
	var (
		grace  time.Duration
		asJSON bool
	)
	cmd := &cobra.Command{
		Use:   "stop",
		Short: "Close every session properly and end ktlsvisor",
		Long: `Accept nothing more, close every session with close_notify within --grace, end the
workers, the supervisor and the keeper. Blocks until all of that is done.

Exit code 1: no ktlsvisor runs there, or it has not ended in time.`,
		Example: `  ktlsvisor stop
  ktlsvisor stop --grace 1m`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if grace <= 0 {
				return usagef("--grace %s is not positive", grace)
			}
			ctx, cancel := context.WithTimeoutCause(cmd.Context(), grace+stopMargin, fmt.Errorf("it has not ended %s after it was asked to", grace+stopMargin))
			defer cancel()
			c := a.client()
			keeper, err := a.holdKeeper(ctx, c)
			if err != nil {
				return a.failed(err, asJSON)
			}
			if keeper != nil {
				defer keeper.Close()
			}
			if err := c.Stop(ctx, grace); err != nil {
				return a.failed(err, asJSON)
			}
			if err := waitKeeper(cmd.Context(), keeper, grace+keeperMargin); err != nil {
				return a.failed(err, asJSON)
			}
			if asJSON {
				return printJSON(a.out, struct {
					Stopped bool   `json:"stopped"`
					Admin   string `json:"admin"`
				}{true, c.Path()})
			}
			fmt.Fprintln(a.out, "stopped")
			return nil
		},
	}
	cmd.Flags().DurationVar(&grace, "grace", 10*time.Second, "how long sessions may take to end")
	cmd.Flags().BoolVar(&asJSON, "json", false, "answer in JSON")
	return cmd
}

// holdKeeper opens the keeper of the unit that answers, to see its end later. It is
// nil, and that is said, where the process cannot be named from here.
func (a *app) holdKeeper(ctx context.Context, c *admin.Client) (*pidfd.Process, error) {
	// A supervisor that dies in between has a successor under the same keeper.
	for range 3 {
		st, err := c.Status(ctx)
		if err != nil {
			return nil, err
		}
		pid := st.Supervisor.KeeperPID
		if pid <= 0 {
			break
		}
		p, err := pidfd.Open(pid)
		if err != nil {
			continue
		}
		// In another pid namespace that id is somebody else's. The keeper is the one
		// that has the supervisor below it.
		if isDescendant(st.Supervisor.PID, pid) {
			return p, nil
		}
		_ = p.Close()
	}
	fmt.Fprintln(a.err, "The keeper's process cannot be seen from here (another pid namespace?); only the admin socket is watched.")
	return nil, nil
}

// waitKeeper waits for the death of a keeper that holdKeeper returned.
func waitKeeper(ctx context.Context, keeper *pidfd.Process, limit time.Duration) error {
	if keeper == nil {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("waited %s", limit))
	defer cancel()
	err := keeper.Wait(ctx)
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	pid, perr := keeper.PID()
	if perr != nil {
		return fmt.Errorf("nobody answers on the admin socket any more, but the keeper's process has not ended: %w", err)
	}
	return fmt.Errorf("nobody answers on the admin socket any more, but the keeper, pid %d, still runs: %w; look at its log, or kill it", pid, err)
}
