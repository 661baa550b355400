package main

import (
	"errors"
	"fmt"
)

// Exit codes, the same for every command; docs/cli.md and the help say them.
const (
	exitOK      = 0
	exitFailed  = 1 // failed, refused, or rolled back; nothing was lost
	exitUsage   = 2
	exitLost    = 3 // something was lost
	exitStay    = 4 // some sessions stay where they are, or with their old keys, for now
	exitSignal  = 130
	exitCodeDoc = `Exit codes:
  0  done (upgrade: everything moved)
  1  failed, refused or rolled back; nothing was lost
  2  the command line is wrong
  3  something was lost
  4  upgrade, scale, drain, rebalance: some sessions stay where they are for
     now; rekey: with their old keys
130  upgrade, scale, drain, rebalance, rekey, demo: interrupted by a signal; what
     was begun, but for the demo, goes on`
)

// codedError ends the command with a code. Without an error nothing more is
// printed: the command has said it all.
type codedError struct {
	code int
	err  error
}

func (e *codedError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *codedError) Unwrap() error { return e.err }

// usagef is a wrong command line that cobra cannot see.
func usagef(format string, args ...any) error {
	return &codedError{exitUsage, fmt.Errorf(format, args...)}
}

// quietly ends the command with a code and no message.
func quietly(code int) error {
	if code == exitOK {
		return nil
	}
	return &codedError{code: code}
}

// exitCode prints what is left to say about err and returns the exit code.
func (a *app) exitCode(err error) int {
	if err == nil {
		return exitOK
	}
	code := exitFailed
	var coded *codedError
	switch {
	case errors.As(err, &coded):
		code = coded.code
		if coded.err == nil {
			return code
		}
	case !a.ran:
		// Whatever cobra finds wrong before a command runs is the command line.
		code = exitUsage
	}
	fmt.Fprintf(a.err, "ktlsvisor: %v\n", err)
	if code == exitUsage {
		fmt.Fprintf(a.err, "Try %q.\n", a.helpHint())
	}
	return code
}
