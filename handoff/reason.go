package handoff

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"syscall"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// reasonOf says why a session ended whose handler returned err. cause is the first
// error that Read or Write met, closed that the application called Close.
//
// What the peer did counts more than what the handler made of it: io.Copy returns nil
// after the peer's close_notify.
func reasonOf(err, cause error, closed, stopping bool) wire.Reason {
	if r := reasonOfError(cause); r != 0 {
		return r
	}
	var network *net.OpError
	switch {
	case errors.As(cause, &network):
		return wire.ReasonPeerAbrupt
	case stopping:
		return wire.ReasonOperator
	case closed || err == nil:
		return wire.ReasonOwner
	}
	if r := reasonOfError(err); r != 0 {
		return r
	}
	if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.Canceled) {
		return wire.ReasonOwner // its own time limit, its own doing
	}
	return wire.ReasonHandler
}

func reasonOfError(err error) wire.Reason {
	var alert *ktls.AlertError
	switch {
	case err == nil:
		return 0
	case errors.Is(err, ktls.ErrKeyUpdateUnsupported):
		return wire.ReasonKeyUpdate
	case errors.Is(err, ktls.ErrKeyLimit):
		return wire.ReasonKeyLimit
	case errors.As(err, &alert):
		return wire.ReasonProtocol
	case errors.Is(err, ktls.ErrTruncated), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE),
		errors.Is(err, syscall.ETIMEDOUT), errors.Is(err, syscall.EHOSTUNREACH):
		return wire.ReasonPeerAbrupt
	case errors.Is(err, io.EOF):
		return wire.ReasonPeer
	}
	return 0
}
