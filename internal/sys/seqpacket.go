package sys

import "golang.org/x/sys/unix"

// IsSeqpacket reports whether fd is an AF_UNIX SOCK_SEQPACKET socket, which a
// control channel is.
func IsSeqpacket(fd int) bool {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil || domain != unix.AF_UNIX {
		return false
	}
	typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	return err == nil && typ == unix.SOCK_SEQPACKET
}
