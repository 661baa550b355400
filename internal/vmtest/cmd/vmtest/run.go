package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest"
)

// run runs what was asked for and returns the exit code.
func (c *command) run(ctx context.Context) int {
	var host *vmtest.HostResult
	var sum vmtest.Counts
	code := 0
	if c.host {
		var err error
		host, err = c.runHost(ctx)
		if host != nil {
			sum = host.Counts()
			// Skips are judged below, when it is known what ran in a guest.
			sum.Skipped = 0
		}
		if err != nil {
			fmt.Fprintf(c.stderr, "vmtest: %v\n", err)
			sum.Failed++
		}
	}
	guests, err := vmtest.Run(ctx, c.options)
	switch {
	case errors.Is(err, vmtest.ErrNoGuests) && c.host && !c.ci:
		fmt.Fprintf(c.stdout, "LEFT OUT: the tests on real kernels, because %s. Run them with: make vmtest\n", firstLine(err))
	case err != nil:
		fmt.Fprintf(c.stderr, "vmtest: %v\n", err)
		sum.Failed++
		if errors.Is(err, vmtest.ErrNoGuests) && !c.host {
			return 3
		}
	case !vmtest.Good(guests):
		code = 1
	}
	sum.Add(vmtest.Total(guests))
	if c.jsonFile != "" {
		if err := vmtest.WriteJSON(c.jsonFile, guests); err != nil {
			fmt.Fprintf(c.stderr, "vmtest: %v\n", err)
			code = 1
		}
	}
	fmt.Fprintln(c.stdout)
	if len(guests) > 0 {
		if err := vmtest.Table(c.stdout, guests); err != nil {
			code = 1
		}
	}
	if host != nil {
		for _, line := range host.Failures() {
			fmt.Fprintf(c.stdout, "host: PROBLEM: %s\n", line)
		}
		sum.Add(c.nowhere(host, guests))
	}
	if sum.Failed > 0 || sum.Passed == 0 {
		code = 1
	}
	if sum.Failed == 0 && sum.Passed == 0 {
		fmt.Fprintln(c.stderr, "vmtest: not one test passed, which proves nothing; does -run or -pkg fit any?")
	}
	fmt.Fprintf(c.stdout, "%d passed, %d failed, %d skipped\n", sum.Passed, sum.Failed, sum.Skipped)
	return code
}

// runHost runs the tests on this machine, with the race detector wherever there is
// the C compiler that it needs.
func (c *command) runHost(ctx context.Context) (*vmtest.HostResult, error) {
	race := true
	if _, err := exec.LookPath("gcc"); err != nil {
		if c.ci {
			return nil, fmt.Errorf("the race detector needs a C compiler: %w", err)
		}
		race = false
		fmt.Fprintln(c.stdout, "LEFT OUT: the race detector, which needs a C compiler (gcc)")
	}
	return vmtest.RunHost(ctx, vmtest.HostOptions{Root: c.options.Root, Race: race, Say: c.options.Say})
}

// nowhere reports the tests that were skipped here and passed in no guest. Where
// everything is expected to have run they are failures.
func (c *command) nowhere(host *vmtest.HostResult, guests []*vmtest.BootResult) vmtest.Counts {
	list := vmtest.NowhereRun(host, guests)
	for _, line := range list {
		fmt.Fprintf(c.stdout, "skipped here, and passed in no guest: %s\n", line)
	}
	if c.ci {
		return vmtest.Counts{Failed: len(list)}
	}
	return vmtest.Counts{Skipped: len(list)}
}

func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}
