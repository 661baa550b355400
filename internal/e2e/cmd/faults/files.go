package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"github.com/ktlsvisor/ktlsvisor/internal/e2e/faults"
)

// write writes what was asked for: the table, and the results for a later table.
func (c *command) write(sections []faults.Section) error {
	if c.json != "" {
		for _, s := range sections {
			for _, r := range s.Results {
				r.Log = "" // it has been printed
			}
		}
		b, err := json.Marshal(sections)
		if err == nil {
			err = os.WriteFile(c.json, b, 0o644)
		}
		if err != nil {
			return err
		}
	}
	if c.table == "" {
		return nil
	}
	f, err := os.Create(c.table)
	if err != nil {
		return err
	}
	faults.Markdown(f, sections)
	return f.Close()
}

// mergeAll makes one table of the results of several runs, such as those of this machine
// and of guests.
func (c *command) mergeAll() error {
	var all []faults.Section
	for name := range strings.SplitSeq(c.merge, ",") {
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		var list []faults.Section
		if err := json.Unmarshal(b, &list); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		all = append(all, list...)
	}
	c.json = ""
	return c.write(all)
}
