// Drill replaces and kills everything of a ktlsvisor under the eyes of many busy
// clients, and prints as a Markdown table how long any of them had to wait.
//
//	make drill
//
// The figures are those of this machine at this moment: clients, supervisor and
// workers share it, so where "own pause" is about as large as a stall, the machine
// was too busy to tell. Exit codes: 0 nobody lost anything; 1 it could not be run;
// 2 usage; 3 something was lost, or a byte was wrong.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
	"github.com/ktlsvisor/ktlsvisor/internal/load"
)

const patience = 60 * time.Second

var errLost = errors.New("something was lost")

func main() {
	var d drill
	flag.StringVar(&d.bin, "bin", "bin", "`folder` with ktlsvisor and echo")
	flag.IntVar(&d.sessions, "sessions", 1000, "clients; each sends ten times a second and checks every byte")
	flag.IntVar(&d.idle, "idle", 0, "further clients, which say nothing before the end")
	flag.IntVar(&d.upgrades, "upgrades", 0, "only so many upgrades, instead of all steps")
	flag.IntVar(&d.rate, "rate", 0, "sessions that may move in a second; 0: as many as can")
	flag.IntVar(&d.workers, "workers", 2, "worker processes")
	flag.DurationVar(&d.watch, "watch", 2*time.Second, "how long to watch the clients after each step")
	flag.Parse()
	if flag.NArg() > 0 || d.sessions < 1 || d.idle < 0 || d.upgrades < 0 || d.rate < 0 || d.workers < 1 {
		flag.Usage()
		os.Exit(2)
	}
	switch err := d.run(os.Stdout); {
	case errors.Is(err, errLost):
		fmt.Fprintln(os.Stderr, "drill:", err)
		os.Exit(3)
	case err != nil:
		fmt.Fprintln(os.Stderr, "drill:", err)
		os.Exit(1)
	}
}

type drill struct {
	bin               string
	sessions, workers int
	idle, upgrades    int
	rate              int
	watch             time.Duration

	unit  *visor.Unit
	fleet *load.Fleet
	quiet *idlers
	moves []string                 // what upgrades said of themselves
	back  map[string]time.Duration // by step: until the next supervisor answered
}

