package vmtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
)

// ErrNoGuests reports that this machine cannot run guests, and what would help.
var ErrNoGuests = errors.New("this machine cannot run guests")

// tool is a program that guests need, and Debian's package that has it.
type tool struct{ program, pkg string }

const qemu = "qemu-system-x86_64"

var tools = []tool{{qemu, "qemu-system-x86"}, {"depmod", "kmod"}}

// findTool looks a program up on the path, and where Debian keeps those for root.
func findTool(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/sbin/", "/sbin/"} {
		if p, err := exec.LookPath(dir + name); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s: %w", name, exec.ErrNotFound)
}

// EnsureTools installs what is missing where it may (root, with apt); otherwise it
// returns ErrNoGuests with the remedy.
func EnsureTools(ctx context.Context, say func(format string, args ...any)) error {
	var missing []string
	for _, t := range tools {
		if _, err := findTool(t.program); err != nil {
			missing = append(missing, t.pkg)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	_, aptErr := exec.LookPath("apt-get")
	if os.Geteuid() != 0 || aptErr != nil {
		return fmt.Errorf("%w: install %v (as root: apt-get install --no-install-recommends)", ErrNoGuests, missing)
	}
	say("installing %v", missing)
	args := append([]string{"install", "-y", "-q", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300"}, missing...)
	_, err := runQuietly(exec.CommandContext(ctx, "apt-get", args...))
	if err != nil {
		// The machine's package lists may be missing or old.
		say("updating the package lists, then installing %v", missing)
		if _, uerr := runQuietly(exec.CommandContext(ctx, "apt-get", "update", "-q")); uerr != nil {
			return fmt.Errorf("%w: %w", ErrNoGuests, uerr)
		}
		_, err = runQuietly(exec.CommandContext(ctx, "apt-get", args...))
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNoGuests, err)
	}
	return nil
}
