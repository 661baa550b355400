// Package config reads what an operator wants: from a TOML file, or from the flags of
// `ktlsvisor run`. Both give the same Config, and both report every problem at once,
// each with its place, what is wrong and what to do about it.
package config

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"time"
)

// Defaults of what may be left out.
const (
	DefaultHandshakeTimeout = Duration(10 * time.Second)
	DefaultMaxSessions      = 65536
	DefaultWorkers          = 1
	DefaultReadyTimeout     = Duration(10 * time.Second)
	DefaultFreezeTimeout    = Duration(5 * time.Second)
	DefaultStopTimeout      = Duration(10 * time.Second)
	DefaultHeartbeat        = Duration(5 * time.Second)
	DefaultHangTimeout      = Duration(30 * time.Second)
	DefaultPoison           = 2
	DefaultPoisonReset      = Duration(time.Minute)
	DefaultCrashMemory      = 256 // MiB
	DefaultPool             = "default"
	DefaultMinVersion       = "1.2"
)

// Values of Pool.Dispatch.
const (
	DispatchLeastSessions = "least-sessions"
	DispatchRoundRobin    = "round-robin"
)

// Values of Pool.Offload, which are names of modes of package ktls.
const (
	OffloadAuto     = "auto"
	OffloadKernel   = "kernel"
	OffloadSoftware = "software"
)

// Values of Pool.Rekey: whether sessions must be able to change their keys.
const (
	RekeyAuto    = "auto"    // where the record layer can
	RekeyRequire = "require" // TLS 1.3 stays out of a kernel that cannot (before Linux 6.14)
)

// Config is a whole configuration. What Load, Parse and FromFlags return is complete:
// defaults are filled in, every listener names its pool, its certificate and its
// lowest version, and every path is absolute. The JSON keys are the TOML keys.
type Config struct {
	// Admin is the path of the admin socket; empty when it was not set, and the
	// command line decides.
	Admin            string   `json:"admin,omitempty"`
	HandshakeTimeout Duration `json:"handshake_timeout"`
	// MaxSessions bounds the sessions at one time, of all pools together.
	MaxSessions int `json:"max_sessions"`
	// TLS holds what listeners leave out.
	TLS TLS `json:"tls"`
	// SelfSigned asks for a certificate made in memory for every listener that has no
	// certificate of its own.
	SelfSigned bool       `json:"self_signed,omitempty"`
	Listeners  []Listener `json:"listener"`
	Pools      []Pool     `json:"pool"`

	src *source // where each key was written; nil for a Config made by hand
}

// TLS is the [tls] table: defaults for listeners.
type TLS struct {
	Cert       string `json:"cert,omitempty"`
	Key        string `json:"key,omitempty"`
	MinVersion string `json:"min_version,omitempty"`
}

// Listener is one [[listener]] table.
type Listener struct {
	Address string `json:"address"` // host:port, as for net.Listen
	Pool    string `json:"pool"`    // name of a Pool
	// Cert and Key are PEM files: the certificate with its chain, and its private key.
	// Both are empty when the certificate is self-signed.
	Cert string   `json:"cert,omitempty"`
	Key  string   `json:"key,omitempty"`
	ALPN []string `json:"alpn,omitempty"` // in the order of preference
	// MinVersion is "1.2" or "1.3".
	MinVersion string `json:"min_version"`
	// ClientCA is a PEM file of certificates; if it is set, clients must present a
	// certificate that one of them signed.
	ClientCA string `json:"client_ca,omitempty"`
}

// Pool is one [[pool]] table: a command, run in a number of workers.
type Pool struct {
	Name          string            `json:"name"`
	Command       []string          `json:"command"` // the program, as an absolute path, and its arguments
	Workers       int               `json:"workers"`
	Dispatch      string            `json:"dispatch"`
	Offload       string            `json:"offload"`
	Rekey         string            `json:"rekey"`
	ReadyTimeout  Duration          `json:"ready_timeout"`
	FreezeTimeout Duration          `json:"freeze_timeout"`
	MoveRate      int               `json:"move_rate,omitempty"` // sessions that are asked to move in a second, at most; 0: as fast as they go
	StopTimeout   Duration          `json:"stop_timeout"`
	Heartbeat     Duration          `json:"heartbeat"`           // how often a worker is asked whether it is there; 0: never
	HangTimeout   Duration          `json:"hang_timeout"`        // one that does not answer for so long is killed
	Probation     Duration          `json:"probation,omitempty"` // how long an upgrade keeps the old generation; 0 does not
	Poison        int               `json:"poison"`              // crashes in a row, over one session, after which it is closed; 0: never
	PoisonReset   Duration          `json:"poison_reset"`        // how long a suspect is served in quarantine before it is none any more
	CrashExact    bool              `json:"crash_exact"`         // workers keep journals, so that a crash of one costs no session of the software layer
	CrashMemory   int               `json:"crash_memory"`        // MiB of memory for that at most, a worker
	Retain        bool              `json:"retain"`              // the keeper has a duplicate of every socket, so that sessions outlive their worker
	NoFile        uint64            `json:"nofile,omitempty"`    // NOFILE limit of a worker; 0 keeps the supervisor's
	Env           map[string]string `json:"env,omitempty"`       // added to the supervisor's environment
	Dir           string            `json:"dir,omitempty"`       // working directory; empty keeps the supervisor's
}

