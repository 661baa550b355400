package sys

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Lock takes an exclusive advisory lock on the open file fd (flock(2)), waiting in
// the kernel for as long as another process holds it. Closing every duplicate of
// fd, or the death of the process, releases it.
func Lock(fd int) error {
	for {
		err := unix.Flock(fd, unix.LOCK_EX)
		if err == nil {
			return nil
		}
		if err != unix.EINTR {
			return fmt.Errorf("flock: %w", err)
		}
	}
}
