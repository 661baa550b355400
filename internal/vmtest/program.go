package vmtest

import (
	"bufio"
	"os"
	"path"
	"path/filepath"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/spec"
)

// Program is something to run in a guest instead of the project's tests: a static
// program and the files that it needs. Its exit code is the verdict.
type Program struct {
	Name  string            // in reports, without blanks
	Path  string            // on this machine
	Args  []string          // with the guest's paths
	Files map[string]string // the guest's path, without the leading /: the file on this machine
	Limit time.Duration     // 0 means the limit of a test binary
}

// buildProgram is buildGuest for a program of the caller's.
func (p *Program) build(dir, initFile, shell string) (*Build, error) {
	file := filepath.Join(dir, "shared.cpio")
	f, err := os.Create(file)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	w := bufio.NewWriterSize(f, 1<<20)
	a := newArchive(w)
	base(a, initFile, shell)
	bin := "bin/" + filepath.Base(p.Path)
	a.file(bin, 0o755, p.Path)
	for to, from := range p.Files {
		a.dir(path.Dir(to))
		a.file(to, 0o755, from)
	}
	if err := a.close(); err != nil {
		return nil, err
	}
	if err := w.Flush(); err != nil {
		return nil, err
	}
	limit := p.Limit
	if limit == 0 {
		limit = defaultLimit
	}
	t := spec.Test{Package: p.Name, Binary: "/" + bin, Dir: "/tmp", Args: p.Args, Seconds: int(limit / time.Second)}
	return &Build{Archive: file, Tests: []spec.Test{t}, program: true}, f.Close()
}
