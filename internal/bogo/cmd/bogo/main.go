// Command bogo runs BoringSSL's test runner against our shim and compares the
// outcome with the list in internal/bogo; `make bogo` calls it. The runner is a
// program that the user has: docs/conformance.md.
//
// Exit codes: 0 as expected, 1 not, 2 usage, 3 the runner or a guest cannot be run.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/bogo"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

type command struct {
	drive bogo.Drive
	guest string // kernel line; "" is this machine
	limit time.Duration
	v     bool
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	c, err := parse(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintf(stderr, "bogo: %v\n", err)
		return 2
	}
	ctx, cancel := context.WithTimeout(ctx, c.limit)
	defer cancel()
	ok := false
	if c.guest != "" {
		ok, err = c.inGuest(ctx, stdout)
	} else {
		ok, err = c.here(ctx, stdout)
	}
	switch {
	case err != nil:
		fmt.Fprintf(stderr, "bogo: %v\n", err)
		return 3
	case !ok:
		return 1
	}
	return 0
}

func parse(args []string, stderr io.Writer) (*command, error) {
	c := &command{}
	d := &c.drive
	fs := flag.NewFlagSet("bogo", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&d.Runner, "runner", "", "the runner: a program, or a folder with runner.test in it")
	fs.StringVar(&d.Shim, "shim", "", "our shim, built; default: it is built now")
	fs.StringVar(&d.Layer, "layer", "software", "record layer: software or kernel")
	fs.BoolVar(&d.Move, "move", false, "every session moves before every read")
	fs.StringVar(&d.Tests, "tests", "", "patterns of tests, separated by ; (default: all of the list)")
	fs.IntVar(&d.Workers, "workers", 0, "tests at the same time; 0: the runner's choice")
	fs.DurationVar(&d.Idle, "idle", 5*time.Second, "how long the runner waits for the shim")
	fs.StringVar(&c.guest, "guest", "", "run in a guest with this line of kernels, such as 7")
	fs.DurationVar(&c.limit, "limit", 15*time.Minute, "time limit of the whole run")
	fs.BoolVar(&c.v, "v", false, "print what the runner prints")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	if fs.NArg() > 0 {
		return nil, fmt.Errorf("unknown argument %q", fs.Arg(0))
	}
	if d.Runner == "" {
		return nil, errors.New("no runner: give RUNNER=PATH, a built ssl/test/runner of BoringSSL (docs/conformance.md)")
	}
	st, err := os.Stat(d.Runner)
	if err != nil {
		return nil, fmt.Errorf("runner: %w", err)
	}
	if st.IsDir() {
		d.Runner = filepath.Join(d.Runner, "runner.test")
		if _, err := os.Stat(d.Runner); err != nil {
			return nil, fmt.Errorf("runner: the folder has no built runner.test: %w", err)
		}
	}
	d.Runner, err = filepath.Abs(d.Runner)
	return c, err
}

// here runs the runner on this machine.
func (c *command) here(ctx context.Context, stdout io.Writer) (bool, error) {
	d := &c.drive
	if d.Shim == "" {
		dir, err := os.MkdirTemp("", "ktlsvisor-shim-")
		if err != nil {
			return false, err
		}
		defer func() { _ = os.RemoveAll(dir) }()
		if d.Shim, err = build(ctx, dir, "shim"); err != nil {
			return false, err
		}
	}
	if c.v {
		d.Out = stdout
	}
	v, err := d.Run(ctx)
	if err != nil {
		return false, err
	}
	return report(v, d.Tests == "", stdout), nil
}

// report prints a verdict. whole says that every test of the list should have run.
func report(v *bogo.Verdict, whole bool, w io.Writer) bool {
	for _, line := range v.Unexpected {
		fmt.Fprintln(w, line)
	}
	failed := 0
	for _, o := range v.Unlisted {
		if o.Actual != "PASS" {
			failed++
			fmt.Fprintf(w, "not in the list: %s: %s\n", o.Test, o.Actual)
		}
	}
	v.Table(w)
	if n := len(v.Unlisted); n > 0 {
		fmt.Fprintf(w, "%d tests are not in the list: %d passed, %d did not\n", n, n-failed, failed)
	}
	if whole && len(v.NotRun) > 0 {
		fmt.Fprintf(w, "this runner does not have: %s\n", strings.Join(v.NotRun, " "))
	}
	return len(v.Unexpected) == 0
}

// build builds one of our commands, static, as a guest needs it.
func build(ctx context.Context, dir, name string) (string, error) {
	file := filepath.Join(dir, name)
	cmd := exec.CommandContext(ctx, "go", "build", "-o", file, "./internal/bogo/cmd/"+name)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build %s: %w\n%s", name, err, out)
	}
	return file, nil
}

// inGuest runs this same command in a guest. The runner has to be static.
func (c *command) inGuest(ctx context.Context, stdout io.Writer) (bool, error) {
	dir, err := os.MkdirTemp("", "ktlsvisor-bogo-")
	if err != nil {
		return false, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	driver, err := build(ctx, dir, "bogo")
	if err != nil {
		return false, err
	}
	shim, err := build(ctx, dir, "shim")
	if err != nil {
		return false, err
	}
	cache, err := vmtest.DefaultCacheDir()
	if err != nil {
		return false, err
	}
	say := func(format string, args ...any) { fmt.Fprintf(stdout, format+"\n", args...) }
	d := &c.drive
	args := []string{"-runner", "/bogo/runner", "-shim", "/bogo/shim", "-layer", d.Layer, "-tests", d.Tests,
		"-idle", (4 * d.Idle).String(), "-workers", "2", "-limit", c.limit.String()} // emulated, so slow
	if d.Move {
		args = append(args, "-move")
	}
	if c.v {
		args = append(args, "-v")
	}
	results, err := vmtest.Run(ctx, vmtest.Options{
		Root: ".", Kernels: []string{c.guest}, Verbose: true, Say: say, BootLimit: c.limit,
		Cache: &vmtest.Cache{Dir: cache, Say: say},
		Program: &vmtest.Program{Name: "bogo", Path: driver, Args: args, Limit: c.limit,
			Files: map[string]string{"bogo/runner": d.Runner, "bogo/shim": shim}},
	})
	return err == nil && vmtest.Good(results), err
}
