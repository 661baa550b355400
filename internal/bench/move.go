package bench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// MoveOptions say what is measured: upgrades of a unit, that is keeper, supervisor and
// workers in processes of their own, with sessions that do nothing and have a record
// state and 1 KiB of application state each.
type MoveOptions struct {
	Layer    string // kernel or software
	Sessions int
	Workers  int
	Self     bool // a program that upgrades itself, in place of a unit
	Rest     bool // sessions are at rest; otherwise a handler waits in Read for each
	Turns    int  // upgrades, each with a turn of bare descriptors before it
	Dir      string
	Say      func(format string, args ...any)
	Patience time.Duration // for setting up and for one upgrade; 0: a minute
	Profile  string        // folder for CPU profiles of the last turn
}

// Move is the result; all times are medians of the turns.
type Move struct {
	ID       string  `json:"id"`
	Layer    string  `json:"layer"`
	Sessions int     `json:"sessions"`
	Workers  int     `json:"workers"`
	Self     bool    `json:"self,omitempty"`
	Rest     bool    `json:"rest"`
	Turns    int     `json:"turns"`
	Rate     float64 `json:"sessions_per_second"`
	Low      float64 `json:"low"` // of the turns
	High     float64 `json:"high"`
	RawRate  float64 `json:"descriptors_per_second"` // SCM_RIGHTS alone, in batches of 64
	StallP50 float64 `json:"stall_p50_ms"`           // FREEZE to RESUME
	StallP99 float64 `json:"stall_p99_ms"`
	StallMax float64 `json:"stall_max_ms"`
	// CPU is processor time for a session, in µs, by process.
	CPU map[string]float64 `json:"cpu_us_per_session"`
	// Load is the machine's load average before it began: what other programs did.
	Load float64 `json:"load_average_before"`
	Run  Run     `json:"run"`
}

// MeasureMove runs one unit through all turns. At the end every client has a byte
// echoed: a session that was lost would show.
func MeasureMove(o MoveOptions) (m Move, err error) {
	if o.Self {
		return MeasureSelfMove(o)
	}
	if o.Patience == 0 {
		o.Patience = time.Minute
	}
	m = Move{ID: o.ID(), Layer: o.Layer, Sessions: o.Sessions, Workers: o.Workers, Rest: o.Rest, Turns: o.Turns, Run: thisRun()}
	m.Load = loadAverage()
	self, err := os.Executable()
	if err != nil {
		return m, err
	}
	rest := "0"
	if o.Rest {
		rest = "1"
	}
	u, err := visor.Start(visor.Options{Program: self, Dir: o.Dir, Args: []string{}, Env: []string{envRole + "=move-unit",
		envLayer + "=" + o.Layer, envRest + "=" + rest, envProfile + "=" + o.Profile, envWorkers + "=" + strconv.Itoa(o.Workers)}})
	if err != nil {
		return m, err
	}
	defer u.Kill()
	defer func() {
		if err != nil {
			err = fmt.Errorf("moves: %w\n%s", err, u.LogTail())
		}
	}()
	clients, err := startRole("thin-clients", u.Addr)
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, clients.stop()) }()
	began := time.Now()
	if err := o.inParts(clients, "open", openTogether, "sessions are open"); err != nil {
		return m, err
	}
	if err := o.settled(u); err != nil {
		return m, err
	}
	o.Say("%d sessions are there after %.1f s", o.Sessions, time.Since(began).Seconds())
	var c collected
	var stalls [3][]float64
	for i := range o.Turns {
		if o.Rest {
			time.Sleep(4 * restAfter) // nothing tells from outside that sessions are at rest
		}
		raw, err := rawRate(o.Sessions)
		if err != nil {
			return m, err
		}
		t, err := o.turn(u, o.Profile != "" && i == 0, o.Profile != "" && i == o.Turns-1)
		if err != nil {
			return m, err
		}
		rate := c.add(o.Sessions, t.took, raw, t.cpu)
		for k, v := range []float64{t.report.StallP50, t.report.StallP99, t.report.StallMax} {
			stalls[k] = append(stalls[k], v)
		}
		o.Say("  %.0f sessions a second, bare descriptors %.0f; stall p50 %.1f p99 %.1f max %.1f ms; CPU a session (µs): %s",
			rate, raw, t.report.StallP50, t.report.StallP99, t.report.StallMax, describeCPU(t.cpu, o.Sessions))
	}
	if err := o.inParts(clients, "echo", 1000, "clients have had their echo"); err != nil {
		return m, err
	}
	c.into(&m)
	m.StallP50, m.StallP99, m.StallMax = quantile(stalls[0], .5), quantile(stalls[1], .5), quantile(stalls[2], .5)
	return m, nil
}

