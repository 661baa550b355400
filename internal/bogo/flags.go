package bogo

import (
	"strconv"

	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// flagDef is what a flag does: on when it has no value, else set.
type flagDef struct {
	on  func(*options)
	set func(*options, string) error
}

// flagDefs are the flags this shim implements. Some change nothing here, because
// ktls always does what they ask for: it handshakes before there is a Conn, and a
// finished handshake cannot be run again.
var flagDefs = map[string]flagDef{
	"port":    text(func(o *options) *string { return &o.port }),
	"ipv6":    toggle(func(o *options) *bool { return &o.ipv6 }),
	"server":  toggle(func(o *options) *bool { return &o.server }),
	"shim-id": {set: func(o *options, v string) (err error) { o.shimID, err = strconv.ParseUint(v, 10, 64); return err }},

	"key-file":   text(func(o *options) *string { return &o.keyFile }),
	"cert-file":  text(func(o *options) *string { return &o.certFile }),
	"trust-cert": text(func(o *options) *string { return &o.trustCert }),

	"min-version": code(func(o *options) *uint16 { return &o.minVersion }),
	"max-version": code(func(o *options) *uint16 { return &o.maxVersion }),
	"no-tls1":     nothing,
	"no-tls11":    nothing,
	"no-tls12":    toggle(func(o *options) *bool { return &o.noTLS12 }),
	"no-tls13":    toggle(func(o *options) *bool { return &o.noTLS13 }),

	"host-name":                      text(func(o *options) *string { return &o.hostName }),
	"advertise-alpn":                 text(func(o *options) *string { return &o.advertiseALPN }),
	"select-alpn":                    text(func(o *options) *string { return &o.selectALPN }),
	"decline-alpn":                   toggle(func(o *options) *bool { return &o.declineALPN }),
	"reject-alpn":                    toggle(func(o *options) *bool { return &o.rejectALPN }),
	"curves":                         codes(func(o *options) *[]uint16 { return &o.curves }),
	"require-any-client-certificate": toggle(func(o *options) *bool { return &o.requireClientCert }),
	"verify-peer":                    toggle(func(o *options) *bool { return &o.verifyPeer }),
	"verify-prefs":                   codes(func(o *options) *[]uint16 { return &o.verifyPrefs }),
	"no-ticket":                      toggle(func(o *options) *bool { return &o.noTicket }),
	"use-early-callback":             toggle(func(o *options) *bool { return &o.earlyCallback }),
	"resumption-delay":               number(func(o *options) *int { return &o.resumptionDelay }),
	"resume-count":                   number(func(o *options) *int { return &o.resumeCount }),

	"expect-version":              code(func(o *options) *uint16 { return &o.expectVersion }),
	"expect-alpn":                 text(func(o *options) *string { return &o.expectALPN }),
	"expect-server-name":          text(func(o *options) *string { return &o.expectServerName }),
	"expect-advertised-alpn":      text(func(o *options) *string { return &o.expectAdvertisedALPN }),
	"expect-curve-id":             code(func(o *options) *uint16 { return &o.expectCurve }),
	"expect-session-miss":         toggle(func(o *options) *bool { return &o.expectSessionMiss }),
	"expect-hrr":                  toggle(func(o *options) *bool { return &o.expectHRR }),
	"expect-no-hrr":               toggle(func(o *options) *bool { return &o.expectNoHRR }),
	"expect-total-renegotiations": number(func(o *options) *int { return &o.expectTotalReneg }),
	"expect-ticket-renewal":       toggle(func(o *options) *bool { return &o.expectTicketRenewal }),
	"expect-no-session":           toggle(func(o *options) *bool { return &o.expectNoSession }),

	"async":                 toggle(func(o *options) *bool { return &o.async }),
	"implicit-handshake":    nothing,
	"no-op-extra-handshake": nothing,
	"handshake-twice":       nothing,

	"shim-writes-first":            toggle(func(o *options) *bool { return &o.writesFirst }),
	"shim-shuts-down":              toggle(func(o *options) *bool { return &o.shutsDown }),
	"check-close-notify":           toggle(func(o *options) *bool { return &o.checkCloseNotify }),
	"key-update":                   toggle(func(o *options) *bool { return &o.keyUpdate }),
	"key-update-before-read":       toggle(func(o *options) *bool { return &o.keyUpdateBeforeRead }),
	"send-alert":                   toggle(func(o *options) *bool { return &o.sendAlert }),
	"peek-then-read":               toggle(func(o *options) *bool { return &o.peekThenRead }),
	"read-size":                    number(func(o *options) *int { return &o.readSize }),
	"read-with-unfinished-write":   toggle(func(o *options) *bool { return &o.unfinishedWrite }),
	"write-different-record-sizes": toggle(func(o *options) *bool { return &o.differentRecordSizes }),

	"export-keying-material": number(func(o *options) *int { return &o.exportKeyingMaterial }),
	"export-label":           text(func(o *options) *string { return &o.exportLabel }),
	"export-context":         text(func(o *options) *string { return &o.exportContext }),
	"use-export-context":     toggle(func(o *options) *bool { return &o.useExportContext }),
	"export-traffic-secrets": toggle(func(o *options) *bool { return &o.exportTrafficSecrets }),
	"tls-unique":             toggle(func(o *options) *bool { return &o.tlsUnique }),

	"expect-no-session-id": nothing, // crypto/tls has no cache of session ids
	// Every request to renegotiate is refused, and the session goes on.
	"renegotiate-ignore": nothing,
	"renegotiate-freely": nothing,

	"is-handshaker-supported": toggle(func(o *options) *bool { return &o.isHandshakerSupported }),
	"ktls-move":               toggle(func(o *options) *bool { return &o.move }),
	"ktls-mode":               {set: func(o *options, v string) (err error) { o.mode, err = ktls.ParseMode(v); return err }},
}

var nothing = flagDef{on: func(*options) {}}

func toggle(field func(*options) *bool) flagDef {
	return flagDef{on: func(o *options) { *field(o) = true }}
}

func text(field func(*options) *string) flagDef {
	return flagDef{set: func(o *options, v string) error { *field(o) = v; return nil }}
}

func number(field func(*options) *int) flagDef {
	return flagDef{set: func(o *options, v string) (err error) { *field(o), err = strconv.Atoi(v); return err }}
}

// code is a code point of the protocol: a version, a curve.
func code(field func(*options) *uint16) flagDef {
	return flagDef{set: func(o *options, v string) error {
		n, err := strconv.ParseUint(v, 10, 16)
		*field(o) = uint16(n)
		return err
	}}
}

// codes is a flag that may be given several times.
func codes(field func(*options) *[]uint16) flagDef {
	return flagDef{set: func(o *options, v string) error {
		n, err := strconv.ParseUint(v, 10, 16)
		*field(o) = append(*field(o), uint16(n))
		return err
	}}
}
