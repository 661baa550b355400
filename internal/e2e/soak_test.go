package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/e2e/soak"
)

// A short form of `make soak`: anything at any moment, drawn anew each time.
func TestHostSoak(t *testing.T) {
	r, log, err := soak.Run(t.Context(), soak.Options{Program: ktlsvisor(t), Worker: echo(t), Dir: tempDir(t), KillWorkers: true, Duration: 12 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	r.Print(&text)
	t.Log(text.String())
	if len(r.Wrong) > 0 {
		t.Errorf("%v\n%s", r.Wrong, log)
	}
	for _, bad := range []string{"DATA RACE", "panic:", "fatal error:"} {
		if strings.Contains(log, bad) {
			t.Errorf("the log has %q:\n%s", bad, log)
		}
	}
}
