package bench

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

// Report is what a run leaves in docs/benchmarks. It names neither host nor paths.
type Report struct {
	CPU     string       `json:"cpu"`
	Cores   int          `json:"cores"`
	Kernel  string       `json:"kernel"`
	Go      string       `json:"go"`
	Results []Comparison `json:"results"`
}

// NewReport describes this machine.
func NewReport(results []Comparison) Report {
	return Report{CPU: cpuModel(), Cores: runtime.NumCPU(), Kernel: kernelRelease(), Go: runtime.Version() + " " + runtime.GOARCH, Results: results}
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

// Write writes results.json, README.md, speed.svg and cpu.svg into dir.
func (r Report) Write(dir string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for name, content := range map[string]string{
		"results.json": string(data) + "\n",
		"README.md":    r.markdown(),
		"speed.svg": plot("Rate, ktls divided by crypto/tls (more is better)", r.Results,
			func(c Comparison) (v, low, high float64) { return c.Speed, c.SpeedLow, c.SpeedHigh }),
		"cpu.svg": plot("CPU time, ktls divided by crypto/tls (less is better)", r.Results,
			func(c Comparison) (v, low, high float64) { return c.CPU, c.CPULow, c.CPUHigh }),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func (r Report) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, `# Benchmarks

Written by `+"`make bench`"+`; the same figures are in [results.json](results.json).

Machine: %s, %d cores; kernel %s; %s.

The software layer of ktls against crypto/tls over the loopback, with the same
library at both ends, in one process. The two take turns of a fraction of a second;
a ratio is the median over pairs of neighbouring turns, with the quartiles in
brackets, so that the load of other programs meets both. Rates are medians. CPU
time is user and system time of both ends (bulk, ping-pong) or of the server's
thread alone (handshakes; closing is not counted).

| what | ktls | crypto/tls | rate, ratio | CPU, ktls | CPU, crypto/tls | CPU, ratio |
|---|---|---|---|---|---|---|
`, r.CPU, r.Cores, r.Kernel, r.Go)
	for _, c := range r.Results {
		fmt.Fprintf(&b, "| %s | %.0f %s | %.0f %s | **%.2f** (%.2f to %.2f) | %s | %s | **%.2f** (%.2f to %.2f) |\n",
			c.Name, c.OursRate, c.Unit, c.StockRate, c.Unit, c.Speed, c.SpeedLow, c.SpeedHigh,
			nanos(c.OursCPU, c.CPUFor), nanos(c.StockCPU, c.CPUFor), c.CPU, c.CPULow, c.CPUHigh)
	}
	b.WriteString("\n![rates](speed.svg)\n\n![CPU time](cpu.svg)\n")
	return b.String()
}

func nanos(ns float64, what string) string {
	if ns >= 1000 {
		return fmt.Sprintf("%.1f µs a %s", ns/1000, what)
	}
	return fmt.Sprintf("%.2f ns a %s", ns, what)
}
