// Command fuzz runs every fuzz target of the module for a while, one after another;
// `make fuzz` calls it. go test takes one target of one package at a time.
//
// Exit codes: 0 nothing found, 1 an input that fails a target (go test has written it
// below that package's testdata/fuzz: commit it with the fix), 2 usage.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string) int {
	fl := flag.NewFlagSet("fuzz", flag.ContinueOnError)
	each := fl.Duration("time", 5*time.Second, "for how long each target runs")
	only := fl.String("run", "", "targets: a regular expression on package/FuzzName, such as ktls/FuzzWire")
	if err := fl.Parse(args); err != nil {
		return 2
	}
	match, err := regexp.Compile(*only)
	if err != nil || fl.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "fuzz: %v %v\n", err, fl.Args())
		return 2
	}
	targets, err := find(".")
	if err != nil {
		fmt.Fprintf(os.Stderr, "fuzz: %v\n", err)
		return 1
	}
	ran, code := 0, 0
	for _, t := range targets {
		if !match.MatchString(t.String()) {
			continue
		}
		ran++
		if !t.fuzz(ctx, *each) {
			code = 1
		}
	}
	if ran == 0 {
		fmt.Fprintf(os.Stderr, "fuzz: no target matches %q\n", *only)
		return 2
	}
	return code
}

// target is one fuzz function.
type target struct{ dir, name string }

func (t target) String() string { return filepath.ToSlash(t.dir) + "/" + t.name }

var fuzzFunc = regexp.MustCompile(`(?m)^func (Fuzz\w*)\(\w+ \*testing\.F\)`)

// find lists the targets below root, in the order of their files.
func find(root string) ([]target, error) {
	var all []target
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != root && strings.HasPrefix(d.Name(), ".") {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		src, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, m := range fuzzFunc.FindAllSubmatch(src, -1) {
			all = append(all, target{filepath.Dir(path), string(m[1])})
		}
		return nil
	})
	return all, err
}

// fuzz runs one target and reports whether it held.
func (t target) fuzz(ctx context.Context, d time.Duration) bool {
	start := time.Now()
	cmd := exec.CommandContext(ctx, "go", "test", "-run=^$", "-fuzz=^"+t.name+"$", "-fuzztime="+d.String(), "-fuzzminimizetime=2s", "./"+filepath.ToSlash(t.dir))
	out, err := cmd.CombinedOutput()
	// When the time is up in the middle of an input, go test may call that a failure;
	// a real one names its input.
	if err != nil && ctx.Err() == nil && bytes.Contains(out, []byte("context deadline exceeded")) && !bytes.Contains(out, []byte("Failing input")) && !bytes.Contains(out, []byte("panic:")) {
		err = nil
	}
	word := "ok"
	if err != nil {
		word = "FAILED"
	}
	fmt.Printf("fuzz: %-36s %s (%.1f s)%s\n", t, word, time.Since(start).Seconds(), lastCount(out))
	if err != nil {
		fmt.Printf("%s%v\n", out, err)
	}
	return err == nil
}

var execs = regexp.MustCompile(`execs: (\d+)`)

// lastCount is how many inputs were tried.
func lastCount(out []byte) string {
	all := execs.FindAllSubmatch(out, -1)
	if len(all) == 0 {
		return ""
	}
	return fmt.Sprintf(", %s inputs", all[len(all)-1][1])
}
