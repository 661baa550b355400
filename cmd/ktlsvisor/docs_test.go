package main

import (
	"bytes"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/config"
	"github.com/ktlsvisor/ktlsvisor/internal/demo"
)

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile("../../" + path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// docs/cli.md is the contract: what a command can do and it does not say, or the
// other way round, is a mistake.
func TestDocsNameEveryCommandAndFlag(t *testing.T) {
	doc := read(t, "docs/cli.md")
	root := (&app{out: &bytes.Buffer{}, err: &bytes.Buffer{}}).rootCommand()
	known := map[string]bool{"--help": true}
	var visit func(*cobra.Command)
	visit = func(c *cobra.Command) {
		if c.Hidden {
			return
		}
		if c != root && c.Parent() == root && c.Name() != "help" && !strings.Contains(doc, "ktlsvisor "+c.Name()) {
			t.Errorf("docs/cli.md does not know the command %q", c.Name())
		}
		flags := func(f *pflag.Flag) {
			known["--"+f.Name] = true
			if c.Parent() != nil && c.Parent().Name() == "completion" {
				return
			}
			if !strings.Contains(doc, "--"+f.Name) {
				t.Errorf("docs/cli.md does not know %s --%s", c.CommandPath(), f.Name)
			}
		}
		c.LocalFlags().VisitAll(flags)
		for _, sub := range c.Commands() {
			visit(sub)
		}
	}
	visit(root)
	for _, file := range []string{"docs/cli.md", "README.md"} {
		for word := range strings.FieldsFuncSeq(read(t, file), func(r rune) bool {
			return r != '-' && (r < 'a' || r > 'z')
		}) {
			if strings.HasPrefix(word, "--") && len(word) > 3 && !strings.HasPrefix(word, "---") && !known[word] {
				t.Errorf("%s speaks of %s, which no command has", file, word)
			}
		}
	}
}

// The configuration in docs/cli.md is one that works.
func TestDocsConfiguration(t *testing.T) {
	_, rest, ok := strings.Cut(read(t, "docs/cli.md"), "```toml\n")
	text, _, ok2 := strings.Cut(rest, "```")
	if !ok || !ok2 {
		t.Fatal("docs/cli.md has no configuration")
	}
	// The example's program is this one; any program on the PATH will do here.
	text = strings.Replace(text, `command = ["ktlsvisor",`, `command = ["sh",`, 1)
	if _, err := config.Parse("docs/cli.md", []byte(text)); err != nil {
		t.Errorf("the configuration in docs/cli.md:\n%v", err)
	}
}

// What the answers and the configuration have, docs/cli.md explains.
func TestDocsNameEveryField(t *testing.T) {
	doc := read(t, "docs/cli.md")
	words := map[string]bool{}
	for w := range strings.FieldsFuncSeq(doc, func(r rune) bool { return r != '_' && (r < 'a' || r > 'z') && (r < '0' || r > '9') }) {
		words[w] = true
	}
	seen := map[reflect.Type]bool{}
	var visit func(reflect.Type)
	visit = func(typ reflect.Type) {
		switch typ.Kind() {
		case reflect.Pointer, reflect.Slice, reflect.Map:
			visit(typ.Elem())
			return
		case reflect.Struct:
		default:
			return
		}
		if seen[typ] {
			return
		}
		seen[typ] = true
		for i := range typ.NumField() {
			f := typ.Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if !f.IsExported() || name == "" || name == "-" {
				continue
			}
			if !words[name] {
				t.Errorf("docs/cli.md does not know %q of %s", name, typ)
			}
			visit(f.Type)
		}
	}
	for _, v := range []any{config.Config{}, admin.Status{}, admin.Session{}, admin.UpgradeReport{}, admin.SupervisorReport{},
		admin.TaskReport{}, admin.UpgradePlan{}, admin.RekeyReport{}, demo.Report{}, doctorReport{}} {
		visit(reflect.TypeOf(v))
	}
}

// The README shows the echo worker as it is.
func TestReadmeShowsTheEchoWorker(t *testing.T) {
	source := read(t, "examples/echo/main.go")
	_, program, ok := strings.Cut(source, "package main")
	if !ok || !strings.Contains(read(t, "README.md"), "```go\npackage main"+strings.TrimRight(program, "\n")+"\n```") {
		t.Error("the program in README.md is not examples/echo/main.go any more")
	}
}
