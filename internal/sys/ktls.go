package sys

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Errno values with a meaning of their own on a kernel TLS socket.
const (
	EBADMSG      = unix.EBADMSG      // a record that does not authenticate
	EINPROGRESS  = unix.EINPROGRESS  // handed to an asynchronous cipher
	EINVAL       = unix.EINVAL       // a malformed record header, an unknown cipher
	EIO          = unix.EIO          // a control record met a plain read
	EKEYEXPIRED  = unix.EKEYEXPIRED  // a KeyUpdate was read, TLS_RX is not set anew (Linux 6.14)
	EMSGSIZE     = unix.EMSGSIZE     // a record longer than the protocol allows
	ENOPROTOOPT  = unix.ENOPROTOOPT  // no such socket option
	EOPNOTSUPP   = unix.EOPNOTSUPP   // no ULP on this kind of socket (MPTCP)
	ECONNRESET   = unix.ECONNRESET   //
	ECONNABORTED = unix.ECONNABORTED //
	ETIMEDOUT    = unix.ETIMEDOUT    //
	EPERM        = unix.EPERM        //
	EACCES       = unix.EACCES       //
	ENOMEM       = unix.ENOMEM       //
	ENOBUFS      = unix.ENOBUFS      //
)

// From the kernel's include/uapi/linux/tls.h; x/sys does not have them.
const (
	tlsTX            = 1
	tlsRX            = 2
	tlsSetRecordType = 1
	tlsGetRecordType = 2
)

// TLSDirection says which half of a kernel TLS socket a call is about.
type TLSDirection int

const (
	TLSSend    TLSDirection = tlsTX // TLS_TX
	TLSReceive TLSDirection = tlsRX // TLS_RX
)

// NoRecordType is what TLSRecv reports when the kernel named no record type: at
// the end of the stream, and on a socket without TLS_RX.
const NoRecordType = -1

// MaxTLSKeyInfo is the length of the longest crypto_info this package handles.
const MaxTLSKeyInfo = 56

// AttachTLS puts the "tls" upper-layer protocol onto a TCP socket. It changes
// nothing until keys are set and cannot be undone. A socket that has it already
// is fine. The socket must be ESTABLISHED (else ENOTCONN); ENOENT means that the
// kernel has no tls module loaded, EOPNOTSUPP that it is an MPTCP socket.
//
// No one may be reading from the socket meanwhile (CVE-2025-38616).
func AttachTLS(fd int) error {
	err := unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_ULP, "tls")
	if errors.Is(err, unix.EEXIST) {
		// Some protocol is attached; it has to be this one.
		if ulp, gerr := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_ULP); gerr == nil && ulp == "tls" {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("attach kernel TLS (TCP_ULP): %w", err)
	}
	return nil
}

// HasTLS reports whether the "tls" upper-layer protocol is on the socket, with or
// without keys.
func HasTLS(fd int) bool {
	ulp, err := unix.GetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_ULP)
	return err == nil && ulp == "tls"
}

// SetTLSKeys gives the kernel one direction's crypto_info. The length must be
// exactly that of the cipher. It is not idempotent: from Linux 6.14 on a second
// call replaces the key and the sequence number. The caller wipes info.
func SetTLSKeys(fd int, dir TLSDirection, info []byte) error {
	if len(info) < 4 {
		return fmt.Errorf("kernel TLS keys: %w", unix.EINVAL)
	}
	_, _, e := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_TLS, uintptr(dir),
		uintptr(unsafe.Pointer(&info[0])), uintptr(len(info)), 0)
	if e != 0 {
		return e
	}
	return nil
}

// TLSKeys reads one direction's current crypto_info into info, whose length must
// be exactly that of the cipher the socket has, or 4 to learn only version and
// cipher. It contains the key unless only 4 bytes were asked for: wipe it.
// EBUSY or EINVAL: the direction has no keys, or another cipher.
func TLSKeys(fd int, dir TLSDirection, info []byte) error {
	if len(info) < 4 {
		return fmt.Errorf("kernel TLS keys: %w", unix.EINVAL)
	}
	n := uint32(len(info))
	_, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_TLS, uintptr(dir),
		uintptr(unsafe.Pointer(&info[0])), uintptr(unsafe.Pointer(&n)), 0)
	if e != 0 {
		return e
	}
	if int(n) > len(info) {
		return fmt.Errorf("kernel TLS keys: %d bytes, expected at most %d: %w", n, len(info), unix.EINVAL)
	}
	return nil
}

// controlByte is a control message that carries one byte: CMSG_SPACE(1) bytes,
// aligned as the kernel wants it.
type controlByte struct {
	hdr  unix.Cmsghdr
	data [unix.SizeofPtr]byte
}

// controlByteLen is CMSG_LEN(1).
const controlByteLen = unix.SizeofCmsghdr + 1

// TLSRecv reads plaintext from a kernel TLS socket without blocking and without
// allocating, and reports the type of the record or records it came from.
//
// Data records (type 23) are merged, other records come one a call. p must not be
// empty. whole is MSG_EOR: the end of a record was reached, so that a record of
// another type than 23 is complete. n == 0 with a type is an empty record; n == 0
// with NoRecordType is FIN. The error is a bare errno.
func TLSRecv(fd int, p []byte) (n, typ int, whole bool, err error) {
	return tlsRecv(fd, p, 0)
}

// TLSPeek is TLSRecv that leaves what it read in the socket (MSG_PEEK).
func TLSPeek(fd int, p []byte) (n, typ int, whole bool, err error) {
	return tlsRecv(fd, p, unix.MSG_PEEK)
}

