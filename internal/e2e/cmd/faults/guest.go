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
	if err := build(ctx, dir, "fault", "./cmd/ktlsvisor", "./examples/echo", "./internal/e2e/cmd/faults"); err != nil {
		return nil, err
	}
	cache, err := vmtest.DefaultCacheDir()
	if err != nil {
		return nil, err
	}
	args := []string{"-guest", "-bin", "/f", "-dir", "/tmp", "-layer", "kernel", "-j", "2", "-ops", c.ops, "-only", c.only,
		"-some", fmt.Sprint(c.some), "-seed", fmt.Sprint(c.seed), "-patience", (3 * c.o.Patience).String()}
	args = append(args, c.cases...)
	say := func(format string, a ...any) {
		if text := fmt.Sprintf(format, a...); !strings.Contains(text, resultMark) {
			fmt.Fprintln(out, text)
		}
	}
	boots, err := vmtest.Run(ctx, vmtest.Options{
		Root: ".", Kernels: strings.Fields(c.kernels), Say: say, BootLimit: c.limit,
		Cache: &vmtest.Cache{Dir: cache, Say: say},
		Program: &vmtest.Program{Name: "faults", Path: filepath.Join(dir, "faults"), Args: args, Limit: c.limit,
			Files: map[string]string{"f/ktlsvisor": filepath.Join(dir, "ktlsvisor"), "f/echo": filepath.Join(dir, "echo")}},
	})
	var list []faults.Section
	for _, b := range boots {
		s := faults.Section{Layer: "kernel", Where: "on Linux " + b.Release}
		for _, p := range b.Packages {
			for _, line := range p.Output {
				_, text, ok := strings.Cut(line, resultMark)
				if !ok {
					continue
				}
				r := &faults.Result{}
				if jerr := json.Unmarshal([]byte(text), r); jerr != nil {
					return nil, errors.Join(err, fmt.Errorf("a result of the guest cannot be read: %w", jerr))
				}
				s.Results = append(s.Results, r)
				c.guest = false
				c.print(out, r)
			}
		}
		if len(s.Results) == 0 {
			return nil, errors.Join(err, fmt.Errorf("the guest has no result: %v", b.Problems))
		}
		list = append(list, s)
	}
	return list, err
}
