package e2e

import (
	"crypto/tls"
	"encoding/json"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
	"github.com/ktlsvisor/ktlsvisor/internal/load"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// The operator changes the keys of sessions whose clients, stock crypto/tls, check every
// byte and never stop sending: no connection is lost, and no byte is wrong.
func operatorChangesKeys(t *testing.T, u *unit) {
	t.Helper()
	const young, old = 10, 3
	fleets := []*fleet{
		u.fleet(young, func(o *load.Options) { o.Version = tls.VersionTLS13 }, busy),
		u.fleet(old, func(o *load.Options) { o.Version = tls.VersionTLS12 }, busy),
	}
	st := u.settled(young + old)
	kernel := st.Sessions.Kernel > 0
	able := young
	if kernel && !st.Kernel.Rekey {
		able = 0
	}
	rekey := func(args ...string) {
		t.Helper()
		for _, f := range fleets {
			f.advance()
		}
		before := u.status().Counters.KeyUpdates
		var rep admin.RekeyReport
		r := u.run(0, append([]string{"rekey", "--json"}, args...)...)
		if err := json.Unmarshal([]byte(r.Stdout), &rep); err != nil {
			t.Fatalf("%v: %s", err, r)
		}
		if rep.Updated != able || rep.UnsupportedCount != young+old-able || len(rep.Unsupported) != rep.UnsupportedCount || rep.FailedCount+rep.Ended != 0 {
			t.Errorf("rekey %v: %+v", args, rep)
		}
		if n := u.status().Counters.KeyUpdates - before; kernel && n < uint64(able) {
			t.Errorf("rekey %v: %d keys changed in the kernel, want %d", args, n, able)
		}
	}
	rekey()
	rekey("--pool", "default", "--request")
	u.run(0, "upgrade") // the new workers have the new keys
	rekey()
	u.run(0, "upgrade", "--supervisor")
	rekey("--request")
	for _, f := range fleets {
		f.advance()
		if err := f.stop().Err(); err != nil {
			t.Error(err)
		}
	}
	st = u.await("all sessions to have ended", func(st *admin.Status) bool { return st.Sessions.Total == 0 })
	if c := st.Counters; c.ClosedByPeer != young+old || c.Lost+c.Interrupted != 0 {
		t.Errorf("counters %+v, reasons %v", c, st.Reasons)
	}
}

func TestOperatorChangesKeys(t *testing.T) {
	operatorChangesKeys(t, start(t, visor.Options{Args: []string{"-c", configFile(t, []string{echo(t)}, "", `offload = "software"`)}}))
}

func TestKernelLayerOperatorChangesKeys(t *testing.T) {
	guest.NeedKernelTLS(t)
	operatorChangesKeys(t, start(t, visor.Options{}))
}
