package bogo

import (
	"fmt"
	"slices"
	"strings"

	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// options are what the runner asks of one connection.
type options struct {
	// The connection.
	port   string
	ipv6   bool
	shimID uint64
	server bool

	// The handshake.
	keyFile, certFile, trustCert string
	minVersion, maxVersion       uint16
	noTLS12, noTLS13             bool
	hostName                     string
	advertiseALPN, selectALPN    string
	declineALPN, rejectALPN      bool
	curves                       []uint16
	requireClientCert            bool
	verifyPeer                   bool
	verifyPrefs                  []uint16
	noTicket                     bool
	earlyCallback                bool
	resumptionDelay              int // seconds that pass before each resumption

	// What the handshake should have come to.
	expectVersion        uint16
	expectALPN           string
	expectServerName     string
	expectAdvertisedALPN string
	expectCurve          uint16
	expectSessionMiss    bool
	expectHRR            bool
	expectNoHRR          bool
	expectTotalReneg     int

	// The session.
	async                 bool
	writesFirst           bool
	shutsDown             bool
	checkCloseNotify      bool
	keyUpdate             bool
	keyUpdateBeforeRead   bool
	sendAlert             bool
	peekThenRead          bool
	readSize              int
	unfinishedWrite       bool
	differentRecordSizes  bool
	exportKeyingMaterial  int
	exportLabel           string
	exportContext         string
	useExportContext      bool
	exportTrafficSecrets  bool
	tlsUnique             bool
	expectTicketRenewal   bool
	expectNoSession       bool
	resumeCount           int
	isHandshakerSupported bool

	// Ours, given by -shim-extra-flags: the record layer, and whether the session
	// moves (Detach, Import) before every read.
	mode ktls.Mode
	move bool
}

// unimplementedError is a flag this shim does not know. The process then exits
// with 89, and the runner counts the test as not run.
type unimplementedError string

func (e unimplementedError) Error() string { return "flag " + string(e) + " is not implemented" }

// setting is one flag as it was given.
type setting struct {
	name  string
	value string
	def   flagDef
}

// Scopes of a flag: some are for the first connection only, some for those that
// resume it.
const (
	prefixInitial = "on-initial-"
	prefixResume  = "on-resume-"
)

// command is a parsed command line: settings for every connection.
type command struct {
	all, initial, resume []setting
}

// parse reads the runner's flags: -name or -name value, and nothing else.
func parse(args []string) (*command, error) {
	c := &command{}
	for i := 0; i < len(args); i++ {
		name, ok := strings.CutPrefix(args[i], "-")
		if !ok {
			return nil, fmt.Errorf("argument %q: not a flag", args[i])
		}
		name = strings.TrimPrefix(name, "-")
		list := &c.all
		if n, ok := strings.CutPrefix(name, prefixInitial); ok {
			name, list = n, &c.initial
		} else if n, ok := strings.CutPrefix(name, prefixResume); ok {
			name, list = n, &c.resume
		}
		def, ok := flagDefs[name]
		if !ok {
			return nil, unimplementedError(args[i])
		}
		s := setting{name: name, def: def}
		if def.set != nil {
			if i++; i >= len(args) {
				return nil, fmt.Errorf("flag -%s has no value", name)
			}
			s.value = args[i]
		}
		*list = append(*list, s)
	}
	// Every value is checked once, before anything is done.
	for _, resumed := range []bool{false, true} {
		if _, err := c.options(resumed); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// options are those of the first connection, or of one that resumes.
func (c *command) options(resumed bool) (*options, error) {
	o := &options{maxVersion: 0x0304, mode: ktls.ModeSoftware, readSize: 512}
	scoped := c.initial
	if resumed {
		scoped = c.resume
	}
	for _, s := range slices.Concat(c.all, scoped) {
		if s.def.set == nil {
			s.def.on(o)
			continue
		}
		if err := s.def.set(o, s.value); err != nil {
			return nil, fmt.Errorf("flag -%s %q: %w", s.name, s.value, err)
		}
	}
	return o, o.check()
}

// check refuses combinations that crypto/tls has no public API for.
func (o *options) check() error {
	if len(o.verifyPrefs) > 0 && !(o.server && !o.requireClientCert && !o.verifyPeer) {
		// A server that asks for no certificate has none to verify, so there the flag
		// asks for nothing.
		return unimplementedError("-verify-prefs")
	}
	return nil
}
