package demo

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/pidfd"
)

func (d *demo) serve(_ context.Context, s *Step) error {
	s.What = fmt.Sprintf("%d clients, %d workers", d.opts.Sessions, workers)
	return nil
}

func (d *demo) upgradeWorkers(ctx context.Context, s *Step) error {
	before, err := d.client.Status(ctx)
	if err != nil {
		return err
	}
	rep, err := d.client.Upgrade(ctx, admin.UpgradeRequest{Wait: backLimit}, nil)
	if err != nil {
		return err
	}
	if rep.Outcome != admin.OutcomeMoved {
		return fmt.Errorf("the upgrade ended with exit code %d: %s", rep.Outcome, upgradeText(rep))
	}
	// The old workers are gone when nothing but new pids is left.
	old := workerPIDs(before)
	st, err := d.await(ctx, backLimit, "the old workers to end", func(st *admin.Status) bool {
		return settledWorkers(st) && !slices.ContainsFunc(workerPIDs(st), func(pid int) bool { return slices.Contains(old, pid) })
	})
	if err != nil {
		return err
	}
	s.OldPIDs, s.NewPIDs = old, workerPIDs(st)
	moved := 0
	for _, p := range rep.Pools {
		moved += p.Moved
	}
	s.What = fmt.Sprintf("pids %s -> %s, %d sessions moved", pidList(s.OldPIDs), pidList(s.NewPIDs), moved)
	return nil
}

func upgradeText(rep *admin.UpgradeReport) string {
	text := rep.Error
	for _, p := range rep.Pools {
		text += fmt.Sprintf(" pool %s: %d moved, %d stayed, %d returned, %d lost %s", p.Pool, p.Moved, p.Stayed, p.Returned, p.Lost, p.Error)
	}
	return strings.TrimSpace(text)
}

func (d *demo) upgradeSupervisor(ctx context.Context, s *Step) error {
	rep, err := d.client.UpgradeSupervisor(ctx, nil)
	if err != nil {
		return err
	}
	if rep.Outcome != admin.OutcomeMoved {
		return fmt.Errorf("it ended with exit code %d: %s", rep.Outcome, rep.Error)
	}
	if rep.NewPID == rep.OldPID {
		return fmt.Errorf("the supervisor still has pid %d", rep.OldPID)
	}
	if _, err := d.await(ctx, backLimit, "the new supervisor to answer", func(st *admin.Status) bool {
		return st.Supervisor.PID == rep.NewPID
	}); err != nil {
		return err
	}
	s.OldPIDs, s.NewPIDs = []int{rep.OldPID}, []int{rep.NewPID}
	s.What = fmt.Sprintf("pid %d -> %d", rep.OldPID, rep.NewPID)
	return nil
}

func (d *demo) killSupervisor(ctx context.Context, s *Step) error {
	old, err := d.kill(ctx, func(st *admin.Status) int { return st.Supervisor.PID })
	if err != nil {
		return err
	}
	died := time.Now()
	st, err := d.await(ctx, backLimit, "another supervisor", func(st *admin.Status) bool {
		return st.Supervisor.PID != old
	})
	if err != nil {
		return err
	}
	back := time.Since(died)
	s.BackMillis = millis(back)
	s.OldPIDs, s.NewPIDs = []int{old}, []int{st.Supervisor.PID}
	s.What = fmt.Sprintf("pid %d -> %d, back after %.0f ms", old, st.Supervisor.PID, s.BackMillis)
	return nil
}

func (d *demo) killWorker(ctx context.Context, s *Step) error {
	before, err := d.client.Status(ctx)
	if err != nil {
		return err
	}
	died := time.Now()
	old, err := d.kill(ctx, func(st *admin.Status) int {
		if pids := workerPIDs(st); len(pids) > 0 {
			return pids[0]
		}
		return 0
	})
	if err != nil {
		return err
	}
	st, err := d.await(ctx, backLimit, "another worker", func(st *admin.Status) bool {
		return settledWorkers(st) && !slices.Contains(workerPIDs(st), old) && st.Sessions.Parked == 0
	})
	if err != nil {
		return err
	}
	s.BackMillis = millis(time.Since(died))
	s.OldPIDs = []int{old}
	for _, pid := range workerPIDs(st) {
		if !slices.Contains(workerPIDs(before), pid) {
			s.NewPIDs = append(s.NewPIDs, pid)
		}
	}
	s.What = fmt.Sprintf("pid %d -> %s, back after %.0f ms", old, pidList(s.NewPIDs), s.BackMillis)
	return nil
}

// kill sends SIGKILL to the process that the status names, and returns when it is
// dead. The status is asked again with the process held by a pidfd, so that the pid
// cannot be another's by then.
func (d *demo) kill(ctx context.Context, pick func(*admin.Status) int) (pid int, err error) {
	st, err := d.client.Status(ctx)
	if err != nil {
		return 0, err
	}
	if pid = pick(st); pid <= 1 {
		return 0, errors.New("the status names no process to kill")
	}
	p, err := pidfd.Open(pid)
	if err != nil {
		return 0, err
	}
	defer p.Close()
	if st, err = d.client.Status(ctx); err != nil {
		return 0, err
	}
	if again := pick(st); again != pid {
		return 0, fmt.Errorf("the process changed from pid %d to %d before it could be killed", pid, again)
	}
	if err := p.Signal(syscall.SIGKILL); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, backLimit)
	defer cancel()
	return pid, p.Wait(ctx)
}

// settledWorkers reports that exactly the wanted number of workers is there and
// serves: none is on its way in or out.
func settledWorkers(st *admin.Status) bool {
	n := 0
	for _, p := range st.Pools {
		for _, w := range p.Workers {
			if w.State != "ready" {
				return false
			}
			n++
		}
	}
	return n == workers
}

func workerPIDs(st *admin.Status) (pids []int) {
	for _, p := range st.Pools {
		for _, w := range p.Workers {
			pids = append(pids, w.PID)
		}
	}
	slices.Sort(pids)
	return pids
}

func workersText(st *admin.Status) string {
	var s []string
	for _, p := range st.Pools {
		for _, w := range p.Workers {
			s = append(s, fmt.Sprintf("%d %s", w.PID, w.State))
		}
	}
	return strings.Join(s, ", ")
}

func layerOf(st *admin.Status) string {
	switch t := st.Sessions; {
	case t.Kernel == t.Total:
		return "kernel"
	case t.Software == t.Total:
		return "software"
	}
	return "mixed"
}

func pidList(pids []int) string {
	var s []string
	for _, p := range pids {
		s = append(s, strconv.Itoa(p))
	}
	return strings.Join(s, ",")
}

func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
