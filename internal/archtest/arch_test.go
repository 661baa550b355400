package archtest

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const (
	root   = "../.."
	module = "github.com/ktlsvisor/ktlsvisor/"
)

// use is one import in one file.
type use struct {
	pkg    string // importing package, below the module
	file   string
	target string // import path
	test   bool
}

// uses reads the imports of every Go file below dir, whatever its build tags. It
// reads them in this process: `go test` would not see the files that a child
// process opens, and go on telling an old result from its cache.
func uses(dir string) ([]use, error) {
	var all []use
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() {
			if p != dir && (name == "testdata" || strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_")) {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), p, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		for _, i := range f.Imports {
			target, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				return err
			}
			all = append(all, use{pkg: path.Dir(rel), file: rel, target: target, test: strings.HasSuffix(name, "_test.go")})
		}
		return nil
	})
	return all, err
}

// below reports whether pkg is rule's path or below it.
func below(pkg, rule string) bool { return pkg == rule || strings.HasPrefix(pkg, rule+"/") }

func ruleFor(pkg string) (r rule, ok bool) {
	for _, c := range rules {
		if below(pkg, c.path) && len(c.path) > len(r.path) {
			r, ok = c, true
		}
	}
	return r, ok
}

// check says what is wrong with an import, "" if nothing is.
func check(u use) string {
	if below(u.target, "golang.org/x/sys") && u.pkg != "internal/sys" {
		return fmt.Sprintf("%s imports %s: only internal/sys may, so that every system call of the project is in one place, wrapped and documented once; put what you need there", u.file, u.target)
	}
	r, ok := ruleFor(u.pkg)
	if !ok {
		return fmt.Sprintf("%s: the package %s has no rule: give it one in internal/archtest/rules_test.go and a line in docs/ARCHITECTURE.md", u.file, u.pkg)
	}
	if slices.Contains(r.not, u.target) && !u.test {
		return fmt.Sprintf("%s imports %s, which %s may not: %s", u.file, u.target, r.path, r.why)
	}
	target, ours := strings.CutPrefix(u.target, module)
	if !ours || below(target, r.path) && !hasOwnRule(target, r.path) {
		return ""
	}
	may := r.may
	if u.test {
		may = append(slices.Clone(may), testsMay...)
		may = append(may, r.path)
	}
	for _, m := range may {
		if target == m || below(target, m) && !hasOwnRule(target, m) {
			return ""
		}
	}
	return fmt.Sprintf("%s imports %s, but %s may import of this project only %q: %s", u.file, target, r.path, r.may, r.why)
}

// hasOwnRule reports whether a rule more special than parent's covers pkg.
func hasOwnRule(pkg, parent string) bool {
	r, ok := ruleFor(pkg)
	return ok && r.path != parent
}

func TestImports(t *testing.T) {
	all, err := uses(root)
	if err != nil {
		t.Fatal(err)
	}
	if len(all) == 0 {
		t.Fatal("no Go files found")
	}
	for _, u := range all {
		if wrong := check(u); wrong != "" {
			t.Error(wrong)
		}
	}
}

// The keeper holds the memory in which secrets are, and never looks into it: it maps
// nothing.
func TestKeeperMapsNothing(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(root, "internal", "keeper", "*.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if pkg, ok := sel.X.(*ast.Ident); ok && pkg.Name == "sys" && (sel.Sel.Name == "MapShared" || sel.Sel.Name == "ReadSealedMemfd") {
				t.Errorf("%s uses sys.%s: the keeper must not see what is in the memory that it holds", file, sel.Sel.Name)
			}
			return true
		})
	}
}

// Every rule may name only what comes before it: then nothing can go round in a
// circle, and "downwards" means something.
func TestRulesPointDownwards(t *testing.T) {
	seen := map[string]bool{}
	for _, r := range rules {
		for _, m := range r.may {
			// Those of vmtest are listed from the most special to the whole.
			within := below(m, "internal/vmtest") && below(r.path, "internal/vmtest")
			if !seen[m] && !within {
				t.Errorf("%s may import %s, which comes later in the list", r.path, m)
			}
		}
		seen[r.path] = true
	}
}

var packageName = regexp.MustCompile("`([a-z0-9/]+)`")

