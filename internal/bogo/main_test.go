package bogo

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
)

// The test binary is also the shim, and a runner that runs nothing.
const (
	roleVar    = "KTLSVISOR_BOGO_ROLE"
	roleShim   = "shim"
	roleRunner = "runner"
	roleSilent = "silent" // a runner that dies
)

func TestMain(m *testing.M) {
	switch os.Getenv(roleVar) {
	case roleShim:
		os.Exit(Shim(os.Args[1:], os.Stdout, os.Stderr))
	case roleRunner:
		os.Exit(fakeRunner(os.Args[1:]))
	case roleSilent:
		fmt.Println("no tests here")
		os.Exit(3)
	}
	os.Exit(m.Run())
}

// fakeRunner says of every test that it passed, or did not when its name says so,
// and repeats its flags as the error.
func fakeRunner(args []string) int {
	fs := flag.NewFlagSet("runner", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	tests, out, extra := fs.String("test", "", ""), fs.String("json-output", "", ""), fs.String("shim-extra-flags", "", "")
	for _, name := range []string{"shim-path", "shim-config", "idle-timeout", "num-workers"} {
		fs.String(name, "", "")
	}
	for _, name := range []string{"pipe", "allow-unimplemented"} {
		fs.Bool(name, false, "")
	}
	if err := fs.Parse(args); err != nil {
		return 2
	}
	results := map[string]map[string]string{}
	for name := range strings.SplitSeq(*tests, ";") {
		actual := "PASS"
		if strings.Contains(name, "Bad") {
			actual = "FAIL"
		}
		results[name] = map[string]string{"actual": actual, "error": *extra}
	}
	data, err := json.Marshal(map[string]any{"version": 3, "tests": results})
	if err != nil || os.WriteFile(*out, data, 0o600) != nil {
		return 2
	}
	return 1
}
