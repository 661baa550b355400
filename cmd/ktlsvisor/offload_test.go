package main

import (
	"strings"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/config"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// What a machine's kernel can do decides whether a configuration is good there.
func TestCheckKernel(t *testing.T) {
	none := &ktls.Capabilities{Checks: []ktls.Check{{Feature: ktls.FeatureModule, Status: ktls.StatusUnsupported, Reason: "no module", Remedy: "load it"}}}
	old := &ktls.Capabilities{KernelTLS: true, Checks: []ktls.Check{
		{Feature: ktls.FeatureModule, Status: ktls.StatusSupported},
		{Feature: ktls.FeatureRekey, Status: ktls.StatusUnsupported, Reason: "a key can be set only once", Remedy: "kernel >= 6.14"}}}
	young := &ktls.Capabilities{KernelTLS: true, Rekey: true}
	for _, tc := range []struct {
		offload, rekey string
		caps           *ktls.Capabilities
		want           string // in the error; "": good
	}{
		{config.OffloadAuto, config.RekeyRequire, none, ""},
		{config.OffloadAuto, config.RekeyRequire, old, ""},
		{config.OffloadSoftware, config.RekeyRequire, old, ""},
		{config.OffloadKernel, config.RekeyAuto, none, "kernel TLS is not available here: no module; load it"},
		{config.OffloadKernel, config.RekeyRequire, none, "kernel TLS is not available here: no module; load it"},
		{config.OffloadKernel, config.RekeyAuto, old, ""},
		{config.OffloadKernel, config.RekeyRequire, old, "cannot change keys: a key can be set only once; it takes kernel >= 6.14, or use "},
		{config.OffloadKernel, config.RekeyRequire, young, ""},
	} {
		cfg := config.New()
		p := config.NewPool()
		p.Offload, p.Rekey = tc.offload, tc.rekey
		cfg.Pools = []config.Pool{p}
		err := checkKernel(cfg, func() *ktls.Capabilities { return tc.caps })
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("offload %s, rekey %s, ktls %v, rekey %v: %v, want %q", tc.offload, tc.rekey, tc.caps.KernelTLS, tc.caps.Rekey, err, tc.want)
		}
	}
}