// sayEvery is how often somebody who waits hears how far it has come.
const sayEvery = 5 * time.Second

// inParts has the clients do something, so many at a time.
func (o MoveOptions) inParts(clients *child, order string, part int, done string) error {
	said := time.Now()
	for n := 0; n < o.Sessions; {
		n = min(n+part, o.Sessions)
		if _, err := clients.order("%s %d", order, n); err != nil {
			return fmt.Errorf("%s up to client %d: %w", order, n, err)
		}
		if time.Since(said) >= sayEvery {
			said = time.Now()
			o.Say("  %d %s", n, done)
		}
	}
	return nil
}

// collected is what the turns of a measurement gave.
type collected struct {
	rates, raws []float64
	cpus        map[string][]float64 // µs a session
}

func (c *collected) add(sessions int, took time.Duration, raw float64, cpu map[string]time.Duration) (rate float64) {
	rate = float64(sessions) / took.Seconds()
	c.rates, c.raws = append(c.rates, rate), append(c.raws, raw)
	if c.cpus == nil {
		c.cpus = map[string][]float64{}
	}
	for name, d := range cpu {
		c.cpus[name] = append(c.cpus[name], float64(d.Nanoseconds())/1000/float64(sessions))
	}
	return rate
}

func (c *collected) into(m *Move) {
	m.Rate, m.Low, m.High = quantile(c.rates, .5), slices.Min(c.rates), slices.Max(c.rates)
	m.RawRate = quantile(c.raws, .5)
	m.CPU = map[string]float64{}
	for name, list := range c.cpus {
		m.CPU[name] = quantile(list, .5)
	}
}

// HostMoves are the measurements on this machine.
func HostMoves() []MoveOptions {
	at := func(rest bool, sessions, turns int) MoveOptions {
		return MoveOptions{Layer: "software", Sessions: sessions, Workers: 1, Rest: rest, Turns: turns}
	}
	self := func(sessions, turns int) MoveOptions {
		return MoveOptions{Layer: "software", Sessions: sessions, Self: true, Rest: true, Turns: turns}
	}
	return []MoveOptions{at(true, 1000, 11), at(true, 10000, 7), at(false, 10000, 5), self(1000, 11), self(10000, 7)}
}

// GuestMoves are those in a guest: what a session takes with ten thousand and with a
// hundred thousand, over several workers.
func GuestMoves() []MoveOptions {
	at := func(sessions, turns int) MoveOptions {
		return MoveOptions{Layer: "kernel", Sessions: sessions, Workers: 4, Rest: true, Turns: turns, Patience: 20 * time.Minute}
	}
	return []MoveOptions{at(10000, 2), at(20000, 1), at(50000, 1), at(100000, 1)}
}

// ID names the measurement.
func (o MoveOptions) ID() string {
	what := "handlers"
	if o.Rest {
		what = "rest"
	}
	if o.Self {
		return fmt.Sprintf("move-self-%s-%d", what, o.Sessions)
	}
	return fmt.Sprintf("move-%s-%s-%d", o.Layer, what, o.Sessions)
}

// settled waits until workers of one generation own all sessions.
func (o MoveOptions) settled(u *visor.Unit) error {
	_, err := u.Await(o.Patience, fmt.Sprintf("%d sessions", o.Sessions), func(st *admin.Status) bool {
		return visor.Settled(st) && st.Sessions.Total == o.Sessions && st.Sessions.Parked == 0
	})
	return err
}

// moveTurn is one upgrade.
type moveTurn struct {
	took   time.Duration // from the first FREEZE to the last RELEASE
	report admin.PoolReport
	cpu    map[string]time.Duration
}

