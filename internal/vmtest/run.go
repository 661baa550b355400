// Package vmtest runs the project's tests on real kernels, in QEMU without KVM:
// it fetches kernels, builds static test binaries, boots each kernel with an
// initramfs of ours, and judges what comes back. Whatever is not clearly good is
// bad: a guest that says nothing, a test that was skipped, a kernel that panicked.
package vmtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"
)

// Options are one run. The zero value of a field means its default.
type Options struct {
	Root    string   // the repository
	Kernels []string // labels; DefaultKernels
	// Image and Modules boot a kernel of the user's instead: its bootable file and
	// its lib/modules/VERSION folder.
	Image, Modules string
	Packages       *regexp.Regexp // which of the known packages; all
	Run            string         // -test.run for all of them
	Without        []string       // modules to leave out, to see the run fail
	Env            []string       // for the tests, NAME=VALUE
	Program        *Program       // to run instead of the tests
	Cache          *Cache
	Jobs           int           // guests at the same time; 1
	CPUs           int           // of a guest; 2
	CPU            string        // their model, as QEMU calls it; "max"
	Memory         int           // of a guest, MiB; 2048
	BootLimit      time.Duration // 30 minutes
	TestLimit      time.Duration // of the tests of a package, in place of its own
	Verbose        bool          // every line of the tests
	KeepDir        bool          // leave the folder with initramfs and consoles
	Say            func(format string, args ...any)
}

// Run builds, boots and judges. Its error is about what kept a guest from running
// at all; what guests reported is in the results.
func Run(ctx context.Context, o Options) ([]*BootResult, error) {
	o.defaults()
	if err := EnsureTools(ctx, o.Say); err != nil {
		return nil, err
	}
	kernels, err := o.kernels(ctx)
	if err != nil {
		return nil, err
	}
	shell, err := o.Cache.Shell(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoGuests, err)
	}
	dir, err := os.MkdirTemp("", "ktlsvisor-vmtest-")
	if err != nil {
		return nil, err
	}
	if o.KeepDir {
		o.Say("initramfs and consoles stay in %s", dir)
	} else {
		defer func() { _ = os.RemoveAll(dir) }()
	}
	build, err := o.build(ctx, dir, shell)
	if err != nil {
		return nil, err
	}
	return o.bootAll(ctx, dir, build, kernels)
}

func (o *Options) build(ctx context.Context, dir, shell string) (*Build, error) {
	if o.Program == nil {
		return buildGuest(ctx, o, dir, shell)
	}
	initFile := filepath.Join(dir, "init")
	if err := goTool(ctx, o.Root, "build", "-ldflags=-s -w", "-o", initFile, "./internal/vmtest/init"); err != nil {
		return nil, err
	}
	return o.Program.build(dir, initFile, shell)
}

func (o *Options) defaults() {
	if len(o.Kernels) == 0 {
		o.Kernels = DefaultKernels
	}
	if o.Jobs == 0 {
		o.Jobs = 1
	}
	if o.CPUs == 0 {
		o.CPUs = 2
	}
	if o.CPU == "" {
		o.CPU = "max"
	}
	if o.Memory == 0 {
		o.Memory = 2048
	}
	if o.BootLimit == 0 {
		o.BootLimit = 30 * time.Minute
	}
}

func (o *Options) kernels(ctx context.Context) ([]Kernel, error) {
	switch {
	case o.Image != "" && o.Modules != "":
		return []Kernel{{Label: "given", Release: filepath.Base(o.Modules), Image: o.Image, Modules: o.Modules}}, nil
	case o.Image != "" || o.Modules != "":
		return nil, errors.New("a kernel needs both: KERNEL=FILE (the bootable image) and MODULES=FOLDER (lib/modules/VERSION)")
	}
	for _, l := range o.Kernels {
		if !labelPattern.MatchString(l) {
			return nil, fmt.Errorf("kernel %q: give a line of kernels, such as 6.12 or 7", l)
		}
	}
	kernels, err := o.Cache.Kernels(ctx, o.Kernels)
	if err != nil && ctx.Err() == nil {
		return nil, fmt.Errorf("%w: %w", ErrNoGuests, err)
	}
	return kernels, err
}

