// Command bench compares the software record layer with crypto/tls.
package main

import (
	"crypto/tls"
	"flag"
	"fmt"
	"os"
	"regexp"
	"runtime/pprof"

	"github.com/ktlsvisor/ktlsvisor/internal/bench"
)

func main() {
	turns := flag.Int("turns", 31, "turns of each library in a measurement")
	only := flag.String("run", "", "regular expression: only such of bulk16, bulk64, bulk256, pingpong, handshake")
	dir := flag.String("o", "", "directory for README.md, results.json and the plots")
	profile := flag.String("cpuprofile", "", "file for a CPU profile of the run")
	flag.Parse()
	if *profile != "" {
		f, err := os.Create(*profile)
		if err == nil {
			err = pprof.StartCPUProfile(f)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		defer pprof.StopCPUProfile()
	}
	if err := run(*turns, *only, *dir); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bulkTurn is the bytes of one turn: some 50 ms.
const bulkTurn = 64 << 20

func run(turns int, only, dir string) error {
	match, err := regexp.Compile(only)
	if err != nil {
		return fmt.Errorf("-run: %w", err)
	}
	if turns < 1 {
		return fmt.Errorf("-turns %d: at least one is needed", turns)
	}
	var results []bench.Comparison
	for _, v := range []uint16{tls.VersionTLS13, tls.VersionTLS12} {
		for _, m := range []struct {
			name    string
			measure func() (bench.Comparison, error)
		}{
			{"bulk16", func() (bench.Comparison, error) { return bench.Bulk(v, 16<<10, bulkTurn, turns) }},
			{"bulk64", func() (bench.Comparison, error) { return bench.Bulk(v, 64<<10, bulkTurn, turns) }},
			{"bulk256", func() (bench.Comparison, error) { return bench.Bulk(v, 256<<10, bulkTurn, turns) }},
			{"pingpong", func() (bench.Comparison, error) { return bench.PingPong(v, 2000, turns) }},
			{"handshake", func() (bench.Comparison, error) { return bench.Handshake(v, 40, turns) }},
		} {
			if !match.MatchString(m.name) {
				continue
			}
			c, err := m.measure()
			if err != nil {
				return err
			}
			show(c)
			results = append(results, c)
		}
	}
	if dir == "" {
		return nil
	}
	return bench.NewReport(results).Write(dir)
}

func show(c bench.Comparison) {
	fmt.Printf("%-36s %9.0f against %9.0f %-13s x%.2f (%.2f..%.2f); CPU %.3f against %.3f ns a %s, x%.2f\n",
		c.Name, c.OursRate, c.StockRate, c.Unit, c.Speed, c.SpeedLow, c.SpeedHigh, c.OursCPU, c.StockCPU, c.CPUFor, c.CPU)
}
