// Command bench measures ktls and ktlsvisor against crypto/tls and writes
// docs/benchmarks. What was measured before and is not measured now stays there.
//
//	make bench                        everything
//	make bench BENCH_RUN=pingpong     a part; on this machine and in the guests
//	make bench BENCH_KERNELS=         without guests
//	make bench BENCH_RUN=none         nothing: the texts are written anew
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime/pprof"
	"slices"
	"strings"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/bench"
)

type options struct {
	turns    int
	run      string
	dir, bin string
	readme   string
	kernels  string
	profile  string

	moveProfile string
}

func main() {
	bench.Main()
	var o options
	flag.IntVar(&o.turns, "turns", bench.Full.Turns, "turns of each library in a measurement on this machine")
	flag.StringVar(&o.run, "run", "", "regular expression: only such of bulk16-tls13-aes128, pingpong-..., handshake-..., file-..., move-..., idle-software, idle-kernel")
	flag.StringVar(&o.dir, "o", "", "directory for README.md, results.json and the plots")
	flag.StringVar(&o.readme, "readme", "", "file that quotes the figures")
	flag.StringVar(&o.bin, "bin", "bin", "folder with ktlsvisor and echo")
	flag.StringVar(&o.kernels, "kernels", "", "lines of kernels to measure the kernel layer on, in guests, such as \"7 6.12\"")
	flag.StringVar(&o.profile, "cpuprofile", "", "file for a CPU profile of the run")
	flag.StringVar(&o.moveProfile, "moveprofile", "", "absolute folder for CPU profiles of the processes in the last turn of a move-...")
	flag.Parse()
	if o.profile != "" {
		f, err := os.Create(o.profile)
		if err == nil {
			err = pprof.StartCPUProfile(f)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		defer pprof.StopCPUProfile()
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := o.measure(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func (o options) measure(ctx context.Context) error {
	only, err := regexp.Compile(o.run)
	if err != nil {
		return fmt.Errorf("-run: %w", err)
	}
	if o.turns < 1 {
		return fmt.Errorf("-turns %d: at least one is needed", o.turns)
	}
	if names := names(); o.run != "none" && !slices.ContainsFunc(names, only.MatchString) {
		return fmt.Errorf("%q matches none of %s; \"none\" writes the texts anew", o.run, strings.Join(names, ", "))
	}
	scale := bench.Full
	scale.Turns = o.turns
	commit := head()
	var fresh bench.Report
	for _, c := range bench.SoftwareCases() {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !only.MatchString(c.ID) {
			continue
		}
		r, err := c.Measure(scale)
		if err != nil {
			return err
		}
		show(r)
		fresh.Add(bench.Report{Results: []bench.Comparison{r}})
	}
	if only.MatchString("idle-software") {
		i, err := o.idle()
		if err != nil {
			return err
		}
		fresh.Add(bench.Report{Idle: []bench.Idle{i}})
	}
	for _, m := range bench.HostMoves() {
		if !only.MatchString(m.ID()) || ctx.Err() != nil {
			continue
		}
		r, err := o.move(m)
		if err != nil {
			return err
		}
		fresh.Add(bench.Report{Moves: []bench.Move{r}})
	}
	fresh.From(commit, "")
	if err := o.keep(fresh); err != nil {
		return err
	}
	kernels := strings.Fields(o.kernels)
	if len(kernels) == 0 || !o.wantsGuests(only) {
		return nil
	}
	say("the kernel layer in guests: %s; some minutes each", o.kernels)
	guests, err := bench.Guests(ctx, ".", kernels, only, commit, say)
	for _, c := range guests.Results {
		fmt.Printf("Linux %s: ", c.Run.Kernel)
		show(c)
	}
	for _, m := range guests.Moves {
		showMove(m)
	}
	for _, i := range guests.Idle {
		showIdle(i)
	}
	if kerr := o.keep(guests); err == nil {
		err = kerr
	}
	return err
}

// names are all that -run can choose from, each once: some are for both layers.
func names() []string {
	names := []string{"idle-software", "idle-kernel"}
	for _, m := range slices.Concat(bench.HostMoves(), bench.GuestMoves()) {
		names = append(names, m.ID())
	}
	for _, c := range slices.Concat(bench.SoftwareCases(), bench.KernelCases()) {
		names = append(names, c.ID)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func (o options) wantsGuests(only *regexp.Regexp) bool {
	for _, c := range bench.KernelCases() {
		if only.MatchString(c.ID) {
			return true
		}
	}
	for _, m := range bench.GuestMoves() {
		if only.MatchString(m.ID()) {
			return true
		}
	}
	return only.MatchString("idle-kernel")
}

// keep adds to what docs/benchmarks has.
func (o options) keep(fresh bench.Report) error {
	if o.dir == "" {
		return nil
	}
	r, err := bench.ReadReport(o.dir)
	if err != nil {
		return err
	}
	r.Add(fresh)
	if err := r.Write(o.dir); err != nil {
		return err
	}
	if o.readme == "" {
		return nil
	}
	return r.Quote(o.readme)
}

func (o options) idle() (bench.Idle, error) {
	dir, err := os.MkdirTemp("", "kvb")
	if err != nil {
		return bench.Idle{}, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	bin, err := filepath.Abs(o.bin)
	if err != nil {
		return bench.Idle{}, err
	}
	say("idle sessions: about a minute")
	i, err := bench.MeasureIdle(bench.IdleOptions{Program: filepath.Join(bin, "ktlsvisor"), Worker: filepath.Join(bin, "echo"),
		Layer: "software", Few: 1000, Many: 10000, Stock: true, Dir: dir, Say: say})
	if err == nil {
		showIdle(i)
	}
	return i, err
}

func (o options) move(m bench.MoveOptions) (bench.Move, error) {
	dir, err := os.MkdirTemp("", "kvb")
	if err != nil {
		return bench.Move{}, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	m.Dir, m.Say, m.Profile = dir, say, o.moveProfile
	say("%s", m.ID())
	r, err := bench.MeasureMove(m)
	if err == nil {
		showMove(r)
	}
	return r, err
}

func showMove(r bench.Move) {
	say("%d sessions, %s layer, rest %v, Linux %s: %.0f a second (%.0f to %.0f); bare descriptors %.0f",
		r.Sessions, r.Layer, r.Rest, r.Run.Kernel, r.Rate, r.Low, r.High, r.RawRate)
}

// head names the commit that is measured; a + says that files were changed since.
func head() string {
	out, err := exec.Command("git", "rev-parse", "--short=10", "HEAD").Output()
	if err != nil {
		return "unknown"
	}
	commit := strings.TrimSpace(string(out))
	if out, err := exec.Command("git", "status", "--porcelain", "--untracked-files=no", "--", "*.go", "go.mod").Output(); err != nil || len(out) > 0 {
		commit += "+"
	}
	return commit
}

var began = time.Now()

func say(format string, args ...any) {
	fmt.Printf("[%4.0fs] %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
}

func show(c bench.Comparison) {
	allocs := ""
	if c.Allocs != nil {
		allocs = fmt.Sprintf("; allocations %.2f against %.2f", c.Allocs.Ours, c.Allocs.Stock)
	}
	say("%-48s %7.0f against %7.0f %-13s x%.2f (%.2f..%.2f); CPU x%.2f (%.2f..%.2f)%s", c.Name, c.OursRate, c.StockRate, c.Unit,
		c.Speed.Median, c.Speed.Low, c.Speed.High, c.CPU.Median, c.CPU.Low, c.CPU.High, allocs)
}

func showIdle(i bench.Idle) {
	stock := "crypto/tls not measured"
	if i.Stock != nil {
		stock = fmt.Sprintf("crypto/tls %.2f KiB", i.Stock.PerSession)
	}
	say("idle session, %s layer, Linux %s: %.2f KiB, %s", i.Layer, i.Run.Kernel, i.Ours.PerSession, stock)
}
