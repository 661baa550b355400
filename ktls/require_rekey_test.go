package ktls

import (
	"context"
	"crypto/tls"
	"errors"
	"strings"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// What RequireRekey makes of a kernel.
func TestKernelsThatChangeKeys(t *testing.T) {
	old, young := probe(fakeKernel{release: "6.12.0"}.edge()), probe(fakeKernel{release: "6.14.0", rekey: true}.edge())
	for _, tc := range []struct {
		name    string
		caps    *Capabilities
		version uint16
		want    bool
	}{
		{"old, 1.3", old, tls.VersionTLS13, false},
		{"old, 1.2", old, tls.VersionTLS12, true},
		{"new, 1.3", young, tls.VersionTLS13, true},
		{"new, 1.2", young, tls.VersionTLS12, true},
	} {
		ok, reason := tc.caps.changesKeys(tc.version)
		if ok != tc.want || ok == (reason != "") || !ok && !strings.Contains(reason, "kernel >= 6.14") {
			t.Errorf("%s: %v, %q", tc.name, ok, reason)
		}
	}
}

// With RequireRekey a session is in the kernel only where a KeyUpdate is not its end.
func TestRequireRekey(t *testing.T) {
	guest.NeedKernelTLS(t)
	for _, tc := range []struct {
		name    string
		version uint16
		kernel  bool
	}{
		{"TLS 1.3", tls.VersionTLS13, KeyChanging()},
		{"TLS 1.2", tls.VersionTLS12, true},
	} {
		client := testClientTLS(t)
		client.MinVersion, client.MaxVersion = tc.version, tc.version
		t.Run(tc.name+", auto", func(t *testing.T) {
			conn, peer := connect(t, &Config{TLS: testServerTLS(t), RequireRekey: true}, client)
			want := LayerSoftware
			if tc.kernel {
				want = LayerKernel
			}
			if conn.Layer() != want || (conn.LayerReason() == "") != tc.kernel {
				t.Errorf("layer %v, reason %q; want %v", conn.Layer(), conn.LayerReason(), want)
			}
			exchange(t, conn, peer) // also with the ULP that was attached and not used
			if tc.version != tls.VersionTLS13 {
				return
			}
			if err := conn.KeyUpdate(false); err != nil {
				t.Errorf("KeyUpdate: %v", err)
			}
			exchange(t, conn, peer)
		})
		t.Run(tc.name+", kernel", func(t *testing.T) {
			c, s := tcpPair(t)
			go func() { _ = tls.Client(c, client).Handshake() }()
			conn, err := Server(context.Background(), s, &Config{TLS: testServerTLS(t), Mode: ModeKernel, RequireRekey: true})
			if err == nil {
				_ = conn.Close()
			}
			switch {
			case tc.kernel && err != nil:
				t.Errorf("refused: %v", err)
			case !tc.kernel && (!errors.Is(err, ErrNoKernelTLS) || !strings.Contains(err.Error(), "cannot change keys")):
				t.Errorf("got %v, want ErrNoKernelTLS and the reason", err)
			}
		})
	}
}
