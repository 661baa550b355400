package main

import (
	"github.com/spf13/cobra"

	"github.com/ktlsvisor/ktlsvisor/internal/supervise"
)

// superviseCommand is the process that the keeper starts, and its successors.
func (a *app) superviseCommand() *cobra.Command {
	var log logFlags
	cmd := &cobra.Command{
		Use:    "supervise",
		Short:  "The supervisor; started by the keeper",
		Hidden: true,
		Args:   noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			logger, err := log.logger(a, "supervisor")
			if err != nil {
				return err
			}
			return quietly(supervise.Main(cmd.Context(), logger, buildVersion().Version))
		},
	}
	log.add(cmd)
	return cmd
}
