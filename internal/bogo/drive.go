package bogo

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Drive is one run of the runner.
type Drive struct {
	Runner  string        // the runner, as a program
	Shim    string        // ours
	Layer   string        // "software" or "kernel"
	Move    bool          // sessions move before every read
	Tests   string        // patterns separated by ; ("" is the list of this package)
	Workers int           // tests at the same time; 0: the runner decides
	Idle    time.Duration // how long the runner waits for the shim
	Out     io.Writer     // the runner's output, if not nil
}

// Run runs the tests and compares the outcome with the list. An error is about what
// kept the runner from running.
func (d *Drive) Run(ctx context.Context) (*Verdict, error) {
	list, err := Expectations()
	if err != nil {
		return nil, err
	}
	if d.Layer != "software" && d.Layer != "kernel" {
		return nil, fmt.Errorf("layer %q: use software or kernel", d.Layer)
	}
	dir, err := os.MkdirTemp("", "ktlsvisor-bogo-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	config, results := filepath.Join(dir, "config.json"), filepath.Join(dir, "results.json")
	if err := os.WriteFile(config, configFile, 0o600); err != nil {
		return nil, err
	}
	flags := []string{"-ktls-mode", d.Layer}
	if d.Move {
		flags = append(flags, "-ktls-move")
	}
	args := []string{"-shim-path", d.Shim, "-shim-config", config, "-json-output", results, "-pipe", "-allow-unimplemented",
		"-idle-timeout", d.Idle.String(), "-shim-extra-flags", strings.Join(flags, ";"), "-test", d.patterns(list)}
	if d.Workers > 0 {
		args = append(args, "-num-workers", strconv.Itoa(d.Workers))
	}
	cmd := exec.CommandContext(ctx, d.Runner, args...)
	cmd.Dir = dir
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if d.Out != nil {
		cmd.Stdout, cmd.Stderr = d.Out, d.Out
	}
	runErr := cmd.Run() // a test that fails is an exit code too
	outcomes, err := readResults(results)
	switch {
	case ctx.Err() != nil:
		return nil, fmt.Errorf("runner: %w", ctx.Err())
	case err != nil:
		return nil, fmt.Errorf("runner %s left no results: %w\n%s", d.Runner, errors.Join(err, runErr), tail(said.String()))
	}
	return judge(list, outcomes, d.Layer, d.Move), nil
}

// patterns are the tests of the list, and what a modified runner makes of them.
func (d *Drive) patterns(list []Expectation) string {
	if d.Tests != "" {
		return d.Tests
	}
	var all []string
	for _, e := range list {
		all = append(all, e.Test)
		if e.Role == "client" {
			all = append(all, mirrorPrefix+e.Test)
		}
	}
	return strings.Join(all, ";")
}

func tail(s string) string {
	const n = 2000
	return s[max(0, len(s)-n):]
}

// readResults reads what the runner writes: the JSON test results format, version 3.
func readResults(file string) ([]Outcome, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var r struct {
		Tests map[string]struct {
			Actual string `json:"actual"`
			Error  string `json:"error"`
		} `json:"tests"`
	}
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	var list []Outcome
	for name, t := range r.Tests {
		list = append(list, Outcome{name, t.Actual, t.Error})
	}
	slices.SortFunc(list, func(a, b Outcome) int { return strings.Compare(a.Test, b.Test) })
	return list, nil
}