// bootAll boots the kernels, o.Jobs at a time, and returns their results in order.
func (o *Options) bootAll(ctx context.Context, dir string, build *Build, kernels []Kernel) ([]*BootResult, error) {
	results := make([]*BootResult, len(kernels))
	errs := make([]error, len(kernels))
	slots := make(chan struct{}, o.Jobs)
	var wg sync.WaitGroup
	for i, k := range kernels {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			results[i], errs[i] = o.bootOne(ctx, filepath.Join(dir, k.Label), build, k)
		})
	}
	wg.Wait()
	var done []*BootResult
	for _, r := range results {
		if r != nil {
			done = append(done, r)
		}
	}
	return done, errors.Join(errs...)
}

func (o *Options) bootOne(ctx context.Context, dir string, build *Build, k Kernel) (*BootResult, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	initramfs, console := filepath.Join(dir, "initramfs"), filepath.Join(dir, "console")
	env := append(proxyEnv(), o.Env...)
	notes, err := writeInitramfs(initramfs, build, k, o.Without, env)
	if err != nil {
		return nil, fmt.Errorf("kernel %s: %w", k.Label, err)
	}
	if !o.KeepDir {
		defer func() { _ = os.Remove(initramfs) }()
	}
	o.Say("%s: booting Linux %s", k.Label, k.Release)
	m := machine{cpus: o.CPUs, model: o.CPU, memory: o.Memory, limit: o.BootLimit}
	b, ended, err := m.boot(ctx, k, initramfs, console, func(line string) { o.progress(k.Label, line) })
	if err != nil {
		return nil, fmt.Errorf("kernel %s: %w", k.Label, err)
	}
	b.Notes = append(notes, b.Notes...)
	want := make([]string, len(build.Tests))
	for i, t := range build.Tests {
		want[i] = t.Package
	}
	b.program = build.program
	b.Finish(want, ended)
	o.explain(b, console)
	return b, nil
}

// proxyEnv passes on what tests of the project read from their environment.
func proxyEnv() []string {
	var env []string
	for _, e := range os.Environ() {
		if strings.HasPrefix(e, "KTLSVISOR_TEST_") || strings.HasPrefix(e, "GODEBUG=") {
			env = append(env, e)
		}
	}
	return env
}

// progress tells what a guest does.
func (o *Options) progress(label, line string) {
	word, rest, _ := strings.Cut(line, " ")
	switch {
	case strings.HasPrefix(line, "|"+marker+"=== NAME"):
	case o.Verbose && strings.HasPrefix(line, "|"):
		o.Say("%s: %s", label, strings.ReplaceAll(line[1:], marker, ""))
	case word == "begin" && o.Verbose, word == "note":
		o.Say("%s: %s", label, line)
	case word == "end":
		f := strings.Fields(rest)
		if len(f) == 3 {
			verdict := "ok"
			if f[1] != "0" {
				verdict = "FAILED"
			}
			o.Say("%s: %-24s %s (%s s)", label, f[0], verdict, f[2])
		}
	}
}

// explain prints what somebody needs to understand a bad result.
func (o *Options) explain(b *BootResult, console string) {
	if len(b.Problems) == 0 {
		return
	}
	for _, p := range b.Packages {
		if p.Code == 0 || o.Verbose {
			continue
		}
		o.Say("%s: output of %s:", b.Kernel, p.Package)
		for _, line := range lastLines(p.Output, 150) {
			o.Say("    %s", line)
		}
	}
	if data, err := os.ReadFile(console); err == nil && len(data) > 0 {
		o.Say("%s: the end of its console:", b.Kernel)
		for _, line := range lastLines(strings.Split(strings.TrimSpace(string(data)), "\n"), 60) {
			o.Say("    %s", strings.TrimRight(line, "\r"))
		}
	}
	for _, p := range b.Problems {
		o.Say("%s: PROBLEM: %s", b.Kernel, p)
	}
}

func lastLines(lines []string, n int) []string {
	if len(lines) > n {
		return lines[len(lines)-n:]
	}
	return lines
}
