package vmtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// fresh is how long a resolved kernel is used without asking the mirror for a
// newer one.
const fresh = 12 * time.Hour

// Cache is the folder outside the repository that kernels are fetched into. Several
// runs may use one at the same time: whoever fetches holds its lock.
type Cache struct {
	Dir    string
	Mirror string // Debian mirror to use instead of the machine's own; may be ""
	Say    func(format string, args ...any)
}

// DefaultCacheDir is $KTLSVISOR_CACHE, else ktlsvisor/vm in the user's cache.
func DefaultCacheDir() (string, error) {
	if dir := os.Getenv("KTLSVISOR_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("no place for kernels (set KTLSVISOR_CACHE): %w", err)
	}
	return filepath.Join(dir, "ktlsvisor", "vm"), nil
}

// lock keeps other runs from the cache until the returned file is closed.
func (c *Cache) lock(ctx context.Context) (*os.File, error) {
	if err := os.MkdirAll(c.Dir, 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(c.Dir, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	done := make(chan error, 1)
	// Fd puts the file into blocking mode, which is what a wait in flock needs.
	fd := int(f.Fd())
	go func() { done <- sys.Lock(fd) }()
	word := time.NewTimer(time.Second)
	defer word.Stop()
	for {
		select {
		case err := <-done:
			if err != nil {
				return nil, errors.Join(err, f.Close())
			}
			return f, nil
		case <-word.C:
			c.Say("waiting for another run that is fetching kernels into %s", c.Dir)
		case <-ctx.Done():
			// The goroutine still waits on f, so f stays open; the process ends soon.
			return nil, ctx.Err()
		}
	}
}

// Kernels returns the newest kernel of each line, fetching what is not there. When
// a mirror cannot be reached, what the cache has is used.
func (c *Cache) Kernels(ctx context.Context, labels []string) ([]Kernel, error) {
	lock, err := c.lock(ctx)
	if err != nil {
		return nil, fmt.Errorf("kernel cache %s: %w", c.Dir, err)
	}
	defer func() { _ = lock.Close() }()
	opened := map[string]*listing{}
	var kernels []Kernel
	for _, label := range labels {
		k, err := c.kernel(ctx, label, opened)
		if err != nil {
			return nil, fmt.Errorf("kernel %s: %w", label, err)
		}
		kernels = append(kernels, k)
	}
	return kernels, nil
}

// listing is a release whose package lists are up to date in this run, or why not.
type listing struct {
	apt   *apt
	names []string
	err   error
}

func (c *Cache) kernel(ctx context.Context, label string, opened map[string]*listing) (Kernel, error) {
	old, age, oldErr := c.current(label)
	if oldErr == nil && age < fresh {
		return old, nil
	}
	k, err := c.newest(ctx, label, opened)
	if err == nil {
		return k, nil
	}
	if oldErr != nil || ctx.Err() != nil {
		return Kernel{}, err
	}
	c.Say("kernel %s: the mirror cannot be asked for a newer one, going on with %s from the cache (%s)", label, old.Release, firstLine(err))
	return old, nil
}

// current is the kernel of a line that an earlier run fetched.
func (c *Cache) current(label string) (Kernel, time.Duration, error) {
	mark := filepath.Join(c.Dir, "kernels", label, "current")
	data, err := os.ReadFile(mark)
	if err != nil {
		return Kernel{}, 0, err
	}
	st, err := os.Stat(mark)
	if err != nil {
		return Kernel{}, 0, err
	}
	k, err := c.at(label, strings.TrimSpace(string(data)))
	return k, time.Since(st.ModTime()), err
}

// at is the kernel in the cache, if it is there.
func (c *Cache) at(label, release string) (Kernel, error) {
	dir := filepath.Join(c.Dir, "kernels", label, release)
	k := Kernel{Label: label, Release: release, Image: filepath.Join(dir, "vmlinuz"), Modules: filepath.Join(dir, "lib", "modules", release)}
	for _, f := range []string{k.Image, filepath.Join(k.Modules, "modules.dep")} {
		if _, err := os.Stat(f); err != nil {
			return Kernel{}, err
		}
	}
	return k, nil
}

func (c *Cache) newest(ctx context.Context, label string, opened map[string]*listing) (Kernel, error) {
	rel := releaseOf(label)
	l := opened[rel.name]
	if l == nil {
		l = c.open(ctx, rel)
		opened[rel.name] = l
	}
	if l.err != nil {
		return Kernel{}, l.err
	}
	release, packages, err := pick(label, l.names)
	if err != nil {
		return Kernel{}, fmt.Errorf("%s: %w", rel.name, err)
	}
	k, err := c.at(label, release)
	if err != nil {
		c.Say("kernel %s: fetching %s", label, strings.Join(packages, " and "))
		k, err = c.fetch(ctx, l.apt, label, release, packages)
		if err != nil {
			return Kernel{}, err
		}
	}
	if err := os.WriteFile(filepath.Join(c.Dir, "kernels", label, "current"), []byte(release+"\n"), 0o644); err != nil {
		return Kernel{}, err
	}
	return k, nil
}

// open brings the package lists of a release up to date, trying twice.
func (c *Cache) open(ctx context.Context, rel release) *listing {
	archive, security := debianMirrors(machineSources("/"))
	if c.Mirror != "" {
		archive, security = strings.TrimRight(c.Mirror, "/"), ""
	}
	if archive == "" {
		return &listing{err: errors.New("this machine's apt sources name no Debian mirror; give one with VMTEST_MIRROR=URL, or a kernel with KERNEL=FILE MODULES=FOLDER")}
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return &listing{err: fmt.Errorf("kernels are fetched with apt (or give one with KERNEL=FILE MODULES=FOLDER): %w", err)}
	}
	keyring := "/" + systemKeyring
	if _, err := os.Stat(keyring); err != nil {
		return &listing{err: fmt.Errorf("without the package debian-archive-keyring nothing fetched could be trusted: %w", err)}
	}
	c.Say("asking for the newest kernels in %s", rel.name)
	a, err := newApt(filepath.Join(c.Dir, "apt-"+rel.name), rel, archive, security, keyring)
	if err != nil {
		return &listing{err: err}
	}
	err = a.update(ctx)
	if err != nil && ctx.Err() == nil && rel.newer {
		// The machine may be too old to know the key of the newer release. The
		// keyring of its own release, which it can check, does know it.
		if newer, kerr := c.newerKeyring(ctx, archive, security, keyring); kerr == nil {
			if b, berr := newApt(a.dir, rel, archive, security, newer); berr == nil {
				a = b
			}
		}
	}
	if err != nil && ctx.Err() == nil {
		c.Say("trying once more: %s", firstLine(err))
		err = a.update(ctx)
	}
	if err != nil {
		return &listing{err: err}
	}
	names, err := a.kernelNames(ctx)
	return &listing{apt: a, names: names, err: err}
}

// newerKeyring fetches the present debian-archive-keyring of the stable release,
// which the machine's own keyring vouches for.
func (c *Cache) newerKeyring(ctx context.Context, archive, security, keyring string) (string, error) {
	a, err := newApt(filepath.Join(c.Dir, "apt-"+stable.name), stable, archive, security, keyring)
	if err != nil {
		return "", err
	}
	if err := a.update(ctx); err != nil {
		return "", err
	}
	dir := filepath.Join(c.Dir, "keyring")
	if err := a.unpack(ctx, dir, "debian-archive-keyring"); err != nil {
		return "", err
	}
	newer := filepath.Join(dir, systemKeyring)
	_, err = os.Stat(newer)
	return newer, err
}

// fetch unpacks a kernel into the cache. It appears there complete or not at all.
func (c *Cache) fetch(ctx context.Context, a *apt, label, release string, packages []string) (Kernel, error) {
	parent := filepath.Join(c.Dir, "kernels", label)
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return Kernel{}, err
	}
	tmp, err := os.MkdirTemp(parent, "new-")
	if err != nil {
		return Kernel{}, err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	raw, out := filepath.Join(tmp, "raw"), filepath.Join(tmp, "out")
	if err := a.unpack(ctx, raw, packages...); err != nil {
		return Kernel{}, err
	}
	modules := filepath.Join(out, "lib", "modules", release)
	if err := os.MkdirAll(filepath.Dir(modules), 0o755); err != nil {
		return Kernel{}, err
	}
	if err := firstThatExists(modules, filepath.Join(raw, "lib/modules", release), filepath.Join(raw, "usr/lib/modules", release)); err != nil {
		return Kernel{}, err
	}
	if err := firstThatExists(filepath.Join(out, "vmlinuz"), filepath.Join(raw, "boot/vmlinuz-"+release), filepath.Join(modules, "vmlinuz"), filepath.Join(modules, "vmlinuz.unsigned")); err != nil {
		return Kernel{}, err
	}
	depmod, err := findTool("depmod")
	if err != nil {
		return Kernel{}, err
	}
	if _, err := runQuietly(exec.CommandContext(ctx, depmod, "-b", out, release)); err != nil {
		return Kernel{}, err
	}
	final := filepath.Join(parent, release)
	if err := os.RemoveAll(final); err != nil {
		return Kernel{}, err
	}
	if err := os.Rename(out, final); err != nil {
		return Kernel{}, err
	}
	c.prune(parent, release)
	return c.at(label, release)
}

// prune leaves two kernels of a line: the one just fetched, and the newest of the
// others, which a run that started earlier may still boot.
func (c *Cache) prune(parent, keep string) {
	entries, err := os.ReadDir(parent)
	if err != nil {
		return
	}
	second := ""
	for _, e := range entries {
		if n := e.Name(); e.IsDir() && n != keep && !strings.HasPrefix(n, "new-") && (second == "" || compareVersions(n, second) > 0) {
			second = n
		}
	}
	for _, e := range entries {
		if n := e.Name(); e.IsDir() && n != keep && n != second && !strings.HasPrefix(n, "new-") {
			_ = os.RemoveAll(filepath.Join(parent, n))
		}
	}
}

// firstThatExists moves the first of from that exists to to.
func firstThatExists(to string, from ...string) error {
	for _, f := range from {
		if _, err := os.Stat(f); err == nil {
			return os.Rename(f, to)
		}
	}
	return fmt.Errorf("the packages hold none of %s", strings.Join(from, ", "))
}

func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}
