package config

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	// maxSessionsLimit is what the ledger's memory is laid out for at most.
	maxSessionsLimit = 1 << 20
	maxWorkers       = 1024
	maxDuration      = 24 * time.Hour
	minNoFile        = 64
	maxCrashMemory   = 64 << 10 // MiB
	minHeartbeat     = 100 * time.Millisecond
	minHangTimeout   = time.Second
	maxPoison        = 100
	// maxUnixPath is the longest path of a Unix socket: sun_path holds 108 bytes with
	// the final zero (unix(7)).
	maxUnixPath = 107
	maxPoolName = 64
)

// Validate checks c, and the files it names. nil, or an Errors with every problem.
func (c *Config) Validate() error {
	p := &problems{src: c.src}
	c.validate(p)
	return p.err()
}

func (c *Config) validate(p *problems) {
	if len(c.Admin) > maxUnixPath {
		p.add("admin", "choose a shorter path", "the path has %d bytes, a Unix socket's has at most %d", len(c.Admin), maxUnixPath)
	}
	c.duration(p, "handshake_timeout", c.HandshakeTimeout)
	if c.MaxSessions < 1 || c.MaxSessions > maxSessionsLimit {
		p.add("max_sessions", fmt.Sprintf("give a number from 1 to %d, or leave it out for %d", maxSessionsLimit, DefaultMaxSessions),
			"%d sessions are not possible", c.MaxSessions)
	}
	c.validateTLS(p)
	c.validatePools(p)
	c.validateListeners(p)
}

func (c *Config) duration(p *problems, key string, d Duration) {
	if d <= 0 || d.D() > maxDuration {
		p.add(key, fmt.Sprintf("give a duration above 0 and up to %s", Duration(maxDuration)), "%s is not possible", d)
	}
}

func (c *Config) validatePools(p *problems) {
	if len(c.Pools) == 0 && !c.src.written("pool") {
		p.add("pool", `add a [[pool]] with its command = ["…"]`, "there is none, so nothing would serve a session")
	}
	names := make(map[string]int)
	for i := range c.Pools {
		pool, key := &c.Pools[i], fmt.Sprintf("pool[%d]", i)
		first, taken := names[pool.Name]
		switch {
		case pool.Name == "":
			p.add(key+".name", "give each pool a name", "missing, and there is more than one pool")
		case !validPoolName(pool.Name):
			p.add(key+".name", fmt.Sprintf("use 1 to %d of the characters a-z A-Z 0-9 . _ -", maxPoolName), "%q is no name of a pool", pool.Name)
		case taken:
			p.add(key+".name", "give each pool its own name", "%q is already used by %s", pool.Name, c.src.place(fmt.Sprintf("pool[%d]", first)))
		default:
			names[pool.Name] = i
		}
		c.validatePool(p, pool, key)
	}
}

