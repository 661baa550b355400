package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/ktlsvisor/ktlsvisor/internal/config"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// configProblem is a config.Error in JSON.
type configProblem struct {
	File    string `json:"file,omitempty"`
	Line    int    `json:"line,omitempty"`
	Key     string `json:"key,omitempty"`
	Problem string `json:"problem"`
	Remedy  string `json:"remedy,omitempty"`
}

type checkReport struct {
	File      string          `json:"file"`
	Good      bool            `json:"good"`
	Listeners int             `json:"listeners"`
	Pools     int             `json:"pools"`
	Problems  []configProblem `json:"problems"`
}

func (a *app) checkCommand() *cobra.Command {
	var (
		file   string
		asJSON bool
	)
	cmd := &cobra.Command{
		Use:   "check -c FILE",
		Short: "Check a configuration file without using it",
		Long: `Check a configuration file: every problem is reported, with file, line, key and
what to do about it; also a pool with offload = "kernel" where this machine has no
kernel TLS, or none that can change keys and the pool has rekey = "require". Nothing is started or bound.

Exit code 0: the configuration is good; 1: it is not.`,
		Example: `  ktlsvisor check -c ktlsvisor.toml`,
		Args:    noArgs,
		RunE: func(*cobra.Command, []string) error {
			if file == "" {
				return usagef("give the file with -c")
			}
			cfg, err := config.Load(file)
			if err == nil {
				err = checkKernel(cfg, ktls.Probe)
			}
			if asJSON {
				rep := checkReport{File: file, Good: err == nil, Problems: problemsOf(err)}
				if cfg != nil {
					rep.Listeners, rep.Pools = len(cfg.Listeners), len(cfg.Pools)
				}
				if perr := printJSON(a.out, rep); perr != nil {
					return perr
				}
				if err != nil {
					return quietly(exitFailed)
				}
				return nil
			}
			if err != nil {
				return a.reportConfig(err)
			}
			fmt.Fprintf(a.out, "configuration %s is good: %s, %s\n", file, plural(len(cfg.Listeners), "listener"), plural(len(cfg.Pools), "pool"))
			return nil
		},
	}
	cmd.Flags().StringVarP(&file, "config", "c", "", "configuration file (TOML)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "answer in JSON")
	return cmd
}

// reportConfig prints every problem on a line of its own, as compilers do, so that
// editors find their way.
func (a *app) reportConfig(err error) error {
	var all config.Errors
	if !errors.As(err, &all) {
		return err
	}
	for _, e := range all {
		fmt.Fprintln(a.err, clean(e.Error()))
	}
	return quietly(exitFailed)
}

func problemsOf(err error) []configProblem {
	list := []configProblem{}
	var all config.Errors
	switch {
	case err == nil:
	case errors.As(err, &all):
		for _, e := range all {
			list = append(list, configProblem{e.File, e.Line, e.Key, e.Problem, e.Remedy})
		}
	default:
		list = append(list, configProblem{Problem: err.Error()})
	}
	return list
}
