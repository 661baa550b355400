package e2e

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// rolePrefix begins the names under which this test program is a worker that
// misbehaves: a link of that name is the worker's program. So one program is all
// that a guest needs, and a pool's command can become another by an upgrade.
const rolePrefix = "as-"

// roles maps the rest of the name to what it does; it returns the exit code.
var roles = map[string]func() int{}

func playRole(name string) int {
	f, ok := roles[name]
	if !ok {
		fmt.Fprintln(os.Stderr, "no such role:", name)
		return 99
	}
	return f()
}

// role is the path of a program that plays it.
func role(t *testing.T, name string) string {
	t.Helper()
	if _, ok := roles[name]; !ok {
		t.Fatalf("no such role: %s; there are %s", name, strings.Join(slices.Sorted(maps.Keys(roles)), ", "))
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(tempDir(t), rolePrefix+name)
	if err := os.Symlink(self, path); err != nil {
		t.Fatal(err)
	}
	return path
}
