package ktls

import (
	"crypto/tls"
	"fmt"
)

// KernelRange is a range of Linux releases in which something about kernel TLS is
// missing or goes wrong, and what this package does there.
type KernelRange struct {
	Before  string `json:"before"` // releases older than this one, "6.14"
	What    string `json:"what"`
	Then    string `json:"then"`    // what this package does about it
	Applies bool   `json:"applies"` // to the kernel that was probed
	Remedy  string `json:"remedy,omitempty"`
}

var kernelRanges = []KernelRange{
	{Before: "4.13", What: "there is no kernel TLS", Then: "auto takes the software layer"},
	{Before: "4.17", What: "records are sealed for sending only", Then: "auto takes the software layer"},
	{Before: "5.1", What: "there is neither TLS 1.3 nor AES-256-GCM", Then: "auto takes the software layer for both"},
	{Before: "5.11", What: "there is no ChaCha20-Poly1305", Then: "auto takes the software layer for it"},
	{Before: "6.1", What: "the record parser goes wrong with TLS 1.3 (before 6.0), and nobody tests it here", Then: "auto takes the software layer for TLS 1.3"},
	{Before: "6.5", What: "sendfile keeps the last record open when the file ends", Then: "no more is asked for than the file has"},
	{Before: "6.14", What: "keys cannot be changed", Then: "a KeyUpdate ends the session cleanly and is counted; with rekey = \"require\" TLS 1.3 goes to the software layer"},
}

// Ranges are the known ranges of kernels, and whether the probed one is in them. A
// distribution may have mended its kernel: what Checks say counts more, except for what
// goes wrong without being noticed.
func (c *Capabilities) Ranges() []KernelRange {
	major, minor, ok := parseRelease(c.Release)
	out := make([]KernelRange, len(kernelRanges))
	for i, r := range kernelRanges {
		m, n, _ := parseRelease(r.Before)
		r.Applies = ok && (major < m || major == m && minor < n)
		if r.Applies {
			r.Remedy = "kernel >= " + r.Before
		}
		out[i] = r
	}
	return out
}

// Choice is what ModeAuto does with sessions of one version and suite.
type Choice struct {
	Version string `json:"version"` // "TLS 1.3"
	Suite   string `json:"suite"`   // "TLS_AES_128_GCM_SHA256"
	Send    Status `json:"send"`    // whether the kernel seals it
	Receive Status `json:"receive"` // and opens it
	Rekey   Status `json:"rekey"`   // whether its keys can change in the kernel; TLS 1.2 needs no such thing
	Layer   Layer  `json:"layer"`   // what auto takes
	Reason  string `json:"reason,omitempty"`
	Remedy  string `json:"remedy,omitempty"`
}

// Choices is what ModeAuto does with every version and suite on the probed kernel.
func (c *Capabilities) Choices() []Choice {
	var out []Choice
	for i := range suites {
		s := &suites[i]
		v := tls.VersionName(s.version)
		ch := Choice{Version: v, Suite: tls.CipherSuiteName(s.id), Send: StatusUnsupported, Receive: StatusUnsupported, Layer: LayerSoftware}
		if cipher, ok := kernelCipherOf(s.version, s.id); ok {
			for _, d := range []struct {
				name string
				to   *Status
			}{{DirectionSend, &ch.Send}, {DirectionReceive, &ch.Receive}} {
				if k := c.find(FeatureOffload, v, cipher.name, d.name); k != nil {
					*d.to = k.Status
					if k.Status != StatusSupported {
						ch.Remedy = k.Remedy
					}
				}
			}
		}
		if module := c.find(FeatureModule, "", "", ""); module != nil && module.Status != StatusSupported {
			ch.Send, ch.Receive, ch.Remedy = module.Status, module.Status, module.Remedy
		}
		ok, reason := c.Supports(s.version, s.id)
		ch.Reason = reason
		if ok {
			ch.Layer = LayerKernel
		}
		switch {
		case s.version != tls.VersionTLS13:
			ch.Rekey = StatusSupported
		case c.Rekey:
			ch.Rekey = StatusSupported
		default:
			ch.Rekey = StatusUnsupported
		}
		out = append(out, ch)
	}
	return out
}

// words are for a table: yes, no, unknown; TLS 1.2 has no KeyUpdate.
func (ch *Choice) words() []string {
	word := map[Status]string{StatusSupported: "yes", StatusUnsupported: "no", StatusUnknown: "unknown"}
	rekey := word[ch.Rekey]
	if ch.Version != tls.VersionName(tls.VersionTLS13) {
		rekey = "-"
	}
	return []string{ch.Version, ch.Suite, word[ch.Send], word[ch.Receive], rekey, fmt.Sprint(ch.Layer)}
}

// ChoiceTable renders Choices for people, with a header.
func (c *Capabilities) ChoiceTable() [][]string {
	rows := [][]string{{"VERSION", "SUITE", "SEND", "RECEIVE", "KEY UPDATE", "AUTO TAKES"}}
	for _, ch := range c.Choices() {
		rows = append(rows, ch.words())
	}
	return rows
}
