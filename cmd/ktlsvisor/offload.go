package main

import (
	"errors"
	"fmt"

	"github.com/ktlsvisor/ktlsvisor/internal/config"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// kernelMissing says why the kernel can carry no session at all, and what to do about
// it; ok when it can carry some.
func kernelMissing(caps *ktls.Capabilities) (reason, remedy string, ok bool) {
	if caps.KernelTLS {
		return "", "", true
	}
	reason = "the probe found no version and cipher that work both ways"
	for _, c := range caps.Checks {
		if (c.Feature == ktls.FeatureModule || c.Feature == ktls.FeatureOffload) && c.Status != ktls.StatusSupported && c.Reason != "" {
			reason, remedy = c.Reason, c.Remedy
			break
		}
	}
	if remedy == "" {
		remedy = `see "ktlsvisor doctor"`
	}
	return reason, remedy, false
}

// checkKernel finds the pools of cfg that could serve nobody on this machine, or nobody
// with TLS 1.3, because they insist on kernel TLS, or on changes of keys in it.
func checkKernel(cfg *config.Config, probe func() *ktls.Capabilities) error {
	if !cfg.NeedsKernel() {
		return nil
	}
	caps := probe()
	if reason, remedy, ok := kernelMissing(caps); !ok {
		return cfg.KernelMissing(reason, remedy)
	}
	if cfg.NeedsRekey() && !caps.Rekey {
		return cfg.RekeyMissing(rekeyMissing(caps))
	}
	return nil
}

// rekeyMissing says why the kernel cannot change keys, and what to do about it.
func rekeyMissing(caps *ktls.Capabilities) (reason, remedy string) {
	reason, remedy = "the probe did not find that it can", `see "ktlsvisor doctor"`
	for _, c := range caps.Checks {
		if c.Feature == ktls.FeatureRekey && c.Status != ktls.StatusSupported && c.Reason != "" {
			reason = c.Reason
			if c.Remedy != "" {
				remedy = "it takes " + c.Remedy
			}
			break
		}
	}
	return reason, remedy
}

// checkOffload is for commands that have --offload and no configuration.
func checkOffload(mode string, probe func() *ktls.Capabilities) error {
	switch mode {
	case config.OffloadAuto, config.OffloadSoftware:
		return nil
	case config.OffloadKernel:
		if reason, remedy, ok := kernelMissing(probe()); !ok {
			return fmt.Errorf("--offload kernel: kernel TLS is not available here: %s; %s, or use --offload auto", reason, remedy)
		}
		return nil
	}
	return usagef("--offload %q is none of auto, kernel, software", mode)
}

// wrongFlags reports whether what is wrong with a configuration is a flag's value by
// itself, and not what it names on this machine.
func wrongFlags(err error) bool {
	var all config.Errors
	if !errors.As(err, &all) {
		return false
	}
	for _, e := range all {
		switch e.Key {
		case "--listen", "--workers", "--offload", "--rekey", "--pool":
			return true
		}
	}
	return false
}
