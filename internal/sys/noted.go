package sys

import (
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A note is a place in shared memory where the kernel itself writes how many bytes a
// receive or a send took, before the call returns: the message header of recvmmsg(2)
// or sendmmsg(2). A process that is killed with SIGKILL in the call, or before it has
// looked at the result, leaves the number there, so that whoever maps the memory then
// knows what became of the bytes. The result of recvmsg(2) would be lost with the
// process.
//
// Of what is in a note, only the process that made the call can use the addresses.
type note struct {
	msg  unix.Msghdr
	n    uint32 // msg_len of struct mmsghdr; noteOpen until the kernel has written it
	_    uint32
	iov  unix.Iovec
	ctl  controlByte
	kind uint32
	_    uint32
}

// NoteSize is the size of a note in bytes. Notes are aligned to it, so that none
// lies on two pages.
const NoteSize = 128

var _ [NoteSize - unsafe.Sizeof(note{})]byte

const (
	// noteOpen stands where the kernel writes the number of bytes, and flags the
	// kernel never sets where it writes msg_flags.
	noteOpen  = 1<<32 - 1
	openFlags = 0x7ffffffe
)

// Noted is what a note tells.
type Noted struct {
	// N is the number of bytes taken; 0 also when the call never was, or took none.
	N int
	// Type is the record type of a receive with kernel TLS, else NoRecordType.
	Type int
	// Doubt: the kernel began to write the note and could not finish.
	Doubt bool
}

func noteAt(b []byte) *note { return (*note)(unsafe.Pointer(&b[:NoteSize][0])) }

// OpenNote prepares the note for a call. From here on it says that nothing was taken.
func OpenNote(b []byte) {
	n := noteAt(b)
	atomic.StoreUint32(&n.n, noteOpen)
	n.msg = unix.Msghdr{Flags: openFlags}
	n.ctl = controlByte{}
}

// ReadNote reads a note, after the death of the process that used it, or in it.
func ReadNote(b []byte) Noted {
	n := noteAt(b)
	r := Noted{Type: NoRecordType}
	taken := atomic.LoadUint32(&n.n)
	if taken == noteOpen {
		r.Doubt = n.msg.Flags != openFlags && n.msg.Iov != nil
		return r
	}
	r.N = int(taken)
	if int(n.msg.Controllen) >= controlByteLen && n.ctl.hdr.Level == unix.SOL_TLS && n.ctl.hdr.Type == tlsGetRecordType {
		r.Type = int(n.ctl.data[0])
	}
	return r
}

// TLSRecvNoted is TLSRecv with the result in a note too. OpenNote must have been
// called, and the note is not opened again before p's bytes are accounted for. p lies
// in the same shared memory, outside of Go's heap.
func TLSRecvNoted(fd int, note, p []byte) (n, typ int, whole bool, err error) {
	if len(p) == 0 {
		return 0, NoRecordType, false, unix.EINVAL
	}
	t := noteAt(note)
	t.iov.Base = &p[0]
	t.iov.SetLen(len(p))
	t.msg.Control = (*byte)(unsafe.Pointer(&t.ctl))
	t.msg.SetControllen(int(unsafe.Sizeof(t.ctl)))
	t.msg.Iov = &t.iov
	t.msg.SetIovlen(1)
	for {
		r, _, e := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(t)), 1, unix.MSG_DONTWAIT, 0, 0)
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return 0, NoRecordType, false, e
		}
		if r != 1 {
			return 0, NoRecordType, false, unix.EIO
		}
		break
	}
	v := ReadNote(note)
	if v.Doubt {
		return 0, NoRecordType, false, unix.EFAULT
	}
	return v.N, v.Type, int(t.msg.Flags)&unix.MSG_EOR != 0, nil
}

// TLSSendNoted is TLSSendData with the result in a note too. OpenNote must have been
// called.
func TLSSendNoted(fd int, note, p []byte) (n int, err error) {
	if len(p) == 0 {
		return 0, nil
	}
	t := noteAt(note)
	t.iov.Base = &p[0]
	t.iov.SetLen(len(p))
	t.msg.Iov = &t.iov
	t.msg.SetIovlen(1)
	for {
		r, _, e := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(t)), 1,
			unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
		if e == unix.EINTR {
			continue
		}
		if e != 0 {
			return 0, e
		}
		if r != 1 {
			return 0, unix.EIO
		}
		return ReadNote(note).N, nil
	}
}
