package main

import (
	"context"
	"io"

	"github.com/spf13/cobra"

	"github.com/ktlsvisor/ktlsvisor/handoff"
)

// echoWorkerCommand is the demo's worker; examples/echo is the same as a program.
func (a *app) echoWorkerCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "echo-worker",
		Short:  "A worker that sends back every byte it reads",
		Hidden: true,
		Args:   noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return handoff.Serve(cmd.Context(), handoff.HandlerFunc(func(_ context.Context, c *handoff.Conn) error {
				_, err := io.Copy(c, c)
				return err
			}), handoff.WithName("echo"))
		},
	}
}
