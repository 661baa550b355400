package e2e

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
	"github.com/ktlsvisor/ktlsvisor/internal/load"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// changingKeys makes clients that send KeyUpdates all the time, every other one with
// a request for the service to do the same.
func changingKeys(every uint64) func(*load.Options) {
	return func(o *load.Options) {
		o.Version, o.KeyUpdateEvery, o.Interval = tls.VersionTLS13, every, 400*time.Millisecond
		o.Handshake = func(ctx context.Context, c *net.TCPConn, cfg *tls.Config) (load.Conn, error) {
			return ktls.Client(ctx, c, &ktls.Config{TLS: cfg, Mode: ktls.ModeSoftware})
		}
	}
}

// Clients change their keys and have the service change its own, while everything is
// upgraded and killed: no connection is lost, and no byte is wrong, which it would be
// under a wrong key.
func TestKernelLayerKeysChangeWhateverDies(t *testing.T) {
	guest.NeedKernelTLS(t)
	guest.NeedKernel(t, 6, 14, "a change of keys")
	const clients, rounds = 8, 2
	u := start(t, visor.Options{})
	f := u.fleet(clients, changingKeys(3))
	defer func() {
		if t.Failed() {
			r := f.Snapshot()
			st, err := u.Admin.Status(context.WithoutCancel(t.Context()))
			t.Logf("clients: %+v; unit: %+v, %v", r.Counters, st, err)
		}
	}()
	updates := uint64(0)
	phase := func(name string, mayInterrupt bool) {
		t.Helper()
		f.advance()
		if err := f.Snapshot().Err(); err != nil {
			t.Fatalf("before %q: %v", name, err)
		}
		st := u.settled(clients)
		if st.Sessions.Kernel != clients {
			t.Fatalf("before %q: %s", name, visor.Describe(st))
		}
		if st.Counters.KeyUpdates <= updates {
			t.Fatalf("before %q: %d keys were changed, %d before", name, st.Counters.KeyUpdates, updates)
		}
		updates = st.Counters.KeyUpdates
		f.Phase(name, mayInterrupt)
	}
	for range rounds {
		phase("upgrade", false)
		u.run(0, "upgrade")

		phase("kill -9 of a worker", true)
		victim := u.settled(clients).Pools[0].Workers[0]
		if err := u.KillProcess(victim.PID); err != nil {
			t.Fatal(err)
		}
		u.await("another worker", func(st *admin.Status) bool {
			return visor.Settled(st) && len(st.Pools[0].Workers) == 2 && !contains(visor.WorkerPIDs(st), victim.PID)
		})

		phase("upgrade of the supervisor", false)
		u.run(0, "upgrade", "--supervisor")

		phase("kill -9 of the supervisor", false)
		u.killSupervisor()
	}
	phase("quiet", false)
	f.advance()
	if err := f.stop().Err(); err != nil {
		t.Error(err)
	}
	st := u.await("all sessions to have ended", func(st *admin.Status) bool { return st.Sessions.Total == 0 })
	if c := st.Counters; c.Lost+c.ClosedByOwner+c.ClosedUnknown != 0 || c.ClosedByPeer != clients {
		t.Errorf("counters %+v, reasons %v", c, st.Reasons)
	}
	t.Logf("%d keys changed, %d sessions interrupted", st.Counters.KeyUpdates, st.Counters.Interrupted)
}

// On a kernel that cannot change keys a KeyUpdate ends the session cleanly, and the
// count says why.
func TestKernelLayerWithoutRekeyEndsCleanly(t *testing.T) {
	guest.NeedKernelTLS(t)
	u := start(t, visor.Options{})
	st := u.settled(0)
	if st.Kernel.Rekey {
		return // TestKernelLayerKeysChangeWhateverDies
	}
	var d net.Dialer
	tcp, err := d.DialContext(t.Context(), "tcp", u.Addr)
	if err != nil {
		t.Fatal(err)
	}
	c, err := ktls.Client(t.Context(), tcp.(*net.TCPConn), &ktls.Config{TLS: insecure(), Mode: ktls.ModeSoftware})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if err := c.KeyUpdate(true); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the client sees %v, want close_notify", err)
	}
	st = u.await("the session's end", func(st *admin.Status) bool { return st.Sessions.Total == 0 })
	if n := st.Reasons["key update on a kernel that cannot rekey"]; n != 1 {
		t.Errorf("reasons %v", st.Reasons)
	}
}

