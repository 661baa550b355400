package ktls

import (
	"crypto/tls"
	"fmt"
	"sync"
	"syscall"
	"time"
)

// Mode says which record layer a session may use.
type Mode uint8

const (
	ModeAuto     Mode = iota // kernel when it can do version and suite both ways, else software
	ModeKernel               // kernel or an error
	ModeSoftware             // this package's own layer
	ModeOff                  // no session: Server and Client refuse
)

var modeNames = [...]string{"auto", "kernel", "software", "off"}

// ParseMode reads "auto", "kernel", "software" or "off".
func ParseMode(s string) (Mode, error) {
	for i, name := range modeNames {
		if s == name {
			return Mode(i), nil
		}
	}
	return 0, fmt.Errorf("unknown mode %q: use auto, kernel, software or off", s)
}

// String returns the word that ParseMode reads.
func (m Mode) String() string {
	if int(m) < len(modeNames) {
		return modeNames[m]
	}
	return fmt.Sprintf("mode(%d)", uint8(m))
}

// MarshalText returns the word that ParseMode reads.
func (m Mode) MarshalText() ([]byte, error) {
	if int(m) >= len(modeNames) {
		return nil, fmt.Errorf("unknown mode %d", uint8(m))
	}
	return []byte(modeNames[m]), nil
}

// UnmarshalText reads what ParseMode reads.
func (m *Mode) UnmarshalText(b []byte) error {
	v, err := ParseMode(string(b))
	if err != nil {
		return err
	}
	*m = v
	return nil
}

// Layer is where a session's records are sealed and opened.
type Layer uint8

const (
	LayerSoftware Layer = iota // in the process that owns the session
	LayerKernel                // in the socket
)

// String returns "software" or "kernel".
func (l Layer) String() string {
	switch l {
	case LayerSoftware:
		return "software"
	case LayerKernel:
		return "kernel"
	}
	return fmt.Sprintf("layer(%d)", uint8(l))
}

// MarshalText returns what String does, for JSON.
func (l Layer) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// UnmarshalText reads "software" or "kernel".
func (l *Layer) UnmarshalText(b []byte) error {
	for _, known := range []Layer{LayerSoftware, LayerKernel} {
		if string(b) == known.String() {
			*l = known
			return nil
		}
	}
	return fmt.Errorf("unknown record layer %q: use kernel or software", b)
}

// Socket is what a session runs over. *net.TCPConn and *os.File (of a
// non-blocking TCP socket) both satisfy it.
type Socket interface {
	syscall.Conn
	Close() error
	SetDeadline(time.Time) error
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
}

// DefaultHandshakeTimeout bounds a handshake when Config says nothing.
const DefaultHandshakeTimeout = 10 * time.Second

// Config says how sessions begin. Use one Config for all connections of a
// listener: automatic session-ticket keys live in it. It must not be copied after
// first use; it may be used by several goroutines.
type Config struct {
	// TLS is required and never modified. GetConfigForClient, GetCertificate,
	// KeyLogWriter, client certificates and session tickets are honoured. Only AEAD
	// suites with ECDHE are offered, TLS 1.2 and 1.3; TLS 1.2 sessions are never
	// resumed, because crypto/tls does not reveal their keys.
	TLS *tls.Config

	// Mode chooses the record layer. The zero value is ModeAuto.
	Mode Mode

	// RequireRekey keeps sessions of TLS 1.3 out of a kernel that cannot change their
	// keys (before Linux 6.14), where a KeyUpdate of the peer would be their end: with
	// ModeAuto they get the software layer, with ModeKernel the handshake fails with
	// ErrNoKernelTLS. TLS 1.2 has no KeyUpdate, so it changes nothing there.
	RequireRekey bool

	// HandshakeTimeout bounds the whole handshake; 0 is DefaultHandshakeTimeout.
	HandshakeTimeout time.Duration

	// Established, if set, is given crypto/tls's own state of a finished handshake
	// before Server or Client returns. Only there does ExportKeyingMaterial work: for
	// channel bindings (RFC 9266) and the like. An error refuses the session. What it
	// is given refers to the handshake's secrets and should not be kept.
	Established func(tls.ConnectionState) error

	// OnHandshakeError, if set, is told of every connection that a listener of
	// NewListener dropped, usually a *HandshakeError. It is called from several
	// goroutines and should return soon.
	OnHandshakeError func(error)

	mu     sync.Mutex
	base   *tls.Config // what servers handshake with; owns the automatic ticket keys
	baseOf *tls.Config // the TLS it was made from
}

func (c *Config) handshakeTimeout() time.Duration {
	if c.HandshakeTimeout > 0 {
		return c.HandshakeTimeout
	}
	return DefaultHandshakeTimeout
}
