package vmtest

import "time"

// testPackage is a package whose tests run in guests.
type testPackage struct {
	path  string        // below the module
	run   string        // -test.run, "" for all
	skip  string        // -test.skip, besides hostOnly
	limit time.Duration // for the whole binary; 0 means defaultLimit
	progs bool          // its tests start the programs below
}

// hostOnly names the tests that no guest runs: those that need a compiler or
// programs that a guest does not have. They are left out by name, so that they
// cannot hide among skipped ones.
const hostOnly = "^TestHost"

const defaultLimit = 10 * time.Minute

// testPackages run in this order; those that have no tests yet are left out.
var testPackages = []testPackage{
	{path: "internal/vmtest/guestcheck"},
	{path: "internal/vmtest/guest"},
	{path: "internal/sys"},
	{path: "pidfd"},
	{path: "ktls"},
	{path: "ktls/ktlshttp"},
	// The rest of its tests is about flags and lists.
	{path: "internal/bogo", run: "^TestShimEchoes$"},
	{path: "internal/keeper"},
	{path: "handoff"},
	{path: "handoff/handoffhttp"},
	{path: "internal/demo", progs: true},
	{path: "internal/bench", run: "^TestKernel(Layer|Moves)$", progs: true, limit: 12 * time.Minute},
	// The rest of its tests is about the programs, not the kernel, and runs on the host.
	{path: "internal/e2e", run: "^TestKernelLayer", progs: true, limit: 12 * time.Minute},
}

// programs are built into the /bin of a guest in which a package wants them.
var programs = []string{"cmd/ktlsvisor", "examples/echo", "examples/chat", "examples/committing"}
