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
	only := flag.String("run", "", "regular expression: only measurements with such a name")
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
	if err := run(*turns, *only); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(turns int, only string) error {
	match, err := regexp.Compile(only)
	if err != nil {
		return fmt.Errorf("-run: %w", err)
	}
	for _, v := range []uint16{tls.VersionTLS13, tls.VersionTLS12} {
		for _, size := range []int{16 << 10, 64 << 10, 256 << 10} {
			if !match.MatchString(fmt.Sprintf("bulk%d", size>>10)) {
				continue
			}
			c, err := bench.Bulk(v, size, 64<<20, turns)
			if err != nil {
				return err
			}
			show(c)
		}
		if match.MatchString("handshake") {
			c, err := bench.Handshake(v, 40, turns)
			if err != nil {
				return err
			}
			show(c)
		}
		if match.MatchString("pingpong") {
			c, err := bench.PingPong(v, 10000, turns)
			if err != nil {
				return err
			}
			show(c)
		}
	}
	return nil
}

func show(c bench.Comparison) {
	fmt.Printf("%-36s %9.0f against %9.0f %-13s x%.2f (%.2f..%.2f); CPU %.3f against %.3f ns a %s, x%.2f\n",
		c.Name, c.OursRate, c.StockRate, c.Unit, c.Speed, c.SpeedLow, c.SpeedHigh, c.OursCPU, c.StockCPU, c.CPUFor, c.CPU)
}
