package sys

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// A process that wants small pages has them, and so have its children, but those that are
// started with LargePages; what an operator has decided holds for all of them.
func TestSmallPages(t *testing.T) {
	if step := os.Getenv("TEST_SMALL_PAGES"); step != "" {
		child(step)
		return
	}
	for start, want := range map[string]string{
		"ours":       "small small large",
		"operator's": "small small small",
	} {
		cmd := exec.Command(os.Args[0], "-test.run=^TestSmallPages$")
		cmd.Env = append(os.Environ(), "TEST_SMALL_PAGES="+start)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", start, err, out)
		}
		if got := strings.Join(strings.Fields(string(out)), " "); got != want {
			t.Errorf("%s: %q, want %q", start, got, want)
		}
	}
}

func child(step string) {
	word := "large"
	if step == "operator's" {
		_ = smallPagesOn()
	}
	if step != "look" {
		SmallPages()
	}
	if disabled() {
		word = "small"
	}
	os.Stdout.WriteString(word + "\n")
	if step == "look" {
		os.Exit(0)
	}
	again := func() error {
		cmd := exec.Command(os.Args[0], "-test.run=^TestSmallPages$")
		cmd.Env, cmd.Stdout, cmd.Stderr = append(os.Environ(), "TEST_SMALL_PAGES=look"), os.Stdout, os.Stderr
		if err := cmd.Start(); err != nil {
			return err
		}
		return cmd.Wait()
	}
	_ = again()
	_ = LargePages(again)
	if !disabled() {
		os.Stdout.WriteString("and the parent has large pages now\n")
	}
	os.Exit(0)
}
