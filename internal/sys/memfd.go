package sys

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ErrNotSealed reports a memfd that its sender could still change or shrink; a
// reader that mapped it could be killed with SIGBUS.
var ErrNotSealed = errors.New("memory file is not sealed against writing and resizing")

// SharedMemfd returns a memory file of size bytes, sealed against growing and
// shrinking but not against writing, for memory that processes share. The caller
// owns the descriptor.
func SharedMemfd(name string, size int64) (int, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return -1, fmt.Errorf("memfd %s: %w", name, err)
	}
	if err := unix.Ftruncate(fd, size); err != nil {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("memfd %s: size %d: %w", name, size, err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL); err != nil {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("memfd %s: seal: %w", name, err)
	}
	return fd, nil
}

// SealedMemfd returns a memory file that holds data and can no longer change.
// The caller owns the descriptor.
func SealedMemfd(name string, data []byte) (int, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return -1, fmt.Errorf("memfd %s: %w", name, err)
	}
	for off := 0; off < len(data); {
		n, err := unix.Pwrite(fd, data[off:], int64(off))
		if err != nil {
			_ = unix.Close(fd)
			return -1, fmt.Errorf("memfd %s: write: %w", name, err)
		}
		off += n
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL); err != nil {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("memfd %s: seal: %w", name, err)
	}
	return fd, nil
}

// ReadSealedMemfd reads a memory file received from another process, at most
// limit bytes. It refuses anything not sealed (ErrNotSealed) and does not close fd.
func ReadSealedMemfd(fd int, limit int64) ([]byte, error) {
	const want = unix.F_SEAL_WRITE | unix.F_SEAL_GROW | unix.F_SEAL_SHRINK
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil || seals&want != want {
		return nil, ErrNotSealed
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("memory file: %w", err)
	}
	if st.Size > limit {
		return nil, fmt.Errorf("memory file of %d bytes, the limit is %d", st.Size, limit)
	}
	data := make([]byte, st.Size)
	for off := 0; off < len(data); {
		n, err := unix.Pread(fd, data[off:], int64(off))
		if err != nil {
			return nil, fmt.Errorf("memory file: read: %w", err)
		}
		if n == 0 {
			return nil, fmt.Errorf("memory file: short read at %d of %d", off, len(data))
		}
		off += n
	}
	return data, nil
}

// MapShared maps size bytes of fd for reading and writing, left out of core
// dumps (MADV_DONTDUMP) and of forked children (MADV_DONTFORK). It refuses a file
// that could shrink under the mapping. Unmap with Unmap.
func MapShared(fd int, size int) ([]byte, error) {
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil || seals&unix.F_SEAL_SHRINK == 0 {
		return nil, ErrNotSealed
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("shared memory: %w", err)
	}
	if st.Size < int64(size) {
		return nil, fmt.Errorf("shared memory of %d bytes, %d are needed", st.Size, size)
	}
	m, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map shared memory: %w", err)
	}
	_ = unix.Madvise(m, unix.MADV_DONTFORK)
	if err := unix.Madvise(m, unix.MADV_DONTDUMP); err != nil {
		_ = unix.Munmap(m)
		return nil, fmt.Errorf("shared memory: MADV_DONTDUMP: %w", err)
	}
	return m, nil
}

// Unmap undoes MapShared.
func Unmap(m []byte) error { return unix.Munmap(m) }

// FileSize returns the size of the file behind fd in bytes.
func FileSize(fd int) (int64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, err
	}
	return st.Size, nil
}
