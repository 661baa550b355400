package bogo

import (
	"context"
	"errors"
	"strings"
	"testing"
)

// A flag that is not known must never be ignored: the test would seem to pass.
func TestShimExitCodes(t *testing.T) {
	for _, tc := range []struct {
		args string
		code int
	}{
		{"-is-handshaker-supported", exitOK},
		{"-no-such-flag", exitUnimplemented},
		{"-server -on-resume-no-such-flag", exitUnimplemented},
		{"-on-retry-verify-peer", exitUnimplemented},
		{"-enable-early-data", exitUnimplemented},
		{"-verify-prefs 2055", exitUnimplemented},
		{"-port", exitFailed},
		{"-shim-id many", exitFailed},
		{"-on-resume-expect-version many", exitFailed},
		{"-expect-version 65536", exitFailed},
		{"server", exitFailed},
		{"-port 1 -no-tls12 -no-tls13", exitFailed},
	} {
		ctx, cancel := context.WithTimeout(context.Background(), wait)
		s := runShim(ctx, t, strings.Fields(tc.args)...)
		if err := s.cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if code, said := s.exit(); code != tc.code || (code == 0) != (said == "") {
			t.Errorf("%s: exit code %d, %q; expected %d", tc.args, code, said, tc.code)
		}
		cancel()
	}
}

func TestScopesOfFlags(t *testing.T) {
	c, err := parse(strings.Fields("-server -on-initial-expect-version 771 -on-resume-no-ticket -expect-curve-id 23 -on-resume-expect-curve-id 24"))
	if err != nil {
		t.Fatal(err)
	}
	first, err1 := c.options(false)
	later, err2 := c.options(true)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	if !first.server || !later.server {
		t.Error("a flag for all connections is not for all")
	}
	if first.expectVersion != 771 || later.expectVersion != 0 {
		t.Error("-on-initial- is not for the first connection only")
	}
	if first.noTicket || !later.noTicket || first.expectCurve != 23 || later.expectCurve != 24 {
		t.Error("-on-resume- is not for the later connections only, over the general one")
	}
}

func TestProtocols(t *testing.T) {
	got, err := protocols("\x03foo\x02h2")
	if err != nil || strings.Join(got, ",") != "foo,h2" {
		t.Error(got, err)
	}
	for _, bad := range []string{"\x04foo", "\x00", "\x01a\x00"} {
		if got, err := protocols(bad); err == nil {
			t.Errorf("%q: %q", bad, got)
		}
	}
}
