package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
)

// stopMargin is how long, beyond the sessions' grace, workers and processes may
// take to end.
const stopMargin = 30 * time.Second

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
			if err := c.Stop(ctx, grace); err != nil {
				return err
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
