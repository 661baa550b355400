// Package spec is what the host writes into a test guest and what comes back:
// the one thing that the runner and the guest's init share.
//
// The way back is lines on the guest's second serial port:
//
//	kernel RELEASE          once, first
//	note TEXT               something worth telling, such as a module that did not load
//	begin PACKAGE           a test binary starts
//	|LINE                   one line of its output
//	end PACKAGE CODE SECS   it ended; CODE is its exit code, 128+N for signal N
//	exit N                  all done; absent when the kernel panicked
package spec

// Path is where the guest's init finds its Spec, as JSON.
const Path = "/etc/vmtest.json"

// Port is the serial port that results are written to.
const Port = "/dev/ttyS1"

// Spec is one boot.
type Spec struct {
	// Modules are module files in the order to load them.
	Modules []string `json:"modules"`
	// Env is added to the environment of every test binary.
	Env []string `json:"env"`
	// Tests run one after the other.
	Tests []Test `json:"tests"`
}

// Test is one test binary.
type Test struct {
	Package string   `json:"package"` // import path
	Binary  string   `json:"binary"`  // path in the guest
	Dir     string   `json:"dir"`     // working directory in the guest
	Args    []string `json:"args"`
	Seconds int      `json:"seconds"` // killed after that
}
