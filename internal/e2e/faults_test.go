package e2e

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/e2e/faults"
)

// coreFaults are the cases that are always run; `make faults` runs all there are.
var coreFaults = []string{
	"upgrade: old before-send-PARKED 1 drop",
	"upgrade: old after-send-PARKED 1 stop",
	"upgrade: new before-import 1 nofile",
	"upgrade: supervisor after-send-FREEZE 1 nofile",
	"upgrade: new before-send-ADOPTED 1 kill",
	"upgrade: supervisor before-send-ADOPT 1 fail=ETOOMANYREFS",
	"upgrade: supervisor recv-ADOPTED 1 peer-reset",
	"upgrade: supervisor before-ledger 1 kill",
	"upgrade: supervisor half-ledger 1 kill",
	"upgrade: supervisor after-ledger 1 kill",
	"upgrade: supervisor before-send-RELEASE 1 drop",
	"upgrade: new recv-RESUME 1 close",
	"exact: old half-register 5 kill",
	"exact: old after-socket-send 5 kill",
	"committed: new after-send-ADOPTED 1 kill",
	"succession: successor before-send-INVENTORY 1 kill",
	"restart: supervisor handled-INVENTORY_REPLY 1 kill",
}

// drawnFaults is how many of all others are run, drawn anew each time.
const drawnFaults = 6

// What docs/faults.md says of every fault at every step, for some of them.
func TestHostFaults(t *testing.T) {
	o := faults.Options{Layer: "software", Dir: workDir, Patience: patience}
	dir := tempDir(t)
	build(t, "cmd/ktlsvisor", dir[len(workDir)+1:]+"/ktlsvisor", false, "-tags=fault")
	build(t, "examples/echo", dir[len(workDir)+1:]+"/echo", false, "-tags=fault")
	build(t, "examples/committing", dir[len(workDir)+1:]+"/committing", false, "-tags=fault")
	o.Bin = dir
	var cases []faults.Case
	for _, text := range coreFaults {
		c, err := faults.ParseCase(text)
		if err != nil {
			t.Fatal(err)
		}
		cases = append(cases, c)
	}
	traced := o
	traced.Trace = true
	r := faults.Run(t.Context(), traced, faults.Case{Op: faults.Upgrade})
	if len(r.Wrong) > 0 || len(r.Steps) < 40 {
		t.Fatalf("an upgrade without a fault passes %d steps: %v\n%s", len(r.Steps), r.Wrong, r.Log)
	}
	others := faults.Cases(faults.Upgrade, r.Steps, true)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	for range drawnFaults {
		cases = append(cases, others[rng.IntN(len(others))])
	}
	turn := make(chan struct{}, 3)
	for _, c := range cases {
		t.Run(c.String(), func(t *testing.T) {
			t.Parallel()
			turn <- struct{}{}
			defer func() { <-turn }()
			r := faults.Run(context.WithoutCancel(t.Context()), o, c)
			for n := 0; !r.Reached && len(r.Wrong) == 0 && n < 2; n++ { // how many messages there are depends on the moment
				r = faults.Run(context.WithoutCancel(t.Context()), o, c)
			}
			t.Logf("%s in %v", r.Outcome(), r.Took.Round(time.Millisecond))
			if len(r.Wrong) > 0 {
				t.Errorf("%v\n%s", r.Wrong, r.Log)
			}
		})
	}
}

// The steps cost nothing where nobody asked for them: programs as they are shipped do
// not even have the name of the variable.
func TestHostFaultsAreNotInPrograms(t *testing.T) {
	for _, name := range []string{"cmd/ktlsvisor", "examples/echo"} {
		b, err := os.ReadFile(build(t, name, name[len(name)-4:]+"-shipped", false))
		if err != nil {
			t.Fatal(err)
		}
		for _, text := range []string{"FAULT_DIR", "before-send-"} {
			if bytes.Contains(b, []byte(text)) {
				t.Errorf("%s has %q", name, text)
			}
		}
	}
}
