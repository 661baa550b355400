// Faults runs every case of package faults, or some, and writes the table of docs/faults.md.
//
//	make faults                          the software layer, on this machine
//	make faults FAULT_KERNELS=7          and the kernel layer, in a guest
//	faults 'upgrade: new recv-RESUME 1 kill'    one case, with all that it says
//
// Exit codes: 0 every case is as the design allows; 1 it could not be run; 2 usage; 3 a
// case is not.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/e2e/faults"
)

var errWrong = errors.New("some cases did not end as they must")

type command struct {
	o       faults.Options
	jobs    int
	ops     string
	only    string
	some    int
	seed    uint64
	twice   bool
	retry   int
	table   string
	json    string
	merge   string
	kernels string
	host    bool
	guest   bool
	limit   time.Duration
	verbose bool
	cases   []string
}

func main() {
	var c command
	flag.StringVar(&c.o.Bin, "bin", "", "`folder` with programs built with the tag fault; they are built when it is not given")
	flag.StringVar(&c.o.Layer, "layer", "software", "record layer")
	flag.StringVar(&c.o.Dir, "dir", "", "`folder` for sockets; its name must be short")
	flag.DurationVar(&c.o.Patience, "patience", 20*time.Second, "limit of what takes no time on an idle machine")
	flag.DurationVar(&c.o.Interval, "interval", 15*time.Millisecond, "between two frames of a busy client")
	flag.DurationVar(&c.o.Freeze, "freeze", 400*time.Millisecond, "freeze_timeout of the pool")
	flag.BoolVar(&c.o.Trace, "trace", false, "print the steps that are passed")
	flag.IntVar(&c.jobs, "j", 2, "cases at a time")
	flag.StringVar(&c.ops, "ops", strings.Join(faults.Operations, ","), "operations")
	flag.StringVar(&c.only, "only", "", "cases that this `pattern` matches")
	flag.IntVar(&c.some, "some", 0, "that many cases only, drawn")
	flag.Uint64Var(&c.seed, "seed", 0, "of the draw; 0 takes the time")
	flag.BoolVar(&c.twice, "twice", false, "kill and stop at the second time of a step, too")
	flag.IntVar(&c.retry, "retry", 1, "how often a case is run again whose step was not reached")
	flag.StringVar(&c.table, "o", "", "`file` for the table")
	flag.StringVar(&c.json, "json", "", "`file` for the results, for -merge")
	flag.StringVar(&c.merge, "merge", "", "run nothing: make the table of these `files`, separated by commas")
	flag.StringVar(&c.kernels, "kernels", "", "run the kernel layer in guests with these kernels, too")
	flag.BoolVar(&c.host, "host", true, "run cases on this machine")
	flag.BoolVar(&c.guest, "guest", false, "this is a guest: print results for the host")
	flag.DurationVar(&c.limit, "limit", 40*time.Minute, "of a guest")
	flag.BoolVar(&c.verbose, "v", false, "print the log of cases that are wrong")
	flag.Parse()
	c.cases = flag.Args()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := c.run(ctx, os.Stdout)
	stop()
	switch {
	case errors.Is(err, errWrong):
		fmt.Fprintln(os.Stderr, "faults:", err)
		os.Exit(3)
	case err != nil:
		fmt.Fprintln(os.Stderr, "faults:", err)
		os.Exit(1)
	}
}

