package e2e

import (
	"crypto/tls"
	"encoding/json"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/demo"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
	"github.com/ktlsvisor/ktlsvisor/internal/load"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// The promise in the kernel layer, on a real kernel with kernel TLS: an upgrade, a
// kill -9 of a worker, an upgrade of the supervisor and a kill -9 of the
// supervisor, and no connection is lost. What a killed worker had read and not yet
// answered is its application's loss, and counted as interrupted.
func TestKernelLayerOutlivesEveryProcess(t *testing.T) {
	guest.NeedKernelTLS(t)
	const each = 15 // clients of each version; a guest is slow
	const clients = 2 * each
	u := start(t, visor.Options{})
	fleets := []*fleet{
		u.fleet(each, func(o *load.Options) { o.Version = tls.VersionTLS13 }),
		u.fleet(each, func(o *load.Options) { o.Version = tls.VersionTLS12 }),
	}
	inKernel := func(what string) *admin.Status {
		t.Helper()
		st := u.settled(clients)
		if st.Sessions.Kernel != clients {
			t.Errorf("%s: %+v, want all in the kernel layer (kernel: %+v)", what, st.Sessions, st.Kernel)
			list, err := u.Admin.Sessions(t.Context())
			for _, s := range list {
				if s.Layer != "kernel" {
					t.Errorf("%s %s %s in the %s layer: %s (%v)", s.ID, s.Version, s.Suite, s.Layer, s.Reason, err)
					break
				}
			}
		}
		return st
	}
	phase := func(name string, mayInterrupt bool) {
		t.Helper()
		for _, f := range fleets {
			f.advance()
			if err := f.Snapshot().Err(); err != nil {
				t.Fatalf("before %q: %v", name, err)
			}
			f.Phase(name, mayInterrupt)
		}
	}
	st := inKernel("at first")
	if !st.Kernel.KTLS {
		t.Errorf("the status says of the kernel: %+v", st.Kernel)
	}

	phase("upgrade", false)
	before := visor.WorkerPIDs(st)
	u.run(0, "upgrade")
	st = inKernel("after the upgrade")
	allNew(t, before, visor.WorkerPIDs(st))

	phase("kill -9 of a worker", true)
	victim := st.Pools[0].Workers[0]
	if victim.Sessions == 0 {
		t.Fatalf("nothing to lose: %s", visor.Describe(st))
	}
	if err := u.KillProcess(victim.PID); err != nil {
		t.Fatal(err)
	}
	u.await("another worker", func(st *admin.Status) bool {
		return visor.Settled(st) && len(st.Pools[0].Workers) == 2 && !contains(visor.WorkerPIDs(st), victim.PID)
	})
	st = inKernel("after the kill of a worker")
	if c := st.Counters; c.Interrupted != uint64(victim.Sessions) || c.Lost != 0 {
		t.Errorf("counters %+v, want %d interrupted and 0 lost", c, victim.Sessions)
	}

	phase("upgrade of the supervisor", false)
	old := st.Supervisor.PID
	u.run(0, "upgrade", "--supervisor")
	st = inKernel("after the upgrade of the supervisor")
	if st.Supervisor.PID == old {
		t.Errorf("the supervisor still has pid %d", old)
	}

	phase("kill -9 of the supervisor", false)
	_, _, back := u.killSupervisor()
	t.Logf("the next supervisor answered %v after the kill", back)
	st = inKernel("after the kill of the supervisor")

	phase("another upgrade", false)
	before = visor.WorkerPIDs(st)
	u.run(0, "upgrade")
	st = inKernel("after all")
	allNew(t, before, visor.WorkerPIDs(st))

	for _, f := range fleets {
		f.advance()
		r := f.stop()
		if err := r.Err(); err != nil {
			t.Errorf("%v; reasons: %v", err, r.LostReasons)
		}
		for _, p := range r.Phases {
			if p.Name == advancing {
				continue
			}
			t.Logf("%-26s lost %d, interrupted %d, wrong bytes %d, longest stall %v (own pause %v)",
				p.Name, p.Lost, p.Interrupted, p.WrongBytes, p.LongestStall, p.ClientPause)
		}
	}
	st = u.await("all sessions to have ended", func(st *admin.Status) bool { return st.Sessions.Total == 0 })
	if c := st.Counters; c.Lost+c.Returned+c.ClosedByOwner+c.ClosedUnknown != 0 || c.ClosedByPeer != clients || c.Accepted != clients {
		t.Errorf("counters %+v", c)
	}
}

func contains(pids []int, pid int) bool {
	for _, p := range pids {
		if p == pid {
			return true
		}
	}
	return false
}

// The demo leaves nothing out where the kernel has TLS.
func TestKernelLayerDemo(t *testing.T) {
	guest.NeedKernelTLS(t)
	r := visor.Run(ktlsvisor(t), "demo", "--sessions", "20", "--json")
	if r.Code != 0 {
		t.Fatalf("ktlsvisor demo: %s", r)
	}
	var rep demo.Report
	if err := json.Unmarshal([]byte(r.Stdout), &rep); err != nil {
		t.Fatalf("%v: %s", err, r)
	}
	found := false
	for _, s := range rep.Steps {
		found = found || s.Name == "kill -9 a worker"
		if s.Lost > 0 || s.WrongBytes > 0 {
			t.Errorf("step %s: %+v", s.Name, s)
		}
	}
	if !found {
		t.Errorf("the demo killed no worker: %+v", rep.Steps)
	}
	t.Log(r.Stderr)
}
