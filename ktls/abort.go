package ktls

import (
	"fmt"
)

// Abort ends the session at once with a fatal alert of the caller's choice, such as
// access_denied (49) or certificate_revoked (44): both directions end, and later
// calls of Read and Write return the *AlertError. What was pending and not yet
// sealed is dropped. It does not wait for a Write in progress, which sends the alert
// when it ends. The caller still has to Close.
//
// An alert that is not fatal by its nature is refused: close_notify is CloseWrite's,
// and user_canceled and no_renegotiation end nothing (RFC 8446 section 6.1, RFC 5246
// section 7.2.2). So is a session that has ended already, with the reason.
func (c *Conn) Abort(alert Alert) error {
	switch alert {
	case alertCloseNotify, alertUserCanceled, alertNoRenegotiation:
		return fmt.Errorf("abort session: alert %s is not fatal", alert)
	}
	if f := c.fatal.Load(); f != nil {
		return fmt.Errorf("abort session: %w", *f)
	}
	err := c.fail(alert, "aborted by this side")
	if own, ok := err.(*AlertError); ok && own.Alert == alert && own.Sent { //nolint:errorlint // fail does not wrap
		return nil
	}
	return fmt.Errorf("abort session: %w", err)
}
