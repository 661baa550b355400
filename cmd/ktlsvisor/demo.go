package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/ktlsvisor/ktlsvisor/internal/demo"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

func (a *app) demoCommand() *cobra.Command {
	var (
		sessions        int
		offload         string
		asJSON, verbose bool
	)
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "See live TLS connections survive upgrades and kill -9, on this machine, now",
		Long: `Start a ktlsvisor with the built-in echo worker and many TLS clients that check
every byte they get back, then, under their eyes: upgrade the workers, upgrade the
supervisor, kill the supervisor with -9, kill a worker with -9. It needs no files, no
root and no kernel TLS, listens on loopback only and leaves nothing behind.

Connections that had data in the worker that was killed stay open; that data is gone,
and the demo says how many there were.

Exit code 0: no connection was lost, no byte was wrong; 1: a step failed;
3: a connection was lost, or a byte was wrong.`,
		Example: `  ktlsvisor demo
  ktlsvisor demo --sessions 1000 --json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if sessions < 1 {
				return usagef("--sessions %d: at least 1 is needed", sessions)
			}
			if a.adminArg != "" {
				return usagef("--admin does not go with demo, which has a socket of its own")
			}
			if err := checkOffload(offload, ktls.Probe); err != nil {
				return err
			}
			self, err := ownPath()
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
			defer stop()
			o := demo.Options{Program: self, Sessions: sessions, Offload: offload, Steps: a.err, Color: isTerminal(a.err)}
			if verbose {
				o.Log = a.err
			}
			rep, err := demo.Run(ctx, o)
			return a.demoDone(ctx, rep, err, asJSON)
		},
	}
	f := cmd.Flags()
	f.IntVar(&sessions, "sessions", demo.DefaultSessions, "TLS clients")
	f.StringVar(&offload, "offload", "auto", "record layer: auto, kernel or software")
	f.BoolVar(&asJSON, "json", false, "answer in JSON")
	f.BoolVarP(&verbose, "verbose", "v", false, "show the log of the ktlsvisor under test")
	return cmd
}

func (a *app) demoDone(ctx context.Context, rep *demo.Report, err error, asJSON bool) error {
	if ctx.Err() != nil {
		return &codedError{exitSignal, fmt.Errorf("interrupted")}
	}
	if rep != nil {
		if asJSON {
			if perr := printJSON(a.out, rep); perr != nil {
				return perr
			}
		} else if len(rep.Steps) > 0 {
			fmt.Fprintln(a.err)
			rep.Print(a.out)
		}
	}
	switch {
	case rep != nil && (rep.Lost > 0 || rep.WrongBytes > 0):
		return &codedError{exitLost, err}
	case err != nil:
		return err
	case !rep.OK:
		return quietly(exitFailed)
	}
	return nil
}