func (c *Config) validatePool(p *problems, pool *Pool, key string) {
	if pool.Workers < 1 || pool.Workers > maxWorkers {
		p.add(key+".workers", fmt.Sprintf("give a number from 1 to %d, or leave it out for %d", maxWorkers, DefaultWorkers),
			"%d workers are not possible", pool.Workers)
	}
	choice(p, key+".dispatch", pool.Dispatch, DispatchLeastSessions, DispatchRoundRobin)
	if pool.Offload == "off" {
		p.add(key+".offload", `use "auto", "kernel" or "software"`,
			`"off" leaves sessions without a record layer that can be moved, so none would survive its process`)
	} else {
		choice(p, key+".offload", pool.Offload, OffloadAuto, OffloadKernel, OffloadSoftware)
	}
	choice(p, key+".rekey", pool.Rekey, RekeyAuto, RekeyRequire)
	c.duration(p, key+".ready_timeout", pool.ReadyTimeout)
	c.duration(p, key+".freeze_timeout", pool.FreezeTimeout)
	if pool.MoveRate < 0 {
		p.add(key+".move_rate", "give a number of sessions a second, or leave it out for as fast as they go", "%d is negative", pool.MoveRate)
	}
	c.duration(p, key+".stop_timeout", pool.StopTimeout)
	if pool.Heartbeat != 0 && (pool.Heartbeat.D() < minHeartbeat || pool.Heartbeat.D() > maxDuration) {
		p.add(key+".heartbeat", fmt.Sprintf(`give a duration from %s to %s, "0s" for none, or leave it out for %s`, Duration(minHeartbeat), Duration(maxDuration), DefaultHeartbeat),
			"%s is not possible", pool.Heartbeat)
	}
	if pool.HangTimeout.D() < minHangTimeout || pool.HangTimeout.D() > maxDuration {
		p.add(key+".hang_timeout", fmt.Sprintf("give a duration from %s to %s, or leave it out for %s", Duration(minHangTimeout), Duration(maxDuration), DefaultHangTimeout),
			"%s is not possible: a worker that is only slow would be killed", pool.HangTimeout)
	}
	if pool.CrashMemory < 1 || pool.CrashMemory > maxCrashMemory {
		p.add(key+".crash_memory", fmt.Sprintf("give a number of MiB from 1 to %d, or leave it out for %d", maxCrashMemory, DefaultCrashMemory),
			"%d MiB are not possible", pool.CrashMemory)
	}
	if pool.Probation != 0 { // 0 is none
		c.duration(p, key+".probation", pool.Probation)
	}
	if pool.Poison != 0 && (pool.Poison < 2 || pool.Poison > maxPoison) {
		p.add(key+".poison", fmt.Sprintf("give a number from 2 to %d, 0 for never, or leave it out for %d", maxPoison, DefaultPoison),
			"%d is not possible: one crash may have any reason", pool.Poison)
	}
	c.duration(p, key+".poison_reset", pool.PoisonReset)
	if pool.NoFile != 0 && pool.NoFile < minNoFile {
		p.add(key+".nofile", fmt.Sprintf("give at least %d, and one for every session besides; or leave it out", minNoFile),
			"a worker cannot run with %d descriptors", pool.NoFile)
	}
	for _, name := range slices.Sorted(maps.Keys(pool.Env)) {
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.Contains(pool.Env[name], "\x00") {
			p.add(join(key+".env", name), "use a name without '=', and no zero byte", "not possible in an environment")
		}
	}
	if pool.Dir != "" {
		if info, err := os.Stat(pool.Dir); err != nil {
			p.add(key+".dir", "create it or correct the path", "%s: %s", pool.Dir, reason(err))
			return // a command in it is missing for the same reason
		} else if !info.IsDir() {
			p.add(key+".dir", "name a directory", "%s is not a directory", pool.Dir)
			return
		}
	}
	validateCommand(p, pool, key+".command")
}

func validateCommand(p *problems, pool *Pool, key string) {
	if len(pool.Command) == 0 || pool.Command[0] == "" {
		remedy := `give the program and its arguments, as command = ["./worker", "--flag"]`
		if p.src.isFlags() {
			remedy = "put it after --, as in -- ./worker --flag"
		}
		p.add(key, remedy, "there is no command to run")
		return
	}
	if slices.ContainsFunc(pool.Command, func(s string) bool { return strings.Contains(s, "\x00") }) {
		p.add(key, "remove it", "contains a zero byte")
		return
	}
	program := pool.Command[0]
	_, err := exec.LookPath(program)
	switch {
	case err == nil:
	case errors.Is(err, exec.ErrNotFound):
		p.add(key, "install it, or give its path with a slash in it", "%q is not in the PATH (%s)", program, os.Getenv("PATH"))
	case errors.Is(err, fs.ErrNotExist):
		p.add(key, "build or install it, or correct the path", "%s does not exist", program)
	case isDir(program):
		p.add(key, "name the program in it", "%s is a directory", program)
	case errors.Is(err, fs.ErrPermission):
		p.add(key, "chmod +x "+program, "%s is not executable", program)
	default:
		p.add(key, "correct the path", "%s: %s", program, reason(err))
	}
}

// resolveCommand returns the program by its absolute path: a path with a slash
// relative to dir, or to base without one, a mere name from the PATH. Where that is
// not possible the program is returned as it is, for validation to complain.
func resolveCommand(program, dir, base string) string {
	switch {
	case program == "" || filepath.IsAbs(program):
		return program
	case strings.Contains(program, "/"):
		if dir == "" {
			dir = base
		}
		return filepath.Join(dir, program)
	}
	if path, err := exec.LookPath(program); err == nil {
		return path
	}
	return program
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// choice checks a value that is one of a few words.
func choice(p *problems, key, value string, allowed ...string) {
	if slices.Contains(allowed, value) {
		return
	}
	remedy := fmt.Sprintf("use %q", allowed[0])
	for i, a := range allowed[1:] {
		sep := ", "
		if i == len(allowed)-2 {
			sep = " or "
		}
		remedy += fmt.Sprintf("%s%q", sep, a)
	}
	p.add(key, remedy, "%q is not a choice here", value)
}

func validPoolName(s string) bool {
	if s == "" || len(s) > maxPoolName {
		return false
	}
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '.', c == '_', c == '-':
		default:
			return false
		}
	}
	return true
}
