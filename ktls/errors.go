package ktls

import (
	"errors"
	"fmt"
	"io"
)

// Alert is a TLS alert description (RFC 8446 section 6, RFC 5246 section 7.2).
type Alert uint8

const (
	alertCloseNotify       Alert = 0
	alertUnexpectedMessage Alert = 10
	alertBadRecordMAC      Alert = 20
	alertRecordOverflow    Alert = 22
	alertIllegalParameter  Alert = 47
	alertDecodeError       Alert = 50
	alertProtocolVersion   Alert = 70
	alertInternalError     Alert = 80
	alertUserCanceled      Alert = 90
	alertNoRenegotiation   Alert = 100
)

var alertNames = map[Alert]string{
	alertCloseNotify:       "close_notify",
	alertUnexpectedMessage: "unexpected_message",
	alertBadRecordMAC:      "bad_record_mac",
	alertRecordOverflow:    "record_overflow",
	40:                     "handshake_failure",
	42:                     "bad_certificate",
	43:                     "unsupported_certificate",
	44:                     "certificate_revoked",
	45:                     "certificate_expired",
	46:                     "certificate_unknown",
	alertIllegalParameter:  "illegal_parameter",
	48:                     "unknown_ca",
	49:                     "access_denied",
	alertDecodeError:       "decode_error",
	51:                     "decrypt_error",
	alertProtocolVersion:   "protocol_version",
	71:                     "insufficient_security",
	alertInternalError:     "internal_error",
	86:                     "inappropriate_fallback",
	alertUserCanceled:      "user_canceled",
	alertNoRenegotiation:   "no_renegotiation",
	109:                    "missing_extension",
	110:                    "unsupported_extension",
	112:                    "unrecognized_name",
	113:                    "bad_certificate_status_response",
	115:                    "unknown_psk_identity",
	116:                    "certificate_required",
	120:                    "no_application_protocol",
}

// String returns the RFC's name of the alert.
func (a Alert) String() string {
	if s, ok := alertNames[a]; ok {
		return s
	}
	return fmt.Sprintf("alert %d", uint8(a))
}

// AlertError is a fatal alert that ended the session: received from the peer, or
// (Sent) sent to it by us because of what it did.
type AlertError struct {
	Alert Alert
	Sent  bool
	What  string // when sent: what the peer did
}

// Error names the alert and who sent it.
func (e *AlertError) Error() string {
	if !e.Sent {
		return "the peer ended the session with alert " + e.Alert.String()
	}
	return fmt.Sprintf("session ended with alert %s: %s", e.Alert, e.What)
}

// ErrTruncated is FIN without close_notify: the peer died, or someone on the way
// cut the stream. errors.Is(err, io.ErrUnexpectedEOF) holds too.
var ErrTruncated = fmt.Errorf("connection ended without close_notify: %w", io.ErrUnexpectedEOF)

var (
	// ErrKeyUpdateUnsupported ends a session whose peer sent a KeyUpdate to a record
	// layer that cannot change keys. close_notify was sent.
	ErrKeyUpdateUnsupported = errors.New("the peer sent a KeyUpdate and this kernel cannot change keys (6.14 or newer can); session closed")
	// ErrKeyLimit ends a session whose key was used as often as is safe and cannot be
	// changed (TLS 1.2, or a kernel without rekey). close_notify was sent.
	ErrKeyLimit = errors.New("the limit of use of the session's key is reached and it cannot be changed; session closed")
	// ErrQueueFull is returned by QueueWrite above MaxQueued bytes.
	ErrQueueFull = fmt.Errorf("more than %d bytes of output are queued", MaxQueued)
	// ErrUnsupportedSuite is a configuration or session without a suite this package
	// can carry: the AEAD suites of TLS 1.3, and of TLS 1.2 with ECDHE.
	ErrUnsupportedSuite = errors.New("no cipher suite this package can carry (AEAD suites of TLS 1.3, of TLS 1.2 with ECDHE)")
	// ErrNoKernelTLS is returned in ModeKernel when the kernel cannot carry a session.
	ErrNoKernelTLS = errors.New("kernel TLS is not available")
	// ErrNoSoftware is returned where the software layer cannot work:
	// GODEBUG=fips140=only refuses AES-GCM with nonces made by the caller.
	ErrNoSoftware = errors.New("the software record layer is unavailable with GODEBUG=fips140=only")
	// ErrNoSecrets is returned by MarshalSecrets when this process never had them: a
	// session imported in the kernel layer.
	ErrNoSecrets = errors.New("this process does not have the session's secrets")
	// ErrModeOff is returned by Server and Client in ModeOff.
	ErrModeOff = errors.New("mode off: no TLS session is made")
)

// Stage says how far a handshake got.
type Stage uint8

const (
	StageHello     Stage = iota // waiting for, or reading, the first record
	StageHandshake              // negotiating
	StageOffload                // established; moving to the record layer
)

// String returns "hello", "handshake" or "offload".
func (s Stage) String() string {
	switch s {
	case StageHello:
		return "hello"
	case StageHandshake:
		return "handshake"
	case StageOffload:
		return "offload"
	}
	return fmt.Sprintf("stage(%d)", uint8(s))
}

// HandshakeError is a connection that did not become a session. The connection is
// closed.
type HandshakeError struct {
	Stage  Stage
	Remote string // the peer's address
	Err    error

	timeout, notTLS, gone bool
}

// Error says who, when and why.
func (e *HandshakeError) Error() string {
	switch {
	case e.notTLS:
		return fmt.Sprintf("%s: the peer does not speak TLS", e.Remote)
	case e.timeout:
		return fmt.Sprintf("%s: handshake not finished in time (stage %s)", e.Remote, e.Stage)
	}
	return fmt.Sprintf("%s: handshake failed (stage %s): %v", e.Remote, e.Stage, e.Err)
}

// Unwrap returns the cause.
func (e *HandshakeError) Unwrap() error { return e.Err }

// Timeout reports that HandshakeTimeout or the context's deadline ended it.
func (e *HandshakeError) Timeout() bool { return e.timeout }

// Temporary is false; it is here because net.Error asks for it.
func (e *HandshakeError) Temporary() bool { return false }

// NotTLS reports that the first bytes were not a TLS record.
func (e *HandshakeError) NotTLS() bool { return e.notTLS }

// Gone reports that the peer closed the connection without an alert, as port
// scanners and health checks do.
func (e *HandshakeError) Gone() bool { return e.gone }
