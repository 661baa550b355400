package sys

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// StoreShared stores v into the first eight bytes of shared memory, which must be
// aligned, after every store that the caller made before: whoever finds v there,
// also after the caller was killed, finds those too.
func StoreShared(m []byte, v uint64) {
	atomic.StoreUint64((*uint64)(unsafe.Pointer(unsafe.SliceData(m[:8]))), v)
}

// LoadShared reads what StoreShared stored.
func LoadShared(m []byte) uint64 {
	return atomic.LoadUint64((*uint64)(unsafe.Pointer(unsafe.SliceData(m[:8]))))
}

// FreeShared gives the memory behind whole pages of a mapping of MapShared back to
// the kernel; they read as zeros afterwards (MADV_REMOVE).
func FreeShared(m []byte) error {
	if err := unix.Madvise(m, unix.MADV_REMOVE); err != nil {
		return fmt.Errorf("shared memory: MADV_REMOVE: %w", err)
	}
	return nil
}
