package archtest

// rule says which packages of the project a package may import. A package has the
// rule whose path is the longest that it equals or is below.
type rule struct {
	path string
	may  []string
	why  string
	// not names packages of the standard library that would break what the
	// package promises.
	not []string
}

var public = []string{"handoff", "ktls", "state", "pidfd"}

// rules go from the bottom up, so that every rule names only what comes before it.
var rules = []rule{
	{path: "internal/sys", why: "it is the kernel edge and decides nothing: whatever it needed of ours would be a decision"},
	{path: "internal/fault", why: "what is made to fail must not be what makes it fail"},
	{path: "internal/plaincbor", why: "it is a form of bytes and knows nothing of what they mean", not: []string{"reflect", "unsafe"}},
	{path: "internal/testlog", why: "the tests of any package use it"},
	{path: "internal/archtest", why: "it looks at the others from outside"},
	{path: "internal/vmtest/spec", why: "it is shared by the host and the init of a guest, and holds types only"},
	{path: "internal/vmtest/guest", may: []string{"internal/sys"}, why: "the tests of every package import it"},
	{path: "internal/vmtest/guestcheck", may: []string{"internal/sys"}, why: "when it fails the guest must be at fault, not a package of ours"},
	{path: "internal/vmtest/init", may: []string{"internal/sys", "internal/vmtest/spec"}, why: "process 1 of a guest must not depend on what is tested in it"},
	{path: "internal/vmtest/cmd", may: []string{"internal/vmtest"}, why: "it is the runner's command line and nothing else"},
	{path: "internal/vmtest", may: []string{"internal/sys", "internal/vmtest/spec", "internal/vmtest/guest"}, why: "the judge must not depend on what is judged"},

	{path: "state", why: "it is for versioned state alone, and works where there are no descriptors and no system calls",
		not: []string{"net", "os", "syscall", "unsafe"}},
	{path: "pidfd", may: []string{"internal/sys"}, why: "it is useful without the rest"},
	{path: "ktls", may: []string{"internal/fault", "internal/plaincbor", "internal/sys"}, why: "a program may want the movable record layer and move nothing; the handshake is crypto/tls as it is, reached by its public API only",
		not: []string{"reflect", "unsafe"}},
	{path: "internal/wire", may: []string{"internal/fault", "internal/plaincbor", "internal/sys"}, why: "both sides of a control channel share it, so it knows neither"},
	{path: "handoff", may: []string{"internal/fault", "internal/sys", "internal/wire", "ktls", "pidfd", "state"}, why: "workers embed it: it must not bring the supervisor along"},

	{path: "internal/ownership", may: []string{"internal/wire"}, why: "it decides and does nothing: only then can it be run through every schedule",
		not: []string{"net", "os", "syscall", "unsafe"}},
	{path: "internal/keeper", may: []string{"internal/fault", "internal/sys"}, why: "the keeper outlives every fault of what is above it, which holds only as long as it knows nothing of that"},
	{path: "internal/config", why: "reading a file must work without any of the machinery that the file configures"},
	{path: "internal/admin", may: []string{"internal/sys"}, why: "clients of the admin API must not bring the supervisor along"},
	{path: "internal/load", may: []string{"internal/sys"}, why: "the clients that check every byte must share no code with what they check"},
	{path: "internal/supervise", may: append([]string{"internal/admin", "internal/config", "internal/fault", "internal/keeper", "internal/ownership", "internal/plaincbor", "internal/sys", "internal/wire"}, public...),
		why: "only the command line, the demo and the end-to-end tests stand above the supervisor"},

	{path: "examples", may: public, why: "an example shows what a stranger can write, and a stranger cannot import internal packages"},
	{path: "internal/demo", may: append([]string{"internal/admin", "internal/config", "internal/keeper", "internal/load", "internal/supervise", "internal/sys"}, public...),
		why: "it stands just below the command line"},
	{path: "cmd/ktlsvisor", may: append([]string{"internal/admin", "internal/config", "internal/demo", "internal/keeper", "internal/load", "internal/supervise", "internal/sys"}, public...),
		why: "the command line is above everything but knows nothing of messages or of tests"},
	{path: "internal/bogo", may: []string{"internal/sys", "ktls"}, why: "the shim shows to BoringSSL's runner what ktls does, and nothing else may take part"},
	{path: "internal/bogo/cmd", may: []string{"internal/bogo", "internal/vmtest"}, why: "it is the command line of the shim and of the driver, which also runs in a guest"},
	{path: "internal/e2e/visor", may: []string{"internal/admin", "pidfd"}, why: "it runs ktlsvisor as its users do"},
	{path: "internal/e2e/faults", may: []string{"internal/admin", "internal/e2e/visor", "internal/fault", "internal/load", "internal/sys", "internal/vmtest", "ktls"}, why: "it makes ktlsvisor fail from outside, and judges by what its users see"},
	{path: "internal/e2e/soak", may: []string{"internal/admin", "internal/e2e/visor", "internal/load"}, why: "it looks at ktlsvisor as its users do"},
	{path: "internal/e2e", may: append([]string{"internal/admin", "internal/config", "internal/demo", "internal/e2e/faults", "internal/e2e/soak", "internal/e2e/visor", "internal/keeper", "internal/load", "internal/supervise", "internal/sys", "internal/vmtest", "internal/wire"}, public...),
		why: "the end-to-end tests stand above everything"},
	{path: "internal/bench", may: []string{"handoff", "internal/admin", "internal/config", "internal/e2e/visor", "internal/keeper", "internal/supervise", "internal/sys", "internal/vmtest", "ktls"},
		why: "it measures from outside what users run; only for moves it plays all parts of a unit itself, because its sessions come without handshakes"},
}

// testsMay is what the tests of any package may import as well.
var testsMay = []string{"internal/load", "internal/testlog", "internal/vmtest/guest"}
