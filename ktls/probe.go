package ktls

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// Probe asks this kernel what it can do for TLS sessions, by setting keys on
// connections of this process to itself and sending a record through each. The
// answer is kept for the life of the process, except when something could not be
// told (out of descriptors, no loopback) or the tls module is not there: these
// are asked again with the next call. It takes some milliseconds once.
func Probe() *Capabilities { return kernelProbe.ask(0) }

// supportsKernel reports whether this kernel seals and opens version and suite in
// both directions; reason says why not, in words for a log line.
func supportsKernel(version, suite uint16) (ok bool, reason string) {
	return kernelProbe.ask(probeAgain).Supports(version, suite)
}

// changesKeys is Capabilities.changesKeys of this kernel.
func changesKeys(version uint16) (ok bool, reason string) {
	return kernelProbe.ask(probeAgain).changesKeys(version)
}

// kernelPossible reports whether attaching the ULP to a new connection is worth it.
func kernelPossible() (ok bool, reason string) {
	caps := kernelProbe.ask(probeAgain)
	if caps.KernelTLS {
		return true, ""
	}
	if module := caps.find(FeatureModule, "", "", ""); module == nil || module.Status != StatusSupported {
		return false, reasonOf(module, "kernel TLS was not probed")
	}
	for _, k := range caps.Checks {
		if k.Feature == FeatureOffload && k.Status != StatusSupported {
			return false, reasonOf(&k, "")
		}
	}
	return false, "this kernel carries no version and cipher in both directions"
}

// probeAgain is how long a handshake goes by an uncertain answer before it asks
// the kernel again: every connection of a server on a host without the module
// passes here.
const probeAgain = time.Second

// kernelProbe is the one answer of this process; the kernel does not change.
var kernelProbe = prober{kernel: realKernel}

// prober keeps the probe's answer.
type prober struct {
	kernel func() kernelEdge

	mu   sync.Mutex // held while probing
	last *Capabilities
	at   time.Time

	seen sync.RWMutex // guards what ask reads without waiting for a probe
}

// ask returns an answer that is certain, or one of at most the given age.
func (p *prober) ask(age time.Duration) *Capabilities {
	fits := func() *Capabilities {
		p.seen.RLock()
		defer p.seen.RUnlock()
		if p.last != nil && (p.last.certain() || age > 0 && time.Since(p.at) < age) {
			return p.last
		}
		return nil
	}
	if caps := fits(); caps != nil {
		return caps
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if caps := fits(); caps != nil { // found out while we waited
		return caps
	}
	caps := probe(p.kernel())
	p.seen.Lock()
	p.last, p.at = caps, time.Now()
	p.seen.Unlock()
	return caps
}

var kernelVersions = []uint16{tls.VersionTLS13, tls.VersionTLS12}

// aSuite is one suite of each version for each cipher; keys do not depend on which.
func aSuite(version uint16, c kernelCipher) uint16 {
	for _, s := range tls.CipherSuites() {
		if got, ok := kernelCipherOf(version, s.ID); ok && got.id == c.id {
			return s.ID
		}
	}
	return 0
}

func probe(k kernelEdge) *Capabilities {
	caps := &Capabilities{Release: k.release}
	module := k.probeModule()
	caps.Checks = append(caps.Checks, module)
	for _, version := range kernelVersions {
		for _, cipher := range kernelCiphers {
			tx, rx := k.probeOffload(module, version, cipher)
			caps.Checks = append(caps.Checks, tx, rx)
		}
	}
	caps.Checks = append(caps.Checks, k.probeKeys(module)...)
	caps.Checks = append(caps.Checks, k.probeCopies(module)...)
	software := Check{Feature: FeatureSoftware, Status: StatusSupported}
	if !k.softwareOK {
		software.Status = StatusUnsupported
		software.Reason = "GODEBUG=fips140=only refuses AES-GCM with the nonces TLS records have"
		software.Remedy = "run without GODEBUG=fips140=only, or use kernel TLS only"
	}
	caps.Checks = append(caps.Checks, software)
	caps.conclude()
	return caps
}

// verdict turns what the kernel said into a result.
func (c *Check) verdict(status Status, reason, remedy string) {
	c.Status, c.Reason, c.Remedy = status, reason, remedy
}

func (k kernelEdge) probeModule() Check {
	c := Check{Feature: FeatureModule}
	a, b, err := k.pair()
	if err != nil {
		c.verdict(StatusUnknown, fmt.Sprintf("no connection to try it on: %v", err), "")
		return c
	}
	defer closeBoth(a, b)
	err = k.attach(a)
	switch {
	case err == nil:
		c.Status = StatusSupported
	case errors.Is(err, sys.ENOENT):
		switch k.moduleFile(k.release) {
		case moduleThere:
			c.verdict(StatusUnsupported, "the tls module is not loaded", "modprobe tls")
		case moduleNone:
			c.verdict(StatusUnsupported, "this kernel was built without TLS (CONFIG_TLS)", "a kernel with CONFIG_TLS=m or y")
		default:
			c.verdict(StatusUnsupported, "the kernel has no tls module loaded", "modprobe tls on the host; a kernel with CONFIG_TLS if there is no such module")
		}
	case errors.Is(err, sys.ENOPROTOOPT), errors.Is(err, sys.EOPNOTSUPP):
		c.verdict(StatusUnsupported, "the kernel knows no upper-layer protocols on TCP", "kernel >= 4.17")
	case errors.Is(err, sys.EPERM), errors.Is(err, sys.EACCES):
		c.verdict(StatusUnsupported, "not permitted: "+err.Error(), "allow setsockopt TCP_ULP in the seccomp filter")
	default:
		c.verdict(StatusUnknown, err.Error(), "")
	}
	return c
}

// probeOffload sets both directions' keys of one version and cipher at both ends
// of a connection and sends a record each way.
func (k kernelEdge) probeOffload(module Check, version uint16, cipher kernelCipher) (tx, rx Check) {
	tx = Check{Feature: FeatureOffload, Version: tls.VersionName(version), Suite: cipher.name, Direction: DirectionSend}
	rx = tx
	rx.Direction = DirectionReceive
	both := func(status Status, reason, remedy string) (Check, Check) {
		tx.verdict(status, reason, remedy)
		rx.verdict(status, reason, remedy)
		return tx, rx
	}
	if module.Status != StatusSupported {
		return both(module.Status, "no kernel TLS", module.Remedy)
	}
	if status, reason, remedy := releasePolicy(k.release, version); status != StatusSupported {
		return both(status, reason, remedy)
	}
	a, b, err := k.readyPair()
	if err != nil {
		return both(StatusUnknown, err.Error(), "")
	}
	defer closeBoth(a, b)
	ab, ba, err := throwawayKeys(version, cipher), throwawayKeys(version, cipher), error(nil)
	defer ab.wipe()
	defer ba.wipe()
	if err := k.setKeys(a, sys.TLSSend, ab.bytes()); err != nil {
		tx.verdict(refusedKeys(err, version, cipher, DirectionSend))
	} else {
		tx.Status = StatusSupported
	}
	if err := k.setKeys(b, sys.TLSReceive, ab.bytes()); err != nil {
		rx.verdict(refusedKeys(err, version, cipher, DirectionReceive))
	} else {
		rx.Status = StatusSupported
	}
	if tx.Status != StatusSupported || rx.Status != StatusSupported {
		return tx, rx
	}
	if err = k.setKeys(b, sys.TLSSend, ba.bytes()); err == nil {
		err = k.setKeys(a, sys.TLSReceive, ba.bytes())
	}
	if err != nil {
		status, reason, remedy := refusedKeys(err, version, cipher, "both directions at once")
		return both(status, reason, remedy)
	}
	for _, way := range [][2]*net.TCPConn{{a, b}, {b, a}} {
		if err := k.carries(way[0], way[1]); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return both(StatusUnknown, "a record did not arrive in time", "")
			}
			return both(StatusUnsupported, "keys were taken and a record did not come through: "+err.Error(), "another kernel")
		}
	}
	return tx, rx
}

