package sys

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"testing"
	"unsafe"
)

// What processes share holds secrets: it is in no core dump and in no child.
func TestSharedMemoryStaysOutOfDumps(t *testing.T) {
	const size = 64 << 10
	fd, err := SharedMemfd("test", size)
	if err != nil {
		t.Fatal(err)
	}
	defer CloseAll([]int{fd})
	m, err := MapShared(fd, size)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = Unmap(m) }()
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	at := uint64(uintptr(unsafe.Pointer(&m[0])))
	lines, here := bufio.NewScanner(f), false
	for lines.Scan() {
		var from, to uint64
		if n, _ := fmt.Sscanf(lines.Text(), "%x-%x ", &from, &to); n == 2 {
			here = from <= at && at < to
		}
		flags, ok := strings.CutPrefix(lines.Text(), "VmFlags:")
		if !here || !ok {
			continue
		}
		for flag, what := range map[string]string{"dd": "it would be in a core dump", "dc": "a forked child would have it"} {
			if !strings.Contains(flags+" ", " "+flag+" ") {
				t.Errorf("flags%s: %s", flags, what)
			}
		}
		return
	}
	t.Fatalf("the mapping at %#x is not in /proc/self/smaps: %v", at, lines.Err())
}
