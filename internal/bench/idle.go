package bench

import (
	"bufio"
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
)

// IdleOptions say what is measured: resident memory of everything that serves
// sessions that do nothing, as the slope between two numbers of sessions.
type IdleOptions struct {
	Program string // ktlsvisor
	Worker  string // examples/echo
	Layer   string // kernel or software
	Few     int
	Many    int
	Stock   bool // crypto/tls too
	// Patience bounds how long sessions may take to be established; 0 is a minute.
	Patience time.Duration
	Dir      string // short; for the unit's socket and log
	Say      func(format string, args ...any)
}

// Idle is the result. All sizes are in KiB.
type Idle struct {
	ID    string `json:"id"`
	Layer string `json:"layer"`
	Few   int    `json:"sessions_few"`
	Many  int    `json:"sessions_many"`
	Ours  Slope  `json:"ktlsvisor"`
	Stock *Slope `json:"crypto_tls,omitempty"` // nil: not measured
	Run   Run    `json:"run"`
}

// Slope is resident memory at both numbers of sessions.
type Slope struct {
	FewKiB     float64            `json:"few_kib"`
	ManyKiB    float64            `json:"many_kib"`
	PerSession float64            `json:"kib_per_session"`
	Parts      map[string]float64 `json:"parts_kib_per_session,omitempty"` // of PerSession, by process
}

// MeasureIdle runs both servers one after the other.
func MeasureIdle(o IdleOptions) (Idle, error) {
	r := Idle{ID: "idle-" + o.Layer, Layer: o.Layer, Few: o.Few, Many: o.Many, Run: thisRun()}
	var err error
	if r.Ours, err = o.ours(); err != nil {
		return r, fmt.Errorf("idle memory of ktlsvisor: %w", err)
	}
	if !o.Stock {
		return r, nil
	}
	stock, err := o.stock()
	if err != nil {
		return r, fmt.Errorf("idle memory of crypto/tls: %w", err)
	}
	r.Stock = &stock
	return r, nil
}

func (o IdleOptions) ours() (Slope, error) {
	u, err := visor.Start(visor.Options{Program: o.Program, Dir: o.Dir,
		Args: []string{"--listen", "127.0.0.1:0", "--self-signed", "--workers", "1", "--offload", o.Layer, "--", o.Worker}})
	if err != nil {
		return Slope{}, err
	}
	defer u.Kill()
	s, err := o.slope(u.Addr, u.Processes, func(n int) error {
		_, err := u.Await(cmp.Or(o.Patience, time.Minute), fmt.Sprintf("%d sessions", n), func(st *admin.Status) bool {
			return visor.Settled(st) && st.Sessions.Total == n
		})
		return err
	})
	if err != nil {
		return s, fmt.Errorf("%w\n%s", err, u.LogTail())
	}
	return s, nil
}

func (o IdleOptions) stock() (Slope, error) {
	server, err := startRole("stock-idle")
	if err != nil {
		return Slope{}, err
	}
	defer func() { _ = server.stop() }()
	addr, err := server.answer()
	if err != nil {
		return Slope{}, err
	}
	return o.slope(addr, func() []int { return []int{server.pid()} }, func(int) error { return nil })
}

// slope opens clients in a process of their own, which does not count, and reads the
// memory of pids at both numbers.
func (o IdleOptions) slope(addr string, pids func() []int, there func(n int) error) (s Slope, err error) {
	clients, err := startRole("clients", addr)
	if err != nil {
		return s, err
	}
	defer func() { _ = clients.stop() }()
	at := func(n int) (map[string]float64, error) {
		if _, err := clients.order("%d", n); err != nil {
			return nil, err
		}
		if err := there(n); err != nil {
			return nil, err
		}
		return o.settled(n, pids())
	}
	few, err := at(o.Few)
	if err != nil {
		return s, err
	}
	many, err := at(o.Many)
	if err != nil {
		return s, err
	}
	s.FewKiB, s.ManyKiB = sum(few), sum(many)
	per := 1 / float64(o.Many-o.Few)
	s.PerSession, s.Parts = (s.ManyKiB-s.FewKiB)*per, map[string]float64{}
	for name := range many {
		s.Parts[name] = (many[name] - few[name]) * per
	}
	return s, nil
}

// Memory goes down slowly after a wave of handshakes: what counts is what stays.
const (
	settleStep  = time.Second
	settleFor   = 8 * time.Second // without a change of more than settleBand
	settleLimit = 90 * time.Second
	settleBand  = 0.01
)

// settled reads the memory when it has stopped changing.
func (o IdleOptions) settled(n int, pids []int) (map[string]float64, error) {
	tick := time.NewTicker(settleStep)
	defer tick.Stop()
	begin := time.Now()
	since, low, high := begin, 0.0, 0.0
	for {
		now, err := resident(pids)
		if err != nil {
			return nil, err
		}
		total := sum(now)
		low, high = min(low, total), max(high, total)
		if high-low > settleBand*high {
			since, low, high = time.Now(), total, total
		}
		if time.Since(since) >= settleFor || time.Since(begin) >= settleLimit {
			o.Say("  %d sessions: %.0f KiB after %.0f s: %s", n, total, time.Since(begin).Seconds(), describe(now))
			return now, nil
		}
		<-tick.C
	}
}

func describe(m map[string]float64) string {
	var parts []string
	for _, name := range sorted(m) {
		parts = append(parts, fmt.Sprintf("%s %.0f", name, m[name]))
	}
	return strings.Join(parts, ", ")
}

// resident is the proportional set size of each process: pages that several share
// count once in the sum.
func resident(pids []int) (map[string]float64, error) {
	m := map[string]float64{}
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			return nil, fmt.Errorf("resident memory: %w", err)
		}
		kib, ok := rollup(b, "Pss:")
		if !ok {
			return nil, fmt.Errorf("process %d: its smaps_rollup has no Pss line", pid)
		}
		m[roleOf(pid)] += kib
	}
	return m, nil
}

func rollup(b []byte, field string) (kib float64, ok bool) {
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		f := strings.Fields(s.Text())
		if len(f) == 3 && f[0] == field {
			v, err := strconv.ParseFloat(f[1], 64)
			return v, err == nil
		}
	}
	return 0, false
}

// roleOf names a process after its program, and ktlsvisor's after their subcommand.
func roleOf(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	args := strings.Split(string(b), "\x00")
	switch name := filepath.Base(args[0]); {
	case len(args) > 1 && args[1] == "run":
		return "keeper"
	case len(args) > 1 && args[1] == "supervise":
		return "supervisor"
	case name == "echo":
		return "worker"
	default:
		return "server"
	}
}
func sorted[T any](m map[string]T) []string { return slices.Sorted(maps.Keys(m)) }

func sum(m map[string]float64) float64 {
	var t float64
	for _, v := range m {
		t += v
	}
	return t
}
