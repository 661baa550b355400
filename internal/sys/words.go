package sys

import (
	"sync/atomic"
	"unsafe"
)

// Words is shared memory (MapShared) as 64-bit words of the machine's byte order, for
// what several processes look at while one changes it. They are gone with Unmap.
func Words(m []byte) []atomic.Uint64 {
	if len(m) < 8 {
		return nil
	}
	return unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(unsafe.SliceData(m))), len(m)/8)
}
