package ktls

import (
	"crypto/tls"
	"fmt"
)

// Status is the outcome of one check of the probe.
type Status uint8

const (
	StatusUnknown     Status = iota // could not tell
	StatusSupported                 // works here
	StatusUnsupported               // does not, see Reason and Remedy
)

var statusNames = [...]string{"unknown", "supported", "unsupported"}

// String returns "unknown", "supported" or "unsupported".
func (s Status) String() string {
	if int(s) < len(statusNames) {
		return statusNames[s]
	}
	return fmt.Sprintf("status(%d)", uint8(s))
}

// MarshalText returns String's word.
func (s Status) MarshalText() ([]byte, error) {
	if int(s) >= len(statusNames) {
		return nil, fmt.Errorf("unknown status %d", uint8(s))
	}
	return []byte(statusNames[s]), nil
}

// UnmarshalText reads what MarshalText wrote.
func (s *Status) UnmarshalText(b []byte) error {
	for i, name := range statusNames {
		if string(b) == name {
			*s = Status(i)
			return nil
		}
	}
	return fmt.Errorf("unknown status %q", b)
}

// What a Check is about.
const (
	FeatureModule   = "kernel TLS"     // the module answers
	FeatureOffload  = "offload"        // keys of a version and cipher, in one direction
	FeatureReadKeys = "key check"      // an imported socket's version and cipher can be verified
	FeatureRekey    = "rekey"          // a KeyUpdate can be followed
	FeatureSendfile = "sendfile"       // io.Copy from a file need not copy
	FeatureSplice   = "splice"         // io.Copy from (send) or to (receive) a socket or pipe need not copy
	FeatureSoftware = "software layer" // the layer that needs no kernel
)

// The words in Check.Direction.
const (
	DirectionSend    = "send"
	DirectionReceive = "receive"
)

// Check is one thing the probe looked at.
type Check struct {
	Feature   string `json:"feature"`             // one of the Feature constants
	Version   string `json:"version,omitempty"`   // "TLS 1.3"
	Suite     string `json:"suite,omitempty"`     // the cipher, "AES-128-GCM"
	Direction string `json:"direction,omitempty"` // "send" or "receive"
	Status    Status `json:"status"`
	Reason    string `json:"reason,omitempty"` // why it is not supported, or not known
	Remedy    string `json:"remedy,omitempty"` // what to do about it
}

// Capabilities is what this kernel can do for TLS sessions. It does not change
// after Probe returned it.
type Capabilities struct {
	Release   string  `json:"release"` // uname -r
	KernelTLS bool    `json:"ktls"`    // at least one version and cipher, both ways
	Rekey     bool    `json:"rekey"`   // keys can be changed, both ways
	Checks    []Check `json:"checks"`
}

// Supports reports whether the kernel can carry sessions of this version and suite
// in both directions. When it cannot, reason says why in words for a log line.
func (c *Capabilities) Supports(version, suite uint16) (ok bool, reason string) {
	cipher, ok := kernelCipherOf(version, suite)
	if !ok {
		return false, fmt.Sprintf("kernel TLS has no %s with %s", tls.CipherSuiteName(suite), tls.VersionName(version))
	}
	if module := c.find(FeatureModule, "", "", ""); module == nil || module.Status != StatusSupported {
		return false, reasonOf(module, "kernel TLS was not probed")
	}
	for _, dir := range []string{DirectionSend, DirectionReceive} {
		check := c.find(FeatureOffload, tls.VersionName(version), cipher.name, dir)
		if check == nil || check.Status != StatusSupported {
			return false, reasonOf(check, cipher.name+" was not probed")
		}
	}
	return true, ""
}

// changesKeys reports whether the kernel can follow whatever changes of keys a version
// of TLS has; reason is for Config.RequireRekey.
func (c *Capabilities) changesKeys(version uint16) (ok bool, reason string) {
	if version != tls.VersionTLS13 || c.Rekey {
		return true, ""
	}
	reason = "this kernel cannot change keys, which is required"
	for i := range c.Checks {
		if k := &c.Checks[i]; k.Feature == FeatureRekey && k.Status != StatusSupported && k.Remedy != "" {
			return false, reason + " (" + k.Remedy + ")"
		}
	}
	return false, reason
}

// Table renders the checks for people: a header, then one row a check, in a stable
// order.
func (c *Capabilities) Table() [][]string {
	rows := [][]string{{"FEATURE", "VERSION", "CIPHER", "DIRECTION", "STATUS", "REASON", "REMEDY"}}
	for _, k := range c.Checks {
		rows = append(rows, []string{
			k.Feature, dash(k.Version), dash(k.Suite), dash(k.Direction), k.Status.String(), dash(k.Reason), dash(k.Remedy),
		})
	}
	return rows
}

func (c *Capabilities) find(feature, version, suite, direction string) *Check {
	for i := range c.Checks {
		k := &c.Checks[i]
		if k.Feature == feature && k.Version == version && k.Suite == suite && k.Direction == direction {
			return k
		}
	}
	return nil
}

// conclude fills in the summary fields from the checks.
func (c *Capabilities) conclude() {
	c.KernelTLS = false
	for _, version := range kernelVersions {
		for _, cipher := range kernelCiphers {
			c.KernelTLS = c.KernelTLS || c.bothWays(FeatureOffload, tls.VersionName(version), cipher.name)
		}
	}
	c.Rekey = c.KernelTLS && c.bothWays(FeatureRekey, tls.VersionName(tls.VersionTLS13), "")
}

func (c *Capabilities) bothWays(feature, version, suite string) bool {
	for _, dir := range []string{DirectionSend, DirectionReceive} {
		if k := c.find(feature, version, suite, dir); k == nil || k.Status != StatusSupported {
			return false
		}
	}
	return true
}

// certain reports that every check came to a result that cannot change while this
// process lives. A missing module can be loaded at any time.
func (c *Capabilities) certain() bool {
	for _, k := range c.Checks {
		if k.Status == StatusUnknown || k.Feature == FeatureModule && k.Status != StatusSupported {
			return false
		}
	}
	return true
}

func reasonOf(k *Check, otherwise string) string {
	if k == nil {
		return otherwise
	}
	if k.Remedy != "" {
		return k.Reason + " (" + k.Remedy + ")"
	}
	return k.Reason
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
