package config

import "fmt"

// NeedsKernel reports whether a pool insists on the kernel's record layer.
func (c *Config) NeedsKernel() bool {
	for i := range c.Pools {
		if c.Pools[i].Offload == OffloadKernel {
			return true
		}
	}
	return false
}

// KernelMissing returns an Errors that names every pool which insists on kernel TLS,
// for a machine that has none: why, and what to do about it. It is nil when there is
// no such pool. Validate does not look at the machine's kernel, so that a
// configuration stays good or bad wherever it is read.
func (c *Config) KernelMissing(reason, remedy string) error {
	p := &problems{src: c.src}
	auto := `use "auto"`
	if c.src.isFlags() {
		auto = "use --offload auto"
	}
	for i := range c.Pools {
		if c.Pools[i].Offload == OffloadKernel {
			p.add(fmt.Sprintf("pool[%d].offload", i), remedy+", or "+auto, "kernel TLS is not available here: %s", reason)
		}
	}
	return p.err()
}

// NeedsRekey reports whether a pool insists on the kernel's record layer and on changes
// of keys in it.
func (c *Config) NeedsRekey() bool {
	for i := range c.Pools {
		if c.Pools[i].Offload == OffloadKernel && c.Pools[i].Rekey == RekeyRequire {
			return true
		}
	}
	return false
}

// RekeyMissing is KernelMissing for pools that NeedsRekey means, on a machine whose
// kernel has TLS and cannot change keys: they would serve no client with TLS 1.3.
func (c *Config) RekeyMissing(reason, remedy string) error {
	p := &problems{src: c.src}
	auto := `offload = "auto"`
	if c.src.isFlags() {
		auto = "--offload auto"
	}
	for i := range c.Pools {
		if c.Pools[i].Offload == OffloadKernel && c.Pools[i].Rekey == RekeyRequire {
			p.add(fmt.Sprintf("pool[%d].rekey", i), remedy+", or use "+auto+" for the software layer",
				"TLS 1.3 could not be served: kernel TLS here cannot change keys: %s", reason)
		}
	}
	return p.err()
}
