package vmtest

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/spec"
)

// Build is what all guests of a run share.
type Build struct {
	Archive string      // first part of the initramfs: init, test binaries, programs
	Tests   []spec.Test // what is in it
	program bool        // a Program, which has no tests to report
}

// guestEnv makes static binaries for the guest.
var guestEnv = []string{"CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS="}

// buildGuest compiles everything below root (the repository) into dir and writes
// the shared archive. Of o it takes the repository's root, which packages and which of
// their tests, and how long those may take; shell is a static busybox.
func buildGuest(ctx context.Context, o *Options, dir, shell string) (*Build, error) {
	root, only, run, say := o.Root, o.Packages, o.Run, o.Say
	tests, progs, err := present(ctx, root, only)
	if err != nil {
		return nil, err
	}
	if len(tests) == 0 {
		return nil, fmt.Errorf("no package with tests fits %v; those known are listed in internal/vmtest/packages.go", only)
	}
	names := make([]string, len(tests))
	for i, t := range tests {
		names[i] = t.path
	}
	say("compiling the tests of %s", strings.Join(names, ", "))
	bin := filepath.Join(dir, "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return nil, err
	}
	const strip = "-ldflags=-s -w"
	if err := goTool(ctx, root, append([]string{"test", "-c", strip, "-o", bin + "/"}, relative(names)...)...); err != nil {
		return nil, err
	}
	if err := goTool(ctx, root, append([]string{"build", strip, "-o", bin + "/"}, relative(append(progs, "internal/vmtest/init"))...)...); err != nil {
		return nil, err
	}

	file := filepath.Join(dir, "shared.cpio")
	f, err := os.Create(file)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	w := bufio.NewWriterSize(f, 1<<20)
	a := newArchive(w)
	base(a, filepath.Join(bin, "init"), shell)
	for _, p := range progs {
		a.file("bin/"+path.Base(p), 0o755, filepath.Join(bin, path.Base(p)))
	}
	b := &Build{Archive: file}
	for _, t := range tests {
		name := path.Base(t.path) + ".test"
		a.file("tests/"+name, 0o755, filepath.Join(bin, name))
		src := "src/" + t.path
		a.dir(src)
		data := filepath.Join(root, t.path, "testdata")
		if st, err := os.Stat(data); err == nil && st.IsDir() {
			a.tree(src+"/testdata", data)
		}
		if o.TestLimit > 0 {
			t.limit = o.TestLimit
		}
		b.Tests = append(b.Tests, guestTest(t, "/tests/"+name, "/"+src, run))
	}
	if err := a.close(); err != nil {
		return nil, err
	}
	if err := w.Flush(); err != nil {
		return nil, err
	}
	return b, f.Close()
}

// base is what every guest has.
func base(a *archive, initFile, shell string) {
	for _, d := range []string{"dev", "proc", "sys", "tmp", "run", "bin"} {
		a.dir(d)
	}
	// Before init mounts /dev, the kernel opens the console for it.
	a.device("dev/console", 0o600, 5, 1)
	a.bytes("etc/passwd", 0o644, []byte("root:x:0:0:root:/tmp:/bin/sh\nnobody:x:65534:65534:nobody:/tmp:/bin/false\n"))
	a.bytes("etc/group", 0o644, []byte("root:x:0:\nnogroup:x:65534:\n"))
	a.bytes("etc/hosts", 0o644, []byte("127.0.0.1 localhost\n::1 localhost\n"))
	a.file("init", 0o755, initFile)
	a.file(shellFile, 0o755, shell)
	for _, name := range shellLinks {
		a.link("bin/"+name, "busybox")
	}
}

// guestTest is how a guest runs a package's tests.
func guestTest(t testPackage, binary, dir, run string) spec.Test {
	limit := t.limit
	if limit == 0 {
		limit = defaultLimit
	}
	skip := hostOnly
	if t.skip != "" {
		skip += "|" + t.skip
	}
	if run == "" {
		run = t.run
	}
	// The testing package's own limit comes first: it prints every goroutine.
	own := limit - 10*time.Second
	args := []string{"-test.v=test2json", "-test.timeout=" + own.String(), "-test.skip=" + skip}
	if run != "" {
		args = append(args, "-test.run="+run)
	}
	return spec.Test{Package: t.path, Binary: binary, Dir: dir, Args: args, Seconds: int(limit / time.Second)}
}

// present returns the chosen packages that have tests, and the programs that they
// want and that exist.
func present(ctx context.Context, root string, only *regexp.Regexp) (tests []testPackage, progs []string, err error) {
	out, err := goOutput(ctx, root, "list", "-e", "-f", "{{.ImportPath}} {{.Name}} {{len .TestGoFiles}} {{len .XTestGoFiles}}", "./...")
	if err != nil {
		return nil, nil, err
	}
	var withTests, mains []string
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) != 4 {
			continue
		}
		_, rel, ok := strings.Cut(f[0], "ktlsvisor/ktlsvisor/")
		if !ok {
			continue
		}
		if f[2] != "0" || f[3] != "0" {
			withTests = append(withTests, rel)
		}
		if f[1] == "main" {
			mains = append(mains, rel)
		}
	}
	wanted := false
	for _, t := range testPackages {
		if slices.Contains(withTests, t.path) && (only == nil || only.MatchString(t.path)) {
			tests = append(tests, t)
			wanted = wanted || t.progs
		}
	}
	for _, p := range programs {
		if wanted && slices.Contains(mains, p) {
			progs = append(progs, p)
		}
	}
	return tests, progs, nil
}

func relative(paths []string) []string {
	rel := make([]string, len(paths))
	for i, p := range paths {
		rel[i] = "./" + p
	}
	return rel
}

func goTool(ctx context.Context, root string, args ...string) error {
	_, err := goOutput(ctx, root, args...)
	return err
}

func goOutput(ctx context.Context, root string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), guestEnv...)
	var out, said strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("go %s: %w\n%s%s", args[0], err, out.String(), said.String())
	}
	return out.String(), nil
}
