package config

import (
	"fmt"
	"os"
	"slices"
)

// Flags is the flags form of `ktlsvisor run`: one pool, and listeners for it.
type Flags struct {
	Listen     []string // --listen, may be repeated
	SelfSigned bool     // --self-signed
	Cert, Key  string   // --cert, --key
	Workers    int      // --workers, whose default is DefaultWorkers; 0 is refused
	Offload    string   // --offload; empty for the default
	Rekey      string   // --rekey; empty for the default
	Pool       string   // --pool; empty for DefaultPool
	Admin      string   // --admin
	Command    []string // what stands after --
}

// FromFlags returns the Config that flags describe, completed and validated. Relative
// paths are relative to the working directory. Its error is an Errors that speaks of
// flags.
func FromFlags(f Flags) (*Config, error) {
	base, err := os.Getwd()
	if err != nil {
		return nil, Errors{{Problem: "the working directory is unknown: " + reason(err), Remedy: "change to one that exists"}}
	}
	c := New()
	c.src = &source{flags: map[string]string{
		"admin":           "--admin",
		"listener":        "--listen",
		"self_signed":     "--self-signed",
		"tls":             "--cert",
		"tls.cert":        "--cert",
		"tls.key":         "--key",
		"pool[0].name":    "--pool",
		"pool[0].command": "COMMAND",
		"pool[0].workers": "--workers",
		"pool[0].offload": "--offload",
		"pool[0].rekey":   "--rekey",
	}}
	c.Admin, c.SelfSigned = f.Admin, f.SelfSigned
	c.TLS.Cert, c.TLS.Key = f.Cert, f.Key
	for i, address := range f.Listen {
		c.Listeners = append(c.Listeners, Listener{Address: address})
		key := fmt.Sprintf("listener[%d]", i)
		c.src.flags[key+".address"] = "--listen"
		c.src.flags[key+".cert"] = "--listen " + address
	}
	pool := NewPool()
	pool.Name = f.Pool
	pool.Command, pool.Workers = slices.Clone(f.Command), f.Workers
	if f.Offload != "" {
		pool.Offload = f.Offload
	}
	if f.Rekey != "" {
		pool.Rekey = f.Rekey
	}
	c.Pools = []Pool{pool}
	c.complete(base)
	if err := c.Validate(); err != nil {
		return nil, err
	}
	return c, nil
}
