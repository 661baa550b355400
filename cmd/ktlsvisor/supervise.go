package main

import (
	"errors"

	"github.com/spf13/cobra"
)

func (a *app) superviseCommand() *cobra.Command {
	var log logFlags
	cmd := &cobra.Command{
		Use:    "supervise",
		Short:  "The supervisor; started by the keeper",
		Hidden: true,
		Args:   noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return errors.New("not there yet")
		},
	}
	log.add(cmd)
	return cmd
}

func (a *app) echoWorkerCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "echo-worker",
		Short:  "A worker that sends back every byte it reads",
		Hidden: true,
		Args:   noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return errors.New("not there yet")
		},
	}
}
