package vmtest

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// wantModules are the modules that kernel TLS may need, under the names they had
// over the years: a guest has no modprobe that the kernel could call for more. Only
// tls must be there; what else is no module of some kernel is built in, or was
// renamed, and then the tests of that cipher tell.
var wantModules = []string{
	"tls",
	"aesni-intel", "ctr", "gcm", "ghash-generic", "ghash-clmulni-intel",
	"ccm", "cmac",
	"chacha20poly1305", "chacha", "chacha_generic", "chacha-x86_64", "poly1305_generic", "poly1305-x86_64",
}

// moduleSet is a kernel's modules.dep: what each module needs.
type moduleSet struct {
	deps map[string][]string // path -> paths it needs, the deepest last
	path map[string]string   // name -> path
}

// moduleName is a module's name as the kernel knows it: without folder and
// suffix, with underscores.
func moduleName(path string) string {
	name := filepath.Base(path)
	if i := strings.Index(name, ".ko"); i >= 0 {
		name = name[:i]
	}
	return strings.ReplaceAll(name, "-", "_")
}

// parseModulesDep reads modules.dep (modules.dep(5)).
func parseModulesDep(r io.Reader) (*moduleSet, error) {
	m := &moduleSet{deps: map[string][]string{}, path: map[string]string{}}
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 1<<20)
	for line := 1; sc.Scan(); line++ {
		if strings.TrimSpace(sc.Text()) == "" {
			continue
		}
		file, needs, ok := strings.Cut(sc.Text(), ":")
		if !ok {
			return nil, fmt.Errorf("modules.dep line %d: no colon in %q", line, sc.Text())
		}
		m.deps[file] = strings.Fields(needs)
		m.path[moduleName(file)] = file
	}
	return m, sc.Err()
}

// order returns the files to load for the wanted modules, each after what it
// needs, and the names that this kernel does not have as modules. Modules named
// in without are left out, as are the modules that need them.
func (m *moduleSet) order(want, without []string) (files, missing []string) {
	left := map[string]bool{}
	for _, name := range without {
		left[moduleName(name)] = true
	}
	done := map[string]bool{}
	// add reports whether file could be added.
	var add func(file string) bool
	add = func(file string) bool {
		if left[moduleName(file)] {
			return false
		}
		if ok, seen := done[file]; seen {
			return ok
		}
		done[file] = true // also ends a circle, which depmod does not write
		for _, need := range m.deps[file] {
			if !add(need) {
				done[file] = false
				return false
			}
		}
		files = append(files, file)
		return true
	}
	for _, name := range want {
		file, ok := m.path[moduleName(name)]
		if !ok || !add(file) {
			missing = append(missing, name)
		}
	}
	return files, missing
}

// readModules reads modules.dep of a module folder (lib/modules/VERSION).
func readModules(dir string) (*moduleSet, error) {
	f, err := os.Open(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return nil, fmt.Errorf("kernel modules in %s (run depmod there?): %w", dir, err)
	}
	defer func() { _ = f.Close() }()
	return parseModulesDep(f)
}