// rekey = "require": on a kernel that cannot change keys TLS 1.3 stays out of it, and a
// client's KeyUpdate is followed all the same; TLS 1.2 and newer kernels are unaffected.
func TestKernelLayerRequireRekey(t *testing.T) {
	guest.NeedKernelTLS(t)
	u := start(t, visor.Options{Args: []string{"-c", configFile(t, []string{echo(t)}, "", `rekey = "require"`)}})
	rekey := u.settled(0).Kernel.Rekey
	const each = 3
	f := u.fleet(each, changingKeys(2))
	old := u.fleet(each, func(o *load.Options) { o.Version = tls.VersionTLS12 })
	u.settled(2 * each)
	list, err := u.Admin.Sessions(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range list {
		kernel := rekey || s.Version == tls.VersionName(tls.VersionTLS12)
		if kernel != (s.Layer == "kernel") || kernel != (s.Reason == "") || !kernel && !strings.Contains(s.Reason, "cannot change keys") {
			t.Errorf("%s in the %s layer, reason %q; this kernel changes keys: %v", s.Version, s.Layer, s.Reason, rekey)
		}
	}
	f.advance()
	f.advance()
	old.advance()
	for _, f := range []*fleet{f, old} {
		if err := f.stop().Err(); err != nil {
			t.Error(err)
		}
	}
	st := u.await("all sessions to have ended", func(st *admin.Status) bool { return st.Sessions.Total == 0 })
	if c := st.Counters; c.ClosedByPeer != 2*each {
		t.Errorf("counters %+v, reasons %v", c, st.Reasons)
	}
}

// What handoff/PROTOCOL.md says is enough for a worker in another language: one that is
// written from it alone serves clients that change their keys, sends KeyUpdates itself,
// and moves such sessions to a worker of the SDK and back.
func TestKernelLayerKeysChangeByTheBook(t *testing.T) {
	guest.NeedKernelTLS(t)
	guest.NeedKernel(t, 6, 14, "a change of keys")
	const clients = 6
	book, sdk := role(t, "by-the-book"), echo(t)
	u := start(t, visor.Options{Command: []string{book}})
	// Often enough that something is to be written while that is not allowed.
	f := u.fleet(clients, changingKeys(20), func(o *load.Options) { o.Interval = 40 * time.Millisecond })
	phase := func(name string, mayInterrupt bool) {
		t.Helper()
		f.advance()
		if err := f.Snapshot().Err(); err != nil {
			t.Fatalf("before %q: %v", name, err)
		}
		u.settled(clients)
		f.Phase(name, mayInterrupt)
	}
	for _, next := range []string{sdk, book} {
		phase("rekey", false)
		u.run(0, "rekey", "--request")
		phase("upgrade", false)
		u.run(0, "upgrade", "--command", next)
		phase("kill -9 of the supervisor", false)
		u.killSupervisor()
		phase("kill -9 of a worker", true)
		victim := u.settled(clients).Pools[0].Workers[0]
		if err := u.KillProcess(victim.PID); err != nil {
			t.Fatal(err)
		}
		u.await("another worker", func(st *admin.Status) bool {
			return visor.Settled(st) && !contains(visor.WorkerPIDs(st), victim.PID) && len(st.Pools[0].Workers) == 2
		})
	}
	phase("quiet", false)
	f.advance()
	if err := f.stop().Err(); err != nil {
		t.Error(err)
	}
	st := u.await("all sessions to have ended", func(st *admin.Status) bool { return st.Sessions.Total == 0 })
	if c := st.Counters; c.Lost+c.ClosedByOwner+c.ClosedUnknown != 0 || c.ClosedByPeer != clients {
		t.Errorf("counters %+v, reasons %v", c, st.Reasons)
	}
	if strings.Contains(u.Log(), "protocol") {
		t.Errorf("the log speaks of the protocol:\n%s", u.Log())
	}
	t.Logf("%d keys changed, %d sessions interrupted", st.Counters.KeyUpdates, st.Counters.Interrupted)
}
