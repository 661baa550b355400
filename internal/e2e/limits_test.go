package e2e

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
)

// Workers that cannot take all sessions, because their limit of descriptors is too
// low, cost none: what they cannot take stays where it is.
func TestWorkersOutOfDescriptorsCostNothing(t *testing.T) {
	const clients = 60
	dir := tempDir(t)
	u := start(t, visor.Options{Args: []string{"-c", configFile(t, []string{role(t, "tight"), dir}, "", "")}})
	f := u.fleet(clients)
	before := visor.WorkerPIDs(u.settled(clients))
	if err := os.WriteFile(filepath.Join(dir, "tight"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := u.Run("upgrade", "--wait", "1s")
	if r.Code != 1 && r.Code != 4 {
		t.Errorf("an upgrade to workers that cannot take the sessions: %s", r)
	}
	t.Logf("upgrade: %s", r)
	st := u.await("no session between two owners", func(st *admin.Status) bool {
		return st.Sessions.Total == clients && st.Sessions.Parked == 0 && !st.Pools[0].Upgrading
	})
	if st.Counters.Lost != 0 {
		t.Errorf("counters %+v", st.Counters)
	}
	f.advance()
	if err := os.Remove(filepath.Join(dir, "tight")); err != nil {
		t.Fatal(err)
	}
	u.run(0, "upgrade")
	allNew(t, before, visor.WorkerPIDs(u.settled(clients)))
	f.intact()
	u.addsUp(clients)
}

func init() {
	// An echo worker with few descriptors, while a file says so.
	roles["tight"] = func() int {
		if _, err := os.Stat(filepath.Join(os.Args[1], "tight")); err == nil {
			lim := syscall.Rlimit{Cur: 24, Max: 24}
			if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &lim); err != nil {
				return exitOf(err)
			}
		}
		return echoWorker()
	}
}

// A worker whose channel is closed in the middle of moves that then fail, so that
// there is nobody to go back to: its parked sessions go elsewhere.
func TestOldWorkerDetachedInTheMiddleOfAMove(t *testing.T) {
	dir := tempDir(t)
	u := start(t, visor.Options{Command: []string{role(t, "echo-then-deaf"), dir}})
	f := u.fleet(bystanders)
	st := u.settled(bystanders)
	old := st.Pools[0].Workers
	if err := os.WriteFile(filepath.Join(dir, "deaf"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	running := make(chan visor.Result, 1)
	go func() { running <- u.Run("upgrade", "--wait", "25s") }()
	// One of the new workers is deaf: sessions sent there are parked with their old
	// worker, which now breaks the protocol.
	sessions := func() (moving int) {
		list, err := u.Admin.Sessions(t.Context())
		if err != nil {
			return 0
		}
		for _, s := range list {
			if s.Phase == "moving" && s.WorkerPID == old[0].PID {
				moving++
			}
		}
		return moving
	}
	eventually(t, "sessions that wait for the deaf worker", func() bool {
		st := u.status()
		return st.Pools[0].Upgrading && st.Counters.Moved > 0 && sessions() > 0
	})
	if err := u.Signal(old[0].PID, syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	t.Logf("upgrade: %s", <-running)
	st = u.await("no session between two owners", func(st *admin.Status) bool {
		return st.Sessions.Total == bystanders && st.Sessions.Parked == 0 && !st.Pools[0].Upgrading
	})
	t.Log(visor.Describe(st))
	f.intact()
}

func init() {
	// An echo worker that breaks the protocol on SIGUSR1; while a file says so, the
	// first that is started never answers ADOPT.
	roles["echo-then-deaf"] = func() int {
		if _, err := os.Stat(filepath.Join(os.Args[1], "deaf")); err == nil {
			return roles["ignores-adopt"]()
		}
		return echoThen(attacks["garbage"])
	}
}
