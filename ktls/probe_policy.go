package ktls

import (
	"crypto/tls"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// releasePolicy rules out kernels that take keys and are known to go wrong with
// them, or that nobody tests this package on.
func releasePolicy(release string, version uint16) (status Status, reason, remedy string) {
	major, minor, ok := parseRelease(release)
	switch {
	case !ok:
		return StatusUnknown, fmt.Sprintf("kernel release %q cannot be read", release), ""
	case version != tls.VersionTLS13:
		return StatusSupported, "", ""
	case major < 6:
		return StatusUnsupported, "the record parser before Linux 6.0 is known to go wrong with TLS 1.3", "kernel >= 6.1"
	case major == 6 && minor < 1:
		return StatusUnsupported, "TLS 1.3 is used from Linux 6.1 on", "kernel >= 6.1"
	}
	return StatusSupported, "", ""
}

// parseRelease reads the first two numbers of uname's release.
func parseRelease(release string) (major, minor int, ok bool) {
	first, rest, found := strings.Cut(release, ".")
	if !found {
		return 0, 0, false
	}
	digits := rest
	if i := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		digits = rest[:i]
	}
	major, err1 := strconv.Atoi(first)
	minor, err2 := strconv.Atoi(digits)
	return major, minor, err1 == nil && err2 == nil && major >= 0
}

// refusedKeys explains an error of SetTLSKeys.
func refusedKeys(err error, version uint16, cipher kernelCipher, direction string) (status Status, reason, remedy string) {
	switch {
	case errors.Is(err, sys.ENOENT):
		module := "gcm"
		if cipher.id == kernelChaCha20.id {
			module = "chacha20poly1305"
		}
		return StatusUnsupported, "the kernel's crypto has no " + cipher.name, "modprobe " + module
	case errors.Is(err, sys.EINVAL), errors.Is(err, sys.ENOPROTOOPT), errors.Is(err, sys.EOPNOTSUPP):
		since := "4.17"
		if cipher.id == kernelChaCha20.id {
			since = "5.11"
		} else if version == tls.VersionTLS13 || cipher.id == kernelAES256GCM.id {
			since = "5.1"
		}
		return StatusUnsupported, fmt.Sprintf("the kernel does not take %s keys for %s: %v", cipher.name, direction, err), "kernel >= " + since
	}
	return StatusUnknown, err.Error(), ""
}
