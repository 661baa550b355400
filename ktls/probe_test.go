package ktls

import (
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// fakeKernel plays a kernel: connections are real, TLS on them is not.
type fakeKernel struct {
	release   string
	pairErr   error
	attachErr error
	module    moduleFile
	software  bool
	rekey     bool
	setErr    func(version, cipher uint16, dir sys.TLSDirection) error
	carryErr  error
	copyErr   error
	readErr   error
}

func (f fakeKernel) edge() kernelEdge {
	type key struct {
		c   *net.TCPConn
		dir sys.TLSDirection
	}
	has := map[key][4]byte{}
	return kernelEdge{
		release: f.release,
		pair: func() (a, b *net.TCPConn, err error) {
			if f.pairErr != nil {
				return nil, nil, f.pairErr
			}
			return loopbackPair()
		},
		attach: func(*net.TCPConn) error { return f.attachErr },
		setKeys: func(c *net.TCPConn, dir sys.TLSDirection, info []byte) error {
			if len(info) < 4 {
				return sys.EINVAL
			}
			version, cipher := binary.NativeEndian.Uint16(info), binary.NativeEndian.Uint16(info[2:])
			if _, again := has[key{c, dir}]; again && !f.rekey {
				return sys.EBUSY
			}
			if f.setErr != nil {
				if err := f.setErr(version, cipher, dir); err != nil {
					return err
				}
			}
			has[key{c, dir}] = [4]byte(info[:4])
			return nil
		},
		hasKeys: func(c *net.TCPConn, dir sys.TLSDirection) (version, cipher uint16, err error) {
			h := has[key{c, dir}]
			return binary.NativeEndian.Uint16(h[:]), binary.NativeEndian.Uint16(h[2:]), f.readErr
		},
		carries:    func(_, _ *net.TCPConn) error { return f.carryErr },
		sendsFile:  func(_, _ *net.TCPConn) error { return f.copyErr },
		splices:    func(_, _ *net.TCPConn) error { return f.copyErr },
		moduleFile: func(string) moduleFile { return f.module },
		softwareOK: f.software,
	}
}

func TestProbeJudgesKernels(t *testing.T) {
	const gcm12 = tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256
	for _, tc := range []struct {
		name     string
		kernel   fakeKernel
		ktls     bool
		rekey    bool
		certain  bool
		supports map[[2]uint16]string // reason, "" when supported
	}{
		{
			name: "7.3, everything", kernel: fakeKernel{release: "7.3.4+deb13-cloud-amd64", rekey: true, software: true},
			ktls: true, rekey: true, certain: true,
			supports: map[[2]uint16]string{
				{v13, gcm}: "", {v13, tls.TLS_CHACHA20_POLY1305_SHA256}: "", {tls.VersionTLS12, gcm12}: "",
				{tls.VersionTLS12, tls.TLS_RSA_WITH_AES_128_CBC_SHA}: "kernel TLS has no TLS_RSA_WITH_AES_128_CBC_SHA with TLS 1.2",
				{v13, gcm12}: "kernel TLS has no TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 with TLS 1.3",
			},
		},
		{
			name: "6.12, no rekey", kernel: fakeKernel{release: "6.12.1", software: true},
			ktls: true, certain: true,
			supports: map[[2]uint16]string{{v13, gcm}: ""},
		},
		{
			name: "6.0 takes keys and is not trusted with TLS 1.3", kernel: fakeKernel{release: "6.0.12", rekey: true, software: true},
			ktls: true, certain: true,
			supports: map[[2]uint16]string{
				{v13, gcm}: "TLS 1.3 is used from Linux 6.1 on (kernel >= 6.1)", {tls.VersionTLS12, gcm12}: "",
			},
		},
		{
			name: "5.10", kernel: fakeKernel{release: "5.10.0-30-amd64", software: true, setErr: func(_, cipher uint16, _ sys.TLSDirection) error {
				if cipher == kernelChaCha20.id {
					return sys.EINVAL
				}
				return nil
			}},
			ktls: true, certain: true,
			supports: map[[2]uint16]string{
				{v13, gcm}:                "the record parser before Linux 6.0 is known to go wrong with TLS 1.3 (kernel >= 6.1)",
				{tls.VersionTLS12, gcm12}: "",
				{tls.VersionTLS12, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256}: "the kernel does not take ChaCha20-Poly1305 keys for send: invalid argument (kernel >= 5.11)",
			},
		},
		{
			name: "sends only", kernel: fakeKernel{release: "6.6.0", software: true, setErr: func(_, _ uint16, dir sys.TLSDirection) error {
				if dir == sys.TLSReceive {
					return sys.ENOPROTOOPT
				}
				return nil
			}},
			certain:  true,
			supports: map[[2]uint16]string{{tls.VersionTLS12, gcm12}: "the kernel does not take AES-128-GCM keys for receive: protocol not available (kernel >= 4.17)"},
		},
		{
			name: "a cipher's module is missing", kernel: fakeKernel{release: "6.12.1", software: true, setErr: func(_, cipher uint16, _ sys.TLSDirection) error {
				if cipher == kernelChaCha20.id {
					return sys.ENOENT
				}
				return nil
			}},
			ktls: true, certain: true,
			supports: map[[2]uint16]string{
				{v13, gcm}:                              "",
				{v13, tls.TLS_CHACHA20_POLY1305_SHA256}: "the kernel's crypto has no ChaCha20-Poly1305 (modprobe chacha20poly1305)",
			},
		},
		{
			name: "module not loaded", kernel: fakeKernel{release: "6.12.1", software: true, attachErr: fmt.Errorf("attach: %w", sys.ENOENT), module: moduleThere},
			supports: map[[2]uint16]string{{v13, gcm}: "the tls module is not loaded (modprobe tls)"},
		},
		{
			name: "built without", kernel: fakeKernel{release: "6.12.1", software: true, attachErr: sys.ENOENT, module: moduleNone},
			supports: map[[2]uint16]string{{v13, gcm}: "this kernel was built without TLS (CONFIG_TLS) (a kernel with CONFIG_TLS=m or y)"},
		},
		{
			name: "in a container", kernel: fakeKernel{release: "6.12.1", software: true, attachErr: sys.ENOENT},
			supports: map[[2]uint16]string{{v13, gcm}: "the kernel has no tls module loaded (modprobe tls on the host; a kernel with CONFIG_TLS if there is no such module)"},
		},
		{
			name: "seccomp", kernel: fakeKernel{release: "6.12.1", software: true, attachErr: sys.EPERM},
			supports: map[[2]uint16]string{{v13, gcm}: "not permitted: operation not permitted (allow setsockopt TCP_ULP in the seccomp filter)"},
		},
		{
			name: "out of descriptors", kernel: fakeKernel{release: "6.12.1", software: true, pairErr: syscall.EMFILE},
			supports: map[[2]uint16]string{{v13, gcm}: "no connection to try it on: too many open files"},
		},
		{
			name: "out of memory", kernel: fakeKernel{release: "6.12.1", software: true, setErr: func(uint16, uint16, sys.TLSDirection) error { return sys.ENOMEM }},
			supports: map[[2]uint16]string{{v13, gcm}: "cannot allocate memory"},
		},
		{
			name: "a record does not come through", kernel: fakeKernel{release: "6.12.1", software: true, carryErr: errors.New("type 0")},
			certain:  true,
			supports: map[[2]uint16]string{{v13, gcm}: "keys were taken and a record did not come through: type 0 (another kernel)"},
		},
		{
			name: "a record is late", kernel: fakeKernel{release: "6.12.1", software: true, carryErr: os.ErrDeadlineExceeded},
			supports: map[[2]uint16]string{{v13, gcm}: "a record did not arrive in time"},
		},
		{
			name: "unreadable release", kernel: fakeKernel{release: "next", software: true},
			supports: map[[2]uint16]string{{v13, gcm}: `kernel release "next" cannot be read`},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			caps := probe(tc.kernel.edge())
			if caps.KernelTLS != tc.ktls || caps.Rekey != tc.rekey || caps.certain() != tc.certain {
				t.Errorf("ktls %v, rekey %v, certain %v; expected %v, %v, %v\n%s",
					caps.KernelTLS, caps.Rekey, caps.certain(), tc.ktls, tc.rekey, tc.certain, tableText(caps))
			}
			for s, want := range tc.supports {
				ok, reason := caps.Supports(s[0], s[1])
				if ok != (want == "") || reason != want {
					t.Errorf("%s: %v, %q; expected %q", suiteTestName(s[0], s[1]), ok, reason, want)
				}
			}
			for _, k := range caps.Checks {
				if (k.Status == StatusSupported) != (k.Reason == "") {
					t.Errorf("%+v: a reason goes with everything that is not supported, and with nothing else", k)
				}
				if k.Status == StatusUnsupported && k.Remedy == "" && k.Feature != FeatureSplice {
					t.Errorf("%+v: nothing to do about it", k)
				}
			}
		})
	}
}

