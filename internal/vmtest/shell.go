package vmtest

import (
	"context"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// shellPackage is Debian's package of a shell, and the few programs that scripts
// in tests use, as one static file.
const (
	shellPackage = "busybox-static"
	shellFile    = "bin/busybox"
)

// shellLinks are the names that the shell's file gets in a guest. "echo" is not
// one of them: that is the example worker; the shell has its own built in.
var shellLinks = []string{"sh", "cat", "cp", "env", "false", "head", "kill", "ln", "ls", "mkdir", "mv", "ps", "rm", "seq", "sleep", "tail", "tr", "true"}

// Shell returns the static shell for guests: this machine's own when it has one,
// else one that is fetched once.
func (c *Cache) Shell(ctx context.Context) (string, error) {
	if own, err := exec.LookPath("busybox"); err == nil && isStatic(own) {
		return own, nil
	}
	file, err := c.fetchShell(ctx)
	if err != nil {
		return "", fmt.Errorf("a static busybox for the guest (an installed one will do): %w", err)
	}
	return file, nil
}

// isStatic reports whether an ELF file needs no dynamic linker.
func isStatic(file string) bool {
	f, err := elf.Open(file)
	if err != nil {
		return false
	}
	defer func() { _ = f.Close() }()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return false
		}
	}
	return true
}

func (c *Cache) fetchShell(ctx context.Context) (string, error) {
	lock, err := c.lock(ctx)
	if err != nil {
		return "", fmt.Errorf("cache %s: %w", c.Dir, err)
	}
	defer func() { _ = lock.Close() }()
	dir := filepath.Join(c.Dir, "shell")
	file := filepath.Join(dir, shellFile)
	if _, err := os.Stat(file); err == nil {
		return file, nil
	}
	l := c.open(ctx, stable)
	if l.err != nil {
		return "", l.err
	}
	tmp, err := os.MkdirTemp(c.Dir, "shell-")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	if err := l.apt.unpack(ctx, tmp, shellPackage); err != nil {
		return "", err
	}
	if _, err := os.Stat(filepath.Join(tmp, shellFile)); err != nil {
		return "", fmt.Errorf("%s: %w", shellPackage, err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	return file, os.Rename(tmp, dir)
}
