package sys

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// HardRlimitNofile returns the hard NOFILE limit of this process: what it can
// raise its own limit to without privileges.
func HardRlimitNofile() (uint64, error) {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return 0, fmt.Errorf("NOFILE limit: %w", err)
	}
	return lim.Max, nil
}
