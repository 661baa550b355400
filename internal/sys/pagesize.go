package sys

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// envSmallPages tells children that it was one of us, not the operator, who asked for
// small pages.
const envSmallPages = "KTLSVISOR_SMALL_PAGES"

var smallPages struct {
	sync.Mutex
	ours bool
}

// SmallPages asks the kernel not to give this process huge pages (PR_SET_THP_DISABLE,
// Linux 3.15). Where these are always on, a heap of a few MiB is rounded up to 2 MiB at
// every end, and what Go gives back is filled up again behind its back (khugepaged). It is
// for small processes that should stay small; children inherit it, see LargePages. A
// kernel that cannot do it is no error.
func SmallPages() {
	smallPages.Lock()
	defer smallPages.Unlock()
	if os.Getenv(envSmallPages) == "" {
		if disabled() { // by the operator: so it is for children too
			return
		}
		_ = os.Setenv(envSmallPages, "1")
	}
	smallPages.ours = smallPagesOn() == nil
}

func smallPagesOn() error { return unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0) }

// LargePages runs start, which starts a child that is not to inherit SmallPages. The child
// must be executing its program when start returns.
func LargePages(start func() error) error {
	smallPages.Lock()
	defer smallPages.Unlock()
	if smallPages.ours {
		_ = unix.Prctl(unix.PR_SET_THP_DISABLE, 0, 0, 0, 0)
		defer func() { _ = smallPagesOn() }()
	}
	return start()
}

func disabled() bool {
	n, err := unix.PrctlRetInt(unix.PR_GET_THP_DISABLE, 0, 0, 0, 0)
	return err == nil && n != 0
}
