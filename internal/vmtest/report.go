package vmtest

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
)

// Good reports whether every guest was, and there was at least one test.
func Good(results []*BootResult) bool {
	program := false
	for _, b := range results {
		if len(b.Problems) > 0 {
			return false
		}
		program = program || b.program
	}
	return program || Total(results).Passed > 0
}

// Total counts the tests of all guests. A guest with a problem that is no failed
// test counts as one failure, so that "0 failed" is said of good runs only.
func Total(results []*BootResult) Counts {
	var sum Counts
	for _, b := range results {
		c := b.Counts()
		if len(b.Problems) > 0 && c.Failed == 0 {
			c.Failed = 1
		}
		sum.Add(c)
	}
	return sum
}

// Counts counts the tests of one guest.
func (b *BootResult) Counts() Counts {
	var sum Counts
	for _, p := range b.Packages {
		sum.Add(Count(p.Tests))
	}
	return sum
}

// Table prints one line for each guest, and the reason of every skip.
func Table(w io.Writer, results []*BootResult) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "kernel\trelease\tpackages\tpassed\tfailed\tskipped\tseconds\tresult")
	for _, b := range results {
		c := b.Counts()
		verdict := "ok"
		if len(b.Problems) > 0 {
			verdict = "FAILED"
		}
		fmt.Fprintf(t, "%s\t%s\t%d\t%d\t%d\t%d\t%.0f\t%s\n", b.Kernel, b.Release, len(b.Packages), c.Passed, c.Failed, c.Skipped, b.Seconds, verdict)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, b := range results {
		for _, p := range b.Packages {
			for _, r := range p.Tests {
				if r.Status == Skip {
					fmt.Fprintf(w, "%s: skipped %s %s: %s\n", b.Kernel, p.Package, r.Name, r.Reason)
				}
			}
		}
		for _, problem := range b.Problems {
			fmt.Fprintf(w, "%s: PROBLEM: %s\n", b.Kernel, problem)
		}
	}
	return nil
}

// WriteJSON writes everything to a file.
func WriteJSON(file string, results []*BootResult) error {
	data, err := json.MarshalIndent(struct {
		Good   bool          `json:"good"`
		Total  Counts        `json:"total"`
		Guests []*BootResult `json:"guests"`
	}{Good(results), Total(results), results}, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(data, '\n'), 0o644)
}