func (c *command) run(ctx context.Context, out io.Writer) error {
	if c.merge != "" {
		return c.mergeAll()
	}
	if c.o.Bin == "" {
		dir, err := os.MkdirTemp("", "kvf")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		if err := build(ctx, dir, "fault", "./cmd/ktlsvisor", "./examples/echo", "./examples/committing"); err != nil {
			return err
		}
		c.o.Bin = dir
	}
	bin, err := filepath.Abs(c.o.Bin)
	if err != nil {
		return err
	}
	c.o.Bin = bin
	var sections []faults.Section
	var failed error
	if c.host {
		list, err := c.choose(ctx, out)
		if err != nil {
			return err
		}
		s := faults.Section{Layer: c.o.Layer, Where: "on the machine itself"}
		s.Results = c.runAll(ctx, out, list)
		sections = append(sections, s)
	}
	if c.kernels != "" {
		more, err := c.inGuests(ctx, out)
		sections = append(sections, more...)
		if err != nil {
			fmt.Fprintln(out, err)
			failed = err
		}
	}
	wrong := false
	for _, s := range sections {
		wrong = wrong || slices.ContainsFunc(s.Results, func(r *faults.Result) bool { return len(r.Wrong) > 0 })
	}
	if err := c.write(sections); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if wrong {
		return errWrong
	}
	return failed
}

// build builds static programs of this module into a folder.
func build(ctx context.Context, dir, tags string, pkgs ...string) error {
	args := append([]string{"build", "-trimpath", "-tags", tags, "-o", dir + "/"}, pkgs...)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, msg)
	}
	return nil
}

// choose makes the list of cases: those named, or all of every operation's steps.
func (c *command) choose(ctx context.Context, out io.Writer) (list []faults.Case, err error) {
	for _, text := range c.cases {
		k, err := faults.ParseCase(text)
		if err != nil {
			return nil, err
		}
		list = append(list, k)
	}
	if len(list) > 0 {
		return list, nil
	}
	only, err := regexp.Compile(c.only)
	if err != nil {
		return nil, err
	}
	for op := range strings.SplitSeq(c.ops, ",") {
		t := c.o
		t.Trace = true
		r := faults.Run(ctx, t, faults.Case{Op: op})
		if len(r.Wrong) > 0 {
			return nil, fmt.Errorf("%s without a fault: %s\n%s", op, strings.Join(r.Wrong, "; "), r.Log)
		}
		for _, k := range faults.Cases(op, r.Steps, c.twice) {
			if only.MatchString(k.String()) {
				list = append(list, k)
			}
		}
	}
	if c.some > 0 && c.some < len(list) {
		if c.seed == 0 {
			c.seed = uint64(time.Now().UnixNano())
		}
		fmt.Fprintln(out, "seed", c.seed)
		rand.New(rand.NewPCG(c.seed, 1)).Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
		list = list[:c.some]
	}
	return list, nil
}

func (c *command) runAll(ctx context.Context, out io.Writer, list []faults.Case) []*faults.Result {
	results := make([]*faults.Result, len(list))
	next := make(chan int)
	var wg sync.WaitGroup
	var mu sync.Mutex
	for range max(c.jobs, 1) {
		wg.Go(func() {
			for i := range next {
				r := faults.Run(ctx, c.o, list[i])
				for n := 0; n < c.retry && !r.Reached && len(r.Wrong) == 0; n++ {
					r = faults.Run(ctx, c.o, list[i])
				}
				if ctx.Err() != nil {
					return // it was cut short
				}
				results[i] = r
				mu.Lock()
				c.print(out, r)
				mu.Unlock()
			}
		})
	}
	for i := range list {
		if ctx.Err() != nil {
			break
		}
		select {
		case next <- i:
		case <-ctx.Done():
		}
	}
	close(next)
	wg.Wait()
	return slices.DeleteFunc(results, func(r *faults.Result) bool { return r == nil })
}

func (c *command) print(out io.Writer, r *faults.Result) {
	if c.guest {
		fmt.Fprintln(out, resultLine(r))
		return
	}
	fmt.Fprintf(out, "%-11s %s (exit %d, %.1f s)\n", r.Outcome(), r.Case, r.Exit, r.Took.Seconds())
	for _, w := range r.Wrong {
		fmt.Fprintln(out, "    ", w)
	}
	for _, s := range r.Steps {
		fmt.Fprintln(out, "    ", s.Role, s.Name, s.Count)
	}
	if len(r.Wrong) > 0 && c.verbose {
		fmt.Fprintln(out, r.Log)
	}
}
