package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os/exec"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

var update = flag.Bool("update", false, "write what the commands say into the scripts' golden files")

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"ktlsvisor": main})
}

// TestScript is the command-line contract of docs/cli.md, as a user types it.
func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			e.Setenv("KTLSVISOR_ADMIN", e.WorkDir+"/a.sock")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":      cmdExits,
			"eventually": cmdEventually,
			"terminate":  cmdTerminate,
			"listener":   cmdListener,
		},
		Condition: func(cond string) (bool, error) {
			if cond != "ktls" {
				return false, fmt.Errorf("unknown condition %q", cond)
			}
			return ktls.Probe().KernelTLS, nil
		},
		UpdateScripts:       *update,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
	})
}

// cmdExits runs a command that has to exit with a certain code:
//
//	exits CODE COMMAND [ARG...]
func cmdExits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND [ARG...]")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := exitCode(ts, ts.Exec(args[1], args[2:]...))
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

func exitCode(ts *testscript.TestScript, err error) int {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	ts.Check(err)
	return -1
}

// cmdEventually repeats a command until it succeeds, for up to 20 s: it is for the
// start and the end of other processes.
func cmdEventually(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 1 {
		ts.Fatalf("usage: [!] eventually COMMAND [ARG...]")
	}
	deadline := time.Now().Add(20 * time.Second)
	for {
		if (ts.Exec(args[0], args[1:]...) == nil) != neg {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%v: not as wanted within 20 s", args)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// cmdTerminate sends SIGTERM to what runs in the background; testscript's kill
// knows SIGINT and SIGKILL only.
func cmdTerminate(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) > 0 {
		ts.Fatalf("usage: terminate")
	}
	for _, c := range ts.BackgroundCmds() {
		ts.Check(c.Process.Signal(syscall.SIGTERM))
	}
}

// cmdListener sets ADDR to the first listener's address, from "status --json".
func cmdListener(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) > 0 {
		ts.Fatalf("usage: listener")
	}
	ts.Check(ts.Exec("ktlsvisor", "status", "--json"))
	var st admin.Status
	ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &st))
	if len(st.Listeners) == 0 {
		ts.Fatalf("no listener")
	}
	ts.Setenv("ADDR", st.Listeners[0].Address)
}