// The packages that docs/ARCHITECTURE.md lists must have rules.
func TestDocumentedPackagesHaveRules(t *testing.T) {
	data, err := os.ReadFile(filepath.Join(root, "docs", "ARCHITECTURE.md"))
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for line := range strings.Lines(string(data)) {
		cell, ok := strings.CutPrefix(line, "| `")
		if !ok {
			continue
		}
		cell, _, _ = strings.Cut(cell, "|")
		for _, m := range packageName.FindAllStringSubmatch("`"+cell, -1) {
			found++
			if _, ok := ruleFor(m[1]); !ok {
				t.Errorf("docs/ARCHITECTURE.md lists %s, which has no rule in internal/archtest/rules_test.go", m[1])
			}
		}
	}
	if found < 10 {
		t.Errorf("found %d packages in the table of docs/ARCHITECTURE.md: has it changed its form?", found)
	}
}

// The rules themselves: what they must refuse and must let pass.
func TestCheck(t *testing.T) {
	for _, tc := range []struct {
		pkg, target string
		test        bool
		wrong       string // part of the message; "" when it is right
	}{
		{pkg: "internal/sys", target: "golang.org/x/sys/unix"},
		{pkg: "ktls", target: "golang.org/x/sys/unix", wrong: "only internal/sys"},
		{pkg: "ktls", target: "golang.org/x/sys/unix", test: true, wrong: "only internal/sys"},
		{pkg: "internal/keeper", target: "golang.org/x/sys/cpu", wrong: "only internal/sys"},
		{pkg: "ktls", target: "golang.org/x/crypto/chacha20poly1305"},
		{pkg: "ktls", target: module + "internal/sys"},
		{pkg: "ktls", target: module + "state", wrong: "movable record layer"},
		{pkg: "ktls", target: "unsafe", wrong: "public API"},
		{pkg: "ktls", target: "unsafe", test: true},
		{pkg: "state", target: "os", wrong: "no system calls"},
		{pkg: "state", target: module + "internal/sys", wrong: "no system calls"},
		{pkg: "internal/keeper", target: module + "internal/wire", wrong: "outlives"},
		{pkg: "internal/keeper", target: module + "internal/keeper", test: true},
		{pkg: "handoff", target: module + "internal/supervise", wrong: "workers embed it"},
		{pkg: "handoff", target: module + "internal/vmtest/guest", test: true},
		{pkg: "handoff", target: module + "internal/vmtest/guest", wrong: "workers embed it"},
		{pkg: "examples/chat", target: module + "handoff"},
		{pkg: "examples/chat", target: module + "internal/wire", wrong: "stranger"},
		{pkg: "internal/load/cmd/loadclient", target: module + "internal/load"},
		{pkg: "internal/vmtest/init", target: module + "internal/vmtest/spec"},
		{pkg: "internal/vmtest/init", target: module + "internal/vmtest", wrong: "process 1"},
		{pkg: "internal/vmtest", target: module + "ktls", wrong: "judge"},
		{pkg: "cmd/ktlsvisor", target: module + "internal/vmtest", wrong: "knows nothing"},
		{pkg: "brand/new", target: "fmt", wrong: "has no rule"},
	} {
		got := check(use{pkg: tc.pkg, file: tc.pkg + "/x.go", target: tc.target, test: tc.test})
		if tc.wrong == "" && got != "" || !strings.Contains(got, tc.wrong) {
			t.Errorf("%s importing %s (test: %v): %q, want %q", tc.pkg, tc.target, tc.test, got, tc.wrong)
		}
	}
}

var testName = regexp.MustCompile("`(Test[A-Z][A-Za-z0-9]+)`")

// The tests that documents name exist.
func TestDocumentedTestsExist(t *testing.T) {
	there := map[string]bool{}
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(p, "_test.go") {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), p, nil, 0)
		if err != nil {
			return err
		}
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok {
				there[fn.Name.Name] = true
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	docs, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil || len(docs) == 0 {
		t.Fatalf("%d documents, %v", len(docs), err)
	}
	for _, file := range docs {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range testName.FindAllStringSubmatch(string(data), -1) {
			if !there[m[1]] {
				t.Errorf("%s names %s, which does not exist", file, m[1])
			}
		}
	}
}