func tlsRecv(fd int, p []byte, flags int) (n, typ int, whole bool, err error) {
	if len(p) == 0 {
		return 0, NoRecordType, false, unix.EINVAL
	}
	var (
		iov unix.Iovec
		ctl controlByte
		msg unix.Msghdr
	)
	iov.Base = &p[0]
	iov.SetLen(len(p))
	msg.Iov = &iov
	msg.SetIovlen(1)
	msg.Control = (*byte)(unsafe.Pointer(&ctl))
	msg.SetControllen(int(unsafe.Sizeof(ctl)))
	for {
		r, _, e := unix.Syscall(unix.SYS_RECVMSG, uintptr(fd), uintptr(unsafe.Pointer(&msg)),
			uintptr(flags|unix.MSG_DONTWAIT))
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return 0, NoRecordType, false, e
		}
		n = int(r)
		break
	}
	typ = NoRecordType
	if int(msg.Controllen) >= controlByteLen && ctl.hdr.Level == unix.SOL_TLS && ctl.hdr.Type == tlsGetRecordType {
		typ = int(ctl.data[0])
	}
	return n, typ, int(msg.Flags)&unix.MSG_EOR != 0, nil
}

// TLSSendData writes application data without blocking and returns how much the
// kernel took; a record the kernel sealed and could not send yet stays with the
// socket. The error is a bare errno, nil when n > 0.
func TLSSendData(fd int, p []byte) (n int, err error) {
	if len(p) == 0 {
		return 0, nil
	}
	for {
		r, _, e := unix.Syscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)),
			unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return 0, e
		}
		return int(r), nil
	}
}

// TLSSendRecord writes one record of the given type without blocking. A record of
// up to 16 KiB is taken whole or not at all; p must not be empty, since the kernel
// sends nothing for an empty one. The error is a bare errno.
func TLSSendRecord(fd int, typ byte, p []byte) (n int, err error) {
	if len(p) == 0 {
		return 0, unix.EINVAL
	}
	var (
		iov unix.Iovec
		ctl controlByte
		msg unix.Msghdr
	)
	iov.Base = &p[0]
	iov.SetLen(len(p))
	ctl.hdr.Level = unix.SOL_TLS
	ctl.hdr.Type = tlsSetRecordType
	ctl.hdr.SetLen(controlByteLen)
	ctl.data[0] = typ
	msg.Iov = &iov
	msg.SetIovlen(1)
	msg.Control = (*byte)(unsafe.Pointer(&ctl))
	msg.SetControllen(int(unsafe.Sizeof(ctl)))
	for {
		r, _, e := unix.Syscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&msg)),
			unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return 0, e
		}
		return int(r), nil
	}
}

// TakeSocketError returns and clears the socket's pending error (SO_ERROR); nil
// when there is none. After a record that does not authenticate, writes fail until
// it is cleared.
func TakeSocketError(fd int) error {
	v, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return err
	}
	if v != 0 {
		return unix.Errno(v)
	}
	return nil
}

// IsMPTCP reports whether fd is a multipath TCP socket, on which kernel TLS
// cannot be used.
func IsMPTCP(fd int) bool {
	proto, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	return err == nil && proto == unix.IPPROTO_MPTCP
}

// TCPWritten returns how many bytes have been written into a TCP socket since it
// was connected, acknowledged or not, against an arbitrary but fixed origin: only
// differences mean anything. A sent FIN is not counted. ENOTCONN: the connection
// was reset or is closed both ways, and what was queued is gone.
func TCPWritten(fd int) (uint64, error) {
	// bytes_acked and the queue's length cannot be read in one call; an
	// acknowledgement in between would be counted twice or not at all, so the
	// answer counts only if nothing moved around it.
	const tries = 64
	before, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return 0, fmt.Errorf("TCP_INFO: %w", err)
	}
	for range tries {
		queued, err := unix.IoctlGetInt(fd, unix.SIOCOUTQ)
		if err != nil {
			return 0, fmt.Errorf("SIOCOUTQ: %w", err)
		}
		after, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			return 0, fmt.Errorf("TCP_INFO: %w", err)
		}
		if before.Bytes_acked == after.Bytes_acked && before.State == after.State {
			n := after.Bytes_acked + uint64(queued)
			switch after.State {
			case tcpClose:
				return 0, fmt.Errorf("TCP_INFO: %w", unix.ENOTCONN)
			case tcpFinWait1, tcpFinWait2, tcpClosing, tcpLastAck, tcpTimeWait:
				n--
			}
			return n, nil
		}
		before = after
	}
	return 0, fmt.Errorf("TCP_INFO: %w", unix.EAGAIN)
}

// TCPReceived returns how many bytes a TCP socket has received since it was connected,
// read or not. A FIN may count as one.
func TCPReceived(fd int) (uint64, error) {
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return 0, fmt.Errorf("TCP_INFO: %w", err)
	}
	return info.Bytes_received, nil
}

// IsWritable reports whether a third of the socket's send buffer is free (POLLOUT).
func IsWritable(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n == 1 && fds[0].Revents&unix.POLLOUT != 0
}

// PeerFinished reports that the peer's FIN has arrived on a TCP socket, read or not.
func PeerFinished(fd int) (bool, error) {
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return false, fmt.Errorf("TCP_INFO: %w", err)
	}
	switch info.State {
	case tcpCloseWait, tcpLastAck, tcpClosing, tcpTimeWait, tcpClose:
		return true, nil
	}
	return false, nil
}

// From the kernel's include/net/tcp_states.h.
const (
	tcpFinWait1  = 4
	tcpFinWait2  = 5
	tcpTimeWait  = 6
	tcpClose     = 7
	tcpCloseWait = 8
	tcpLastAck   = 9
	tcpClosing   = 11
)