// probeKeys asks whether the keys of a socket can be looked at (needed to check an
// imported one) and changed.
func (k kernelEdge) probeKeys(module Check) []Check {
	read := [2]Check{
		{Feature: FeatureReadKeys, Direction: DirectionSend},
		{Feature: FeatureReadKeys, Direction: DirectionReceive},
	}
	rekey := [2]Check{
		{Feature: FeatureRekey, Version: tls.VersionName(tls.VersionTLS13), Direction: DirectionSend},
		{Feature: FeatureRekey, Version: tls.VersionName(tls.VersionTLS13), Direction: DirectionReceive},
	}
	done := func() []Check { return []Check{read[0], read[1], rekey[0], rekey[1]} }
	all := func(status Status, reason, remedy string) []Check {
		for i := range read {
			read[i].verdict(status, reason, remedy)
			rekey[i].verdict(status, reason, remedy)
		}
		return done()
	}
	if module.Status != StatusSupported {
		return all(module.Status, "no kernel TLS", module.Remedy)
	}
	if status, reason, remedy := releasePolicy(k.release, tls.VersionTLS13); status != StatusSupported {
		return all(status, reason, remedy)
	}
	a, b, err := k.readyPair()
	if err != nil {
		return all(StatusUnknown, err.Error(), "")
	}
	defer closeBoth(a, b)
	const version = tls.VersionTLS13
	cipher := kernelAES128GCM
	first, second := throwawayKeys(version, cipher), throwawayKeys(version, cipher)
	defer first.wipe()
	defer second.wipe()
	ends := [2]struct {
		c   *net.TCPConn
		dir sys.TLSDirection
	}{{a, sys.TLSSend}, {b, sys.TLSReceive}}
	for i, end := range ends {
		if err := k.setKeys(end.c, end.dir, first.bytes()); err != nil {
			status, reason, remedy := refusedKeys(err, version, cipher, rekey[i].Direction)
			return all(status, reason, remedy)
		}
		v, id, err := k.hasKeys(end.c, end.dir)
		switch {
		case err != nil:
			read[i].verdict(StatusUnsupported, "the kernel does not tell a socket's keys: "+err.Error(), "kernel >= 6.1")
		case v != version || id != cipher.id:
			read[i].verdict(StatusUnsupported, fmt.Sprintf("the kernel names version %#04x and cipher %d where %#04x and %d were set", v, id, version, cipher.id), "another kernel")
		default:
			read[i].Status = StatusSupported
		}
	}
	for i, end := range ends {
		err := k.setKeys(end.c, end.dir, second.bytes())
		switch {
		case err == nil:
			rekey[i].Status = StatusSupported
		case errors.Is(err, sys.EBUSY):
			rekey[i].verdict(StatusUnsupported, "a key can be set only once, so a peer's KeyUpdate ends the session", "kernel >= 6.14")
		default:
			rekey[i].verdict(StatusUnknown, err.Error(), "")
		}
	}
	if rekey[0].Status == StatusSupported && rekey[1].Status == StatusSupported {
		if err := k.carries(a, b); err != nil {
			status := StatusUnsupported
			if errors.Is(err, os.ErrDeadlineExceeded) {
				status = StatusUnknown
			}
			for i := range rekey {
				rekey[i].verdict(status, "a record sealed with the second key did not come through: "+err.Error(), "")
			}
		}
	}
	return done()
}
