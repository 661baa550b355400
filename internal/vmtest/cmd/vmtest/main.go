// Command vmtest runs the tests on real kernels in QEMU; `make vmtest` calls it,
// and `make test` with -host.
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

Flags with a name in parentheses can be given as that environment variable too.

`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// command is a parsed command line.
type command struct {
	options  vmtest.Options
	host     bool
	ci       bool // everything must have run
	jsonFile string
	limit    time.Duration
	stdout   io.Writer
	stderr   io.Writer
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	c, err := parse(args, stdout, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintf(stderr, "vmtest: %v; see -help\n", err)
		return 2
	}
	ctx, cancel := context.WithTimeout(ctx, c.limit)
	defer cancel()
	return c.run(ctx)
}

func parse(args []string, stdout, stderr io.Writer) (*command, error) {
	c := &command{ci: os.Getenv("CI") == "true", stdout: stdout, stderr: stderr}
	o := &c.options
	o.Root = "."
	fs := flag.NewFlagSet("vmtest", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	env := os.Getenv
	kernels := fs.String("kernels", env("KERNELS"), "lines of kernels, such as \"6.1 7\"; default \""+strings.Join(vmtest.DefaultKernels, " ")+"\" (KERNELS)")
	pkg := fs.String("pkg", env("VMTEST_PKG"), "packages: a regular expression on their paths, such as '^ktls$' (VMTEST_PKG)")
	fs.StringVar(&o.Run, "run", env("VMTEST_RUN"), "tests: a regular expression as for go test -run (VMTEST_RUN)")
	without := fs.String("without", env("VMTEST_WITHOUT"), "kernel modules to leave out, to see the run fail (VMTEST_WITHOUT)")
	fs.StringVar(&o.Image, "kernel", env("KERNEL"), "a kernel image of your own; needs -modules (KERNEL)")
	fs.StringVar(&o.Modules, "modules", env("MODULES"), "its lib/modules/VERSION folder (MODULES)")
	mirror := fs.String("mirror", env("VMTEST_MIRROR"), "a Debian mirror, instead of the machine's own (VMTEST_MIRROR)")
	fs.StringVar(&c.jsonFile, "json", env("VMTEST_JSON"), "write the guests' results to this file too (VMTEST_JSON)")
	fs.IntVar(&o.Jobs, "jobs", 0, "guests at the same time")
	fs.IntVar(&o.CPUs, "cpus", 0, "processors of a guest")
	fs.IntVar(&o.Memory, "memory", 0, "memory of a guest, in MiB")
	fs.DurationVar(&o.BootLimit, "boot-limit", 0, "time limit of one guest")
	fs.DurationVar(&c.limit, "limit", 75*time.Minute, "time limit of the whole run")
	fs.BoolVar(&o.Verbose, "v", env("VMTEST_VERBOSE") != "", "print every line of the tests (VMTEST_VERBOSE)")
	fs.BoolVar(&o.KeepDir, "keep", false, "leave initramfs and consoles behind")
	fs.BoolVar(&c.host, "host", false, "first run all tests on this machine; a machine that cannot run guests is then no failure, unless CI=true")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			fmt.Fprint(stdout, usage)
			fs.SetOutput(stdout)
			fs.PrintDefaults()
		}
		return nil, err
	}
	if fs.NArg() > 0 {
		return nil, fmt.Errorf("unknown argument %q", fs.Arg(0))
	}
	o.Kernels, o.Without = words(*kernels), words(*without)
	if *pkg != "" {
		re, err := regexp.Compile(*pkg)
		if err != nil {
			return nil, fmt.Errorf("-pkg: %w", err)
		}
		o.Packages = re
	}
	start := time.Now()
	o.Say = func(format string, args ...any) {
		fmt.Fprintf(stdout, "[%4.0fs] %s\n", time.Since(start).Seconds(), fmt.Sprintf(format, args...))
	}
	dir, err := vmtest.DefaultCacheDir()
	if err != nil {
		return nil, err
	}
	o.Cache = &vmtest.Cache{Dir: dir, Mirror: *mirror, Say: o.Say}
	return c, nil
}

func words(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ' ' || r == ',' })
}
