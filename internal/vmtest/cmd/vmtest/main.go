// Command vmtest runs the tests on real kernels in QEMU; `make vmtest` calls it.
//
// Exit codes: 0 all good, 1 something failed, 2 usage, 3 this machine cannot run
// guests.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest"
)

const usage = `Usage: go run ./internal/vmtest/cmd/vmtest [flags]

Boots real kernels in QEMU (no KVM needed) and runs the project's tests in them.
Kernels are Debian's, fetched with apt into a cache; nothing is installed but
QEMU and kmod, and those only by root.

Each flag can also be given as the environment variable in parentheses.

`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	start := time.Now()
	o := vmtest.Options{Root: "."}
	fs := flag.NewFlagSet("vmtest", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		fmt.Fprint(stderr, usage)
		fs.PrintDefaults()
	}
	kernels := fs.String("kernels", os.Getenv("KERNELS"), "lines of kernels, such as \"6.1 7\" (KERNELS; all: "+strings.Join(vmtest.DefaultKernels, " ")+")")
	pkg := fs.String("pkg", os.Getenv("VMTEST_PKG"), "packages: a regular expression on their paths, such as '^ktls$' (VMTEST_PKG)")
	fs.StringVar(&o.Run, "run", os.Getenv("VMTEST_RUN"), "tests: a regular expression as for go test -run (VMTEST_RUN)")
	without := fs.String("without", os.Getenv("VMTEST_WITHOUT"), "kernel modules to leave out, to see the run fail (VMTEST_WITHOUT)")
	fs.StringVar(&o.Image, "kernel", os.Getenv("KERNEL"), "a kernel image of your own (KERNEL); needs -modules")
	fs.StringVar(&o.Modules, "modules", os.Getenv("MODULES"), "its lib/modules/VERSION folder (MODULES)")
	mirror := fs.String("mirror", os.Getenv("VMTEST_MIRROR"), "a Debian mirror, instead of the machine's own (VMTEST_MIRROR)")
	jsonFile := fs.String("json", os.Getenv("VMTEST_JSON"), "write the results to this file too (VMTEST_JSON)")
	fs.IntVar(&o.Jobs, "jobs", 1, "guests at the same time")
	fs.IntVar(&o.CPUs, "cpus", 2, "processors of a guest")
	fs.IntVar(&o.Memory, "memory", 2048, "memory of a guest, in MiB")
	fs.DurationVar(&o.BootLimit, "boot-limit", 8*time.Minute, "time limit of one guest")
	limit := fs.Duration("limit", 20*time.Minute, "time limit of the whole run")
	fs.BoolVar(&o.Verbose, "v", os.Getenv("VMTEST_VERBOSE") != "", "print every line of the tests (VMTEST_VERBOSE)")
	fs.BoolVar(&o.KeepDir, "keep", false, "leave initramfs and consoles behind")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	o.Kernels = words(*kernels)
	o.Without = words(*without)
	if fs.NArg() > 0 {
		fmt.Fprintf(stderr, "vmtest: unknown argument %q; see -help\n", fs.Arg(0))
		return 2
	}
	if *pkg != "" {
		re, err := regexp.Compile(*pkg)
		if err != nil {
			fmt.Fprintf(stderr, "vmtest: -pkg: %v\n", err)
			return 2
		}
		o.Packages = re
	}
	o.Say = func(format string, args ...any) {
		fmt.Fprintf(stdout, "[%4.0fs] "+format+"\n", append([]any{time.Since(start).Seconds()}, args...)...)
	}
	dir, err := vmtest.DefaultCacheDir()
	if err != nil {
		fmt.Fprintf(stderr, "vmtest: %v\n", err)
		return 1
	}
	o.Cache = &vmtest.Cache{Dir: dir, Mirror: *mirror, Say: o.Say}

	ctx, cancel := context.WithTimeout(ctx, *limit)
	defer cancel()
	results, err := vmtest.Run(ctx, o)
	code := 0
	if err != nil {
		fmt.Fprintf(stderr, "vmtest: %v\n", err)
		code = 1
		if errors.Is(err, vmtest.ErrNoGuests) {
			return 3
		}
	}
	if *jsonFile != "" {
		if err := vmtest.WriteJSON(*jsonFile, results); err != nil {
			fmt.Fprintf(stderr, "vmtest: %v\n", err)
			code = 1
		}
	}
	if len(results) == 0 {
		return 1
	}
	if !vmtest.Good(results) {
		code = 1
	}
	fmt.Fprintln(stdout)
	if err := vmtest.Table(stdout, results); err != nil {
		code = 1
	}
	sum := vmtest.Total(results)
	fmt.Fprintf(stdout, "%d passed, %d failed, %d skipped\n", sum.Passed, sum.Failed, sum.Skipped)
	return code
}

func words(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ' ' || r == ',' })
}
