package admin

import (
	"errors"
	"fmt"
	"time"
)

// Errors that callers decide on. Those that the server reports keep their
// identity across the socket (errors.Is).
var (
	// ErrBusy: another operation runs; nothing was started. BusyError says which.
	ErrBusy = errors.New("another operation is running")
	// ErrNotRunning: nothing listens on the admin socket.
	ErrNotRunning = errors.New("no ktlsvisor runs")
	// ErrForbidden: this process's uid may not use the socket.
	ErrForbidden = errors.New("not allowed to use the admin socket")
	// ErrInterrupted: the supervisor went away before it answered; what became of
	// the operation is not known.
	ErrInterrupted = errors.New("the supervisor went away before it answered")
	// ErrBadRequest: the request itself is wrong; nothing was started.
	ErrBadRequest = errors.New("bad request")
	// ErrEnding: the supervisor is being replaced and its successor will answer;
	// nothing was started. The client asks again, for up to 2 s.
	ErrEnding = errors.New("this supervisor is being replaced; ask again")
	// ErrInUse: Listen found another ktlsvisor on its path.
	ErrInUse = errors.New("admin socket in use")
)

// BusyError is what a Backend returns while an upgrade of Pool (of the supervisor
// itself when Pool is empty) is running. It is an ErrBusy.
type BusyError struct {
	Pool  string
	What  string // scale, drain, rebalance; empty: an upgrade
	Since time.Time
}

func (e *BusyError) Error() string {
	what := "the supervisor"
	if e.Pool != "" {
		what = "pool " + e.Pool
	}
	op := "an upgrade"
	if e.What != "" && e.What != "upgrade" {
		op = "a " + e.What
	}
	if e.Since.IsZero() {
		return op + " of " + what + " is running"
	}
	return fmt.Sprintf("%s of %s is running since %s (%s ago)", op, what,
		e.Since.Format(time.TimeOnly), time.Since(e.Since).Round(100*time.Millisecond))
}

// Is makes every BusyError an ErrBusy.
func (e *BusyError) Is(target error) bool { return target == ErrBusy }

// Codes of errorBody.
const (
	codeBusy       = "busy"
	codeForbidden  = "forbidden"
	codeBadRequest = "bad_request"
	codeNotFound   = "not_found"
	codeEnding     = "ending"
	codeFailed     = "failed"
)

// errorBody is an error as the API sends it.
type errorBody struct {
	Code    string `json:"code"`
	Message string `json:"message"`
}

// remoteError is an errorBody on the client's side.
type remoteError struct{ errorBody }

func (e *remoteError) Error() string { return e.Message }

// Is gives an error the identity that it had on the server.
func (e *remoteError) Is(target error) bool {
	switch e.Code {
	case codeBusy:
		return target == ErrBusy
	case codeForbidden:
		return target == ErrForbidden
	case codeEnding:
		return target == ErrEnding
	case codeBadRequest, codeNotFound:
		return target == ErrBadRequest
	}
	return false
}

func bodyOf(err error) errorBody {
	code := codeFailed
	switch {
	case errors.Is(err, ErrBusy):
		code = codeBusy
	case errors.Is(err, ErrForbidden):
		code = codeForbidden
	case errors.Is(err, ErrEnding):
		code = codeEnding
	case errors.Is(err, ErrBadRequest):
		code = codeBadRequest
	}
	return errorBody{Code: code, Message: err.Error()}
}
