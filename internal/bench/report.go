package bench

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Run says where and when something was measured. It names neither host nor paths.
type Run struct {
	Date   string `json:"date"`
	Commit string `json:"commit,omitempty"`
	CPU    string `json:"cpu"`
	Cores  int    `json:"cores"`
	Kernel string `json:"kernel"`
	Go     string `json:"go"`
	// Guest is the line of kernels that was asked for, in an emulated machine; "" on
	// this one.
	Guest    string `json:"guest,omitempty"`
	Emulated bool   `json:"emulated,omitempty"`
}

func thisRun() Run {
	return Run{Date: time.Now().UTC().Format(time.DateOnly), CPU: cpuModel(), Cores: runtime.NumCPU(), Kernel: kernelRelease(),
		Go: runtime.Version() + " " + runtime.GOARCH, Emulated: os.Getenv("KTLSVISOR_GUEST") == "1"}
}

func cpuModel() string {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "unknown"
	}
	for line := range strings.Lines(string(b)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "unknown"
}

func kernelRelease() string {
	var u syscall.Utsname
	if syscall.Uname(&u) != nil {
		return "unknown"
	}
	var b strings.Builder
	for _, c := range u.Release {
		if c == 0 {
			break
		}
		b.WriteByte(byte(c))
	}
	return b.String()
}

// Report is what docs/benchmarks holds.
type Report struct {
	Results []Comparison `json:"results"`
	Idle    []Idle       `json:"idle"`
	Moves   []Move       `json:"moves,omitempty"`
}

// ReadReport reads results.json of dir; there may be none yet.
func ReadReport(dir string) (Report, error) {
	var r Report
	b, err := os.ReadFile(filepath.Join(dir, "results.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("%s: %w; remove it, all of it can be measured again", filepath.Join(dir, "results.json"), err)
	}
	return r, nil
}

// Add replaces what was measured before of the same, so that a run of a part leaves the
// rest as it is.
func (r *Report) Add(more Report) {
	r.Results = replace(r.Results, more.Results, func(c Comparison) string { return c.Run.Guest + " " + c.Layer + " " + c.ID })
	r.Moves = replace(r.Moves, more.Moves, func(m Move) string { return m.Run.Guest + " " + m.ID })
	r.Idle = replace(r.Idle, more.Idle, func(i Idle) string { return i.Run.Guest + " " + i.ID })
}

func replace[T any](list, more []T, key func(T) string) []T {
	for _, m := range more {
		if i := slices.IndexFunc(list, func(l T) bool { return key(l) == key(m) }); i >= 0 {
			list[i] = m
		} else {
			list = append(list, m)
		}
	}
	return list
}

// From says of everything in r which commit was measured, and in which guest.
func (r *Report) From(commit, guest string) {
	for i := range r.Results {
		r.Results[i].Run.Commit, r.Results[i].Run.Guest = commit, guest
	}
	for i := range r.Moves {
		r.Moves[i].Run.Commit, r.Moves[i].Run.Guest = commit, guest
	}
	for i := range r.Idle {
		r.Idle[i].Run.Commit, r.Idle[i].Run.Guest = commit, guest
	}
}

// Write writes results.json, README.md and the plots into dir.
func (r Report) Write(dir string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	files := r.plots()
	files["results.json"] = string(data) + "\n"
	files["README.md"] = r.markdown()
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}