// fips140=only takes the software layer away, which an operator must see.
func TestProbeSoftwareLayer(t *testing.T) {
	k := probe(fakeKernel{release: "6.12.1"}.edge()).find(FeatureSoftware, "", "", "")
	if k == nil || k.Status != StatusUnsupported || !strings.Contains(k.Reason, "fips140=only") || k.Remedy == "" {
		t.Errorf("%+v", k)
	}
	k = Probe().find(FeatureSoftware, "", "", "")
	if k == nil || (k.Status == StatusSupported) != (softwareWorks() == nil) {
		t.Errorf("the probe says %+v, the software layer says %v", k, softwareWorks())
	}
}

// What could not be told is asked again; what is certain is not.
func TestProbeCache(t *testing.T) {
	asked := 0
	kernel := fakeKernel{release: "6.12.1", software: true, pairErr: syscall.EMFILE}
	p := prober{kernel: func() kernelEdge { asked++; return kernel.edge() }}
	for want := 1; want <= 2; want++ {
		if caps := p.ask(0); caps.KernelTLS || asked != want {
			t.Fatalf("ktls %v after %d probes, expected %d", caps.KernelTLS, asked, want)
		}
	}
	if p.ask(probeAgain); asked != 2 {
		t.Errorf("a handshake asked again at once: %d probes", asked)
	}
	kernel = fakeKernel{release: "6.12.1", software: true, attachErr: sys.ENOENT}
	if p.ask(0); asked != 3 {
		t.Fatalf("%d probes", asked)
	}
	kernel.attachErr = nil // modprobe tls
	for range 3 {
		if caps := p.ask(0); !caps.KernelTLS || asked != 4 {
			t.Fatalf("ktls %v after %d probes, expected 4", caps.KernelTLS, asked)
		}
	}
}

