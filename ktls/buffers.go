package ktls

import "sync"

// Buffers are held only while a record is in progress, so that an idle session
// costs none. Four sizes: a half-received record waits in the smallest that
// fits, so that slow or hostile peers cannot make many sessions hold a large one.
const (
	recordHeaderLen = 5
	// maxCiphertext is the largest body of a record: TLS 1.2 allows 2048 bytes of
	// expansion (RFC 5246 section 6.2.3), TLS 1.3 256 (RFC 8446 section 5.2).
	maxCiphertext12 = maxPlaintext + 2048
	maxCiphertext13 = maxPlaintext + 256

	smallBuf = 4 << 10
	midBuf   = recordHeaderLen + maxCiphertext12
	// bigBuf has room for four full records, received in one system call.
	bigBuf = 4 * (maxPlaintext + 128)
	// sendBuf has room for six full records, for large writes; eight and sixteen gained
	// nothing more when measured.
	sendBuf = sendRecords * (maxPlaintext + 64)

	sendRecords = 6
)

type buffer struct {
	b []byte // full length

	// Of a chunk in an arena: its first page, and its size in chunkSizes.
	page  uint32
	class uint8
}

var (
	smallPool = sync.Pool{New: func() any { return &buffer{b: make([]byte, smallBuf)} }}
	midPool   = sync.Pool{New: func() any { return &buffer{b: make([]byte, midBuf)} }}
	bigPool   = sync.Pool{New: func() any { return &buffer{b: make([]byte, bigBuf)} }}
	sendPool  = sync.Pool{New: func() any { return &buffer{b: make([]byte, sendBuf)} }}
)

// getBuffer returns a buffer of at least n bytes with unspecified content.
func getBuffer(n int) *buffer {
	switch {
	case n <= smallBuf:
		return smallPool.Get().(*buffer)
	case n <= midBuf:
		return midPool.Get().(*buffer)
	case n <= bigBuf:
		return bigPool.Get().(*buffer)
	case n <= sendBuf:
		return sendPool.Get().(*buffer)
	}
	return &buffer{b: make([]byte, n)}
}

func putBuffer(b *buffer) {
	switch len(b.b) {
	case smallBuf:
		smallPool.Put(b)
	case midBuf:
		midPool.Put(b)
	case bigBuf:
		bigPool.Put(b)
	case sendBuf:
		sendPool.Put(b)
	}
}