// turn moves everything once. Profiles of keeper and supervisor begin or end with it.
func (o MoveOptions) turn(u *visor.Unit, begin, end bool) (t moveTurn, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), o.Patience)
	defer cancel()
	st, err := u.Admin.Status(ctx)
	if err != nil {
		return t, err
	}
	lasting := map[string]int{"keeper": u.KeeperPID(), "supervisor": st.Supervisor.PID}
	old := visor.WorkerPIDs(st)
	if begin {
		_ = syscall.Kill(lasting["keeper"], syscall.SIGUSR1)
		_ = syscall.Kill(lasting["supervisor"], syscall.SIGUSR1)
	}
	var (
		first  int64
		before map[int]time.Duration
		perr   error
	)
	var said time.Time
	r, err := u.Admin.Upgrade(ctx, admin.UpgradeRequest{Wait: o.Patience}, func(p admin.Progress) {
		if time.Since(said) >= sayEvery {
			said = time.Now()
			o.Say("  %s", p.Text)
		}
		if strings.Contains(p.Text, ", moving ") {
			first = sys.Monotonic()
			before, perr = cpuOf(append([]int{lasting["keeper"], lasting["supervisor"]}, o.workers(u, nil)...))
		}
	})
	if err = errors.Join(err, perr); err != nil {
		return t, err
	}
	if first == 0 || len(r.Pools) != 1 || r.Outcome != admin.OutcomeMoved || r.Pools[0].Moved != o.Sessions {
		return t, fmt.Errorf("an upgrade of %d sessions ended otherwise: %+v", o.Sessions, r)
	}
	t.report = r.Pools[0]
	if end {
		_ = syscall.Kill(lasting["keeper"], syscall.SIGUSR2)
		_ = syscall.Kill(lasting["supervisor"], syscall.SIGUSR2)
	}
	after, err := cpuOf(append([]int{lasting["keeper"], lasting["supervisor"]}, t.report.NewPIDs...))
	if err != nil {
		return t, err
	}
	t.cpu = map[string]time.Duration{"keeper": after[lasting["keeper"]] - before[lasting["keeper"]],
		"supervisor": after[lasting["supervisor"]] - before[lasting["supervisor"]]}
	for _, pid := range t.report.NewPIDs {
		t.cpu["new worker"] += after[pid] - before[pid]
	}
	ends, err := o.released(u, old)
	if err != nil {
		return t, err
	}
	for pid, e := range ends {
		t.took = max(t.took, time.Duration(e.at-first))
		t.cpu["old worker"] += e.cpu - before[pid]
	}
	return t, o.settled(u)
}

// workers are the pids of all workers, also those that start.
func (o MoveOptions) workers(u *visor.Unit, pids []int) []int {
	ctx, cancel := context.WithTimeout(context.Background(), o.Patience)
	defer cancel()
	if st, err := u.Admin.Status(ctx); err == nil {
		pids = append(pids, visor.WorkerPIDs(st)...)
	}
	return pids
}

func cpuOf(pids []int) (map[int]time.Duration, error) {
	m := map[int]time.Duration{}
	for _, pid := range pids {
		d, err := sys.ProcessCPU(pid)
		if err != nil {
			return nil, err
		}
		m[pid] = d
	}
	return m, nil
}

// released is what workers print at their end: when they had given everything away,
// and what processor time they had used.
type release struct {
	at  int64
	cpu time.Duration
}

func (o MoveOptions) released(u *visor.Unit, pids []int) (map[int]release, error) {
	found := map[int]release{}
	err := u.AwaitLog(o.Patience, "that the old workers have ended", func(log string) bool {
		for s := bufio.NewScanner(strings.NewReader(log)); s.Scan(); {
			_, text, ok := strings.Cut(s.Text(), releasedMark)
			var pid int
			var r release
			if !ok {
				continue
			}
			if _, err := fmt.Sscan(strings.Trim(text, `"`), &pid, &r.at, &r.cpu); err == nil && slices.Contains(pids, pid) {
				found[pid] = r
			}
		}
		return len(found) == len(pids)
	})
	return found, err
}

// loadAverage is that of the last minute, 0 when it is not known.
func loadAverage() (v float64) {
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		_, _ = fmt.Sscan(string(b), &v)
	}
	return v
}

func describeCPU(cpu map[string]time.Duration, sessions int) string {
	var parts []string
	for _, name := range sorted(cpu) {
		parts = append(parts, fmt.Sprintf("%s %.1f", name, float64(cpu[name].Nanoseconds())/1000/float64(sessions)))
	}
	return strings.Join(parts, ", ")
}