// The JSON is part of the command line's contract: fields may be added, none
// renamed.
func TestCapabilitiesJSON(t *testing.T) {
	caps := probe(fakeKernel{release: "6.12.1", software: true}.edge())
	b, err := json.Marshal(caps)
	if err != nil {
		t.Fatal(err)
	}
	var back Capabilities
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(*caps, back); d != "" {
		t.Error(d)
	}
	for _, want := range []string{
		`"release":"6.12.1","ktls":true,"rekey":false,"checks":[{"feature":"kernel TLS","status":"supported"}`,
		`{"feature":"offload","version":"TLS 1.3","suite":"AES-128-GCM","direction":"send","status":"supported"}`,
		`"direction":"receive","status":"unsupported","reason":"a key can be set only once, so a peer's KeyUpdate ends the session","remedy":"kernel \u003e= 6.14"}`,
	} {
		if !strings.Contains(string(b), want) {
			t.Errorf("%s\nhas no %s", b, want)
		}
	}
	if err := json.Unmarshal([]byte(`{"checks":[{"status":"maybe"}]}`), &back); err == nil {
		t.Error("an unknown status was read")
	}
	table := caps.Table()
	if len(table) != len(caps.Checks)+1 {
		t.Fatalf("%d rows for %d checks", len(table), len(caps.Checks))
	}
	for _, row := range table {
		if len(row) != len(table[0]) || slices.Contains(row, "") {
			t.Errorf("row %q", row)
		}
	}
}

func TestParseRelease(t *testing.T) {
	for _, tc := range []struct {
		release      string
		major, minor int
		ok           bool
	}{
		{"6.1.0-56-cloud-amd64", 6, 1, true},
		{"7.3.4+deb13-cloud-amd64", 7, 3, true},
		{"6.12", 6, 12, true},
		{"6.12-rc1", 6, 12, true},
		{"6", 0, 0, false},
		{"6.x", 0, 0, false},
		{"unknown", 0, 0, false},
		{"", 0, 0, false},
	} {
		major, minor, ok := parseRelease(tc.release)
		if ok != tc.ok || ok && (major != tc.major || minor != tc.minor) {
			t.Errorf("%q: %d.%d, %v", tc.release, major, minor, ok)
		}
	}
}

// On a real kernel: everything this package carries is there from 6.1 on, and
// rekey from 6.14 on.
func TestKernelProbe(t *testing.T) {
	guest.NeedKernelTLS(t)
	caps := Probe()
	if !caps.certain() {
		t.Error("not certain")
	}
	if Probe() != caps {
		t.Error("asked twice")
	}
	major, minor, ok := parseRelease(caps.Release)
	if !ok {
		t.Fatalf("release %q", caps.Release)
	}
	wantRekey := major > 6 || major == 6 && minor >= 14
	if !caps.KernelTLS || caps.Rekey != wantRekey {
		t.Errorf("ktls %v, rekey %v", caps.KernelTLS, caps.Rekey)
	}
	for _, k := range caps.Checks {
		want := StatusSupported
		if k.Feature == FeatureRekey && !wantRekey || k.Feature == FeatureSplice && k.Direction == DirectionReceive {
			want = StatusUnsupported
		}
		if k.Status != want {
			t.Errorf("%+v, expected %s", k, want)
		}
	}
	for _, tc := range testSuites {
		if ok, reason := supportsKernel(tc.version, tc.suite); !ok {
			t.Errorf("%s: %s", suiteTestName(tc.version, tc.suite), reason)
		}
	}
	if ok, reason := kernelPossible(); !ok {
		t.Error(reason)
	}
	t.Log("\n" + tableText(caps))
}

// On a machine without kernel TLS every question gets an answer with a reason.
func TestProbeHere(t *testing.T) {
	caps := Probe()
	if caps.Release != sys.KernelRelease() || len(caps.Checks) < 2+2*len(testSuites) {
		t.Errorf("release %q, %d checks", caps.Release, len(caps.Checks))
	}
	for _, tc := range testSuites {
		ok, reason := supportsKernel(tc.version, tc.suite)
		if ok != (reason == "") {
			t.Errorf("%v, %q", ok, reason)
		}
	}
	if ok, reason := kernelPossible(); ok != caps.KernelTLS || ok != (reason == "") {
		t.Errorf("%v, %q", ok, reason)
	}
}

func tableText(c *Capabilities) string {
	var b strings.Builder
	for _, row := range c.Table() {
		fmt.Fprintln(&b, strings.Join(row, " | "))
	}
	return b.String()
}
