package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/ktlsvisor/ktlsvisor/internal/e2e/faults"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest"
)

// resultMark begins the lines in which a guest tells its results.
const resultMark = "FAULT RESULT "

const maxLog = 16 << 10

func resultLine(r *faults.Result) string {
	short := *r
	if len(r.Wrong) == 0 {
		short.Log = ""
	}
	if n := len(short.Log) - maxLog; n > 0 {
		short.Log = short.Log[n:]
	}
	b, err := json.Marshal(short)
	if err != nil {
		return err.Error()
	}
	return resultMark + string(b)
}

// inGuests runs this same command in guests.
func (c *command) inGuests(ctx context.Context, out io.Writer) ([]faults.Section, error) {
	dir, err := os.MkdirTemp("", "ktlsvisor-faults-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if err := build(ctx, dir, "fault", "./cmd/ktlsvisor", "./examples/echo", "./examples/committing", "./internal/e2e/cmd/faults"); err != nil {
		return nil, err
	}
	cache, err := vmtest.DefaultCacheDir()
	if err != nil {
		return nil, err
	}
	args := []string{"-guest", "-bin", "/f", "-dir", "/tmp", "-layer", "kernel", "-j", "3", "-interval", "100ms", "-freeze", "3s", "-ops", c.ops, "-only", c.only,
		"-some", fmt.Sprint(c.some), "-seed", fmt.Sprint(c.seed), "-patience", (3 * c.o.Patience).String()}
	args = append(args, c.cases...)
	var now []*faults.Result // of the guest that runs
	var bad error
	say := func(format string, a ...any) {
		_, text, found := strings.Cut(fmt.Sprintf(format, a...), resultMark)
		if !found {
			fmt.Fprintf(out, format+"\n", a...)
			return
		}
		r := &faults.Result{}
		if err := json.Unmarshal([]byte(text), r); err != nil {
			bad = errors.Join(bad, fmt.Errorf("a result of the guest cannot be read: %w", err))
			return
		}
		now = append(now, r)
		c.print(out, r)
	}
	// What was measured is kept, whatever happens to the guest.
	var list []faults.Section
	for _, kernel := range strings.Fields(c.kernels) {
		now = nil
		boots, err := vmtest.Run(ctx, vmtest.Options{
			Root: ".", Kernels: []string{kernel}, Say: say, BootLimit: c.limit, Verbose: true,
			Cache: &vmtest.Cache{Dir: cache, Say: say},
			Program: &vmtest.Program{Name: "faults", Path: filepath.Join(dir, "faults"), Args: args, Limit: c.limit,
				Files: map[string]string{"f/ktlsvisor": filepath.Join(dir, "ktlsvisor"), "f/echo": filepath.Join(dir, "echo"), "f/committing": filepath.Join(dir, "committing")}},
		})
		for _, b := range boots {
			list = append(list, faults.Section{Layer: "kernel", Where: "on Linux " + b.Release, Results: now})
		}
		if len(boots) == 0 && len(now) > 0 {
			list = append(list, faults.Section{Layer: "kernel", Where: "on Linux " + kernel + ", cut short", Results: now})
		}
		if err := errors.Join(err, bad); err != nil {
			return list, err
		}
		if len(now) == 0 {
			return list, fmt.Errorf("the guest with kernel %s has no result", kernel)
		}
	}
	return list, nil
}