// Duration is a time.Duration that is written as text, "10s" or "1m30s".
type Duration time.Duration

// D returns d as a time.Duration.
func (d Duration) D() time.Duration { return time.Duration(d) }

func (d Duration) String() string { return time.Duration(d).String() }

// MarshalText returns the text that UnmarshalText reads.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads what time.ParseDuration reads.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return err
	}
	*d = Duration(v)
	return nil
}

// New returns a Config with the defaults and no listener or pool.
func New() *Config {
	return &Config{HandshakeTimeout: DefaultHandshakeTimeout, MaxSessions: DefaultMaxSessions}
}

// NewPool returns a Pool with the defaults and no name or command.
func NewPool() Pool {
	return Pool{
		Workers:       DefaultWorkers,
		Dispatch:      DispatchLeastSessions,
		Offload:       OffloadAuto,
		Rekey:         RekeyAuto,
		ReadyTimeout:  DefaultReadyTimeout,
		FreezeTimeout: DefaultFreezeTimeout,
		StopTimeout:   DefaultStopTimeout,
		Heartbeat:     DefaultHeartbeat,
		HangTimeout:   DefaultHangTimeout,
		Retain:        true,
		Poison:        DefaultPoison,
		PoisonReset:   DefaultPoisonReset,
		CrashExact:    true,
		CrashMemory:   DefaultCrashMemory,
	}
}

// UnmarshalJSON gives defaults to what an earlier version, which did not know it, left
// out.
func (p *Pool) UnmarshalJSON(b []byte) error {
	type plain Pool
	q := plain(NewPool())
	if err := json.Unmarshal(b, &q); err != nil {
		return err
	}
	*p = Pool(q)
	return nil
}

// Pool returns the pool of that name, or nil.
func (c *Config) Pool(name string) *Pool {
	for i := range c.Pools {
		if c.Pools[i].Name == name {
			return &c.Pools[i]
		}
	}
	return nil
}

// Encode returns c for a successor of this process, which reads it with Decode. It
// holds what Env holds, so it may be secret.
func (c *Config) Encode() ([]byte, error) {
	b, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("encode configuration: %w", err)
	}
	return b, nil
}

// Decode reads what Encode wrote. It does not validate: what was good enough to run
// with stays so, even when a file has gone since. Keys that it does not know, of a
// newer version, are skipped, so that going back to this version stays possible.
func Decode(b []byte) (*Config, error) {
	c := New()
	if err := json.Unmarshal(b, c); err != nil {
		return nil, fmt.Errorf("decode stored configuration: %w", err)
	}
	return c, nil
}

// complete fills in what follows from other keys. Paths are taken relative to base,
// a command with a slash relative to its pool's directory.
func (c *Config) complete(base string) {
	abs := func(path *string) {
		if *path != "" && !filepath.IsAbs(*path) {
			*path = filepath.Join(base, *path)
		}
	}
	abs(&c.Admin)
	abs(&c.TLS.Cert)
	abs(&c.TLS.Key)
	if len(c.Pools) == 1 && c.Pools[0].Name == "" {
		c.Pools[0].Name = DefaultPool
	}
	for i := range c.Listeners {
		l := &c.Listeners[i]
		abs(&l.Cert)
		abs(&l.Key)
		abs(&l.ClientCA)
		if l.Pool == "" && len(c.Pools) == 1 {
			l.Pool = c.Pools[0].Name
		}
		if l.Cert == "" && l.Key == "" {
			l.Cert, l.Key = c.TLS.Cert, c.TLS.Key
		}
		if l.MinVersion == "" {
			l.MinVersion = c.TLS.MinVersion
		}
		if l.MinVersion == "" {
			l.MinVersion = DefaultMinVersion
		}
	}
	for i := range c.Pools {
		p := &c.Pools[i]
		abs(&p.Dir)
		if len(p.Command) > 0 {
			p.Command[0] = resolveCommand(p.Command[0], p.Dir, base)
		}
	}
}
