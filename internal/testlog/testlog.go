// Package testlog is for tests that look at what was said.
package testlog

import (
	"strings"
	"sync"
)

// Buffer collects what is written to it, by any number of goroutines. The zero Buffer is
// empty.
type Buffer struct {
	mu sync.Mutex
	b  strings.Builder
}

// Write never fails.
func (b *Buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

// String is everything up to now.
func (b *Buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