func (d *drill) run(out io.Writer) (err error) {
	dir, err := os.MkdirTemp("", "kvd")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	bin, err := filepath.Abs(d.bin)
	if err != nil {
		return err
	}
	d.unit, err = visor.Start(visor.Options{Program: filepath.Join(bin, "ktlsvisor"), Command: []string{filepath.Join(bin, "echo")},
		Workers: d.workers, Dir: dir})
	if err != nil {
		return err
	}
	defer d.unit.Kill()
	// The certificate was made in the memory of our own child.
	conf := &tls.Config{InsecureSkipVerify: true}
	if d.quiet, err = startIdle(d.unit.Addr, d.idle, conf); err != nil {
		return err
	}
	defer d.quiet.close()
	d.fleet, err = load.Start(context.Background(), load.Options{Addr: d.unit.Addr, Sessions: d.sessions, TLS: conf})
	if err != nil {
		return err
	}
	st, err := d.settled()
	if err == nil {
		err = d.steps()
	}
	if err == nil && d.idle > 0 {
		d.fleet.Phase("the idle clients speak", false) // all at once: not a part of the step before
		err = d.quiet.check()
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	r := d.fleet.Stop(ctx)
	if err == nil {
		err = d.unit.Stop()
	}
	if err != nil {
		return fmt.Errorf("%w\n%s", err, d.unit.LogTail())
	}
	d.print(out, st, r)
	if err := r.Err(); err != nil {
		return fmt.Errorf("%w: %w", errLost, err)
	}
	return nil
}

func (d *drill) steps() error {
	d.back = map[string]time.Duration{}
	type step struct {
		name string
		do   func() error
	}
	steps := []step{
		{"nothing happens", func() error { return nil }},
		{"upgrade", d.upgrade},
		{"second upgrade", d.upgrade},
		{"upgrade of the supervisor", func() error { return d.command("upgrade", "--supervisor") }},
		{"kill -9 of the supervisor", func() error {
			_, _, back, err := d.unit.KillSupervisor(patience)
			d.back["kill -9 of the supervisor"] = back
			return err
		}},
		{"upgrade after the kill", d.upgrade},
	}
	if d.upgrades > 0 {
		steps = steps[:1]
		for i := range d.upgrades {
			steps = append(steps, step{fmt.Sprintf("upgrade %d", i+1), d.upgrade})
		}
	}
	for _, s := range steps {
		d.fleet.Phase(s.name, false)
		if err := s.do(); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		if _, err := d.settled(); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		time.Sleep(d.watch) // a time of observation; nothing is decided by it
	}
	return nil
}

func (d *drill) command(args ...string) error {
	if r := d.unit.Run(args...); r.Code != 0 {
		return fmt.Errorf("%v: %s", args, r)
	}
	return nil
}

func (d *drill) upgrade() error {
	before, err := d.settled()
	if err == nil {
		err = d.move()
	}
	if err != nil {
		return err
	}
	after, err := d.settled()
	if err != nil {
		return err
	}
	for _, pid := range visor.WorkerPIDs(after) {
		if slices.Contains(visor.WorkerPIDs(before), pid) {
			return fmt.Errorf("worker %d was not replaced", pid)
		}
	}
	return nil
}

// move upgrades the pool and keeps what the supervisor says of it.
func (d *drill) move() error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	r, err := d.unit.Admin.Upgrade(ctx, admin.UpgradeRequest{Rate: d.rate}, nil)
	if err != nil {
		return err
	}
	if r.Outcome != admin.OutcomeMoved || len(r.Pools) != 1 {
		return fmt.Errorf("upgrade: %+v", r)
	}
	p := r.Pools[0]
	d.moves = append(d.moves, fmt.Sprintf("%d moved in %.2f s with the start of the new workers; from FREEZE to RESUME p50 %.1f, p99 %.1f, longest %.1f ms",
		p.Moved, r.DurationSecs, p.StallP50, p.StallP99, p.StallMax))
	return nil
}

func (d *drill) settled() (*admin.Status, error) {
	return d.unit.Await(patience, "all sessions to have an owner", func(st *admin.Status) bool {
		return visor.Settled(st) && st.Sessions.Total == d.fleet.Snapshot().Alive+d.idle
	})
}

func (d *drill) print(out io.Writer, st *admin.Status, r load.Report) {
	layer := "software"
	if st.Sessions.Kernel == st.Sessions.Total {
		layer = "kernel"
	}
	fmt.Fprintf(out, "%d busy and %d idle clients, %d workers, %s layer, Linux %s, %s %s/%s, %d CPUs\n\n", d.sessions, d.idle, d.workers, layer,
		st.Kernel.Release, runtime.Version(), runtime.GOOS, runtime.GOARCH, runtime.NumCPU())
	fmt.Fprintln(out, "| step | lost | wrong bytes | longest stall | p99 | back after | clients' own pause |")
	fmt.Fprintln(out, "|---|---:|---:|---:|---:|---:|---:|")
	for _, p := range r.Phases[1:] { // the first is the connecting
		back := ""
		if b, ok := d.back[p.Name]; ok {
			back = ms(b)
		}
		fmt.Fprintf(out, "| %s | %d | %d | %s | %s | %s | %s |\n", p.Name, p.Lost, p.WrongBytes, ms(p.LongestStall), ms(p.StallP99), back, ms(p.ClientPause))
	}
	for _, m := range d.moves {
		fmt.Fprintf(out, "\n- %s", m)
	}
	fmt.Fprintf(out, "\n\n%d of %d connections lived to the end; %d bytes came back, %d of them wrong.\n", r.Alive, r.Sessions, r.BytesChecked, r.WrongBytes)
}

func ms(d time.Duration) string { return fmt.Sprintf("%.0f ms", float64(d)/float64(time.Millisecond)) }
