// Soak lets a ktlsvisor run for a time in which anything may happen at any moment.
//
//	make soak SOAK=30m
//
// Exit codes: 0 all as it must be; 1 it could not be run; 2 usage; 3 something was lost,
// wrong or grew.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/e2e/soak"
)

func main() {
	var o soak.Options
	bin := flag.String("bin", "bin", "`folder` with ktlsvisor and the worker")
	worker := flag.String("worker", "echo", "`program` of the workers, an echo service; with committing no client may miss a byte")
	flag.DurationVar(&o.Duration, "time", 30*time.Minute, "how long")
	flag.IntVar(&o.Upgrades, "upgrades", 0, "end after that many upgrades")
	flag.IntVar(&o.Sessions, "sessions", 40, "clients that stay")
	flag.Uint64Var(&o.Seed, "seed", 0, "of what happens when; 0 draws one")
	flag.StringVar(&o.Layer, "offload", "auto", "record layer")
	flag.StringVar(&o.Only, "only", "", "one `action` only, such as upgrade")
	flag.BoolVar(&o.KillWorkers, "kill-workers", true, "kill workers, too: their sessions outlive them, unless crash_exact is off in the software layer")
	verbose := flag.Bool("v", false, "print the unit's log")
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, o, *bin, *worker, *verbose)
	stop()
	os.Exit(code)
}

func run(ctx context.Context, o soak.Options, bin, worker string, verbose bool) int {
	dir, err := os.MkdirTemp("", "kvs")
	if err == nil {
		defer os.RemoveAll(dir)
		bin, err = filepath.Abs(bin)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		return 1
	}
	o.Commits = worker == "committing"
	o.Dir, o.Program, o.Worker = dir, filepath.Join(bin, "ktlsvisor"), filepath.Join(bin, worker)
	r, log, err := soak.Run(ctx, o)
	if r != nil {
		r.Print(os.Stdout)
	}
	if verbose {
		fmt.Println(log)
	}
	switch {
	case err != nil:
		fmt.Fprintln(os.Stderr, "soak:", err)
		return 1
	case len(r.Wrong) > 0:
		return 3
	}
	return 0
}
