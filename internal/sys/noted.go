package sys

import (
	"runtime"
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
// Its addresses are numbers to Go: they are of another process, or whatever that wrote
// there, when somebody else reads the note, and Go's garbage collector ends a process that
// comes across such a pointer.
type note struct {
	msg struct { // struct msghdr
		name       uintptr
		namelen    uint32
		iov        uintptr
		iovlen     uintptr
		control    uintptr
		controllen uintptr
		flags      int32
	}
	n   uint32 // msg_len of struct mmsghdr; noteOpen until the kernel has written it
	iov struct {
		base, len uintptr
	}
	ctl controlByte
}

// NoteSize is the size of a note in bytes. Notes are aligned to it, so that none
// lies on two pages.
const NoteSize = 128

var _ [NoteSize - unsafe.Sizeof(note{})]byte

const (
	// noteOpen stands where the kernel writes the number of bytes, and flags the
	// kernel never sets where it writes msg_flags. Not MSG_EOR: sendmmsg takes that one
	// from the header, and kernel TLS before 6.5 knows no such send.
	noteOpen  = 1<<32 - 1
	openFlags = 0x7ffffffe &^ unix.MSG_EOR
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
	n.msg.control, n.msg.controllen = 0, 0
	n.msg.flags = openFlags
	n.ctl = controlByte{}
}

// ReadNote reads a note, after the death of the process that used it, or in it.
func ReadNote(b []byte) Noted {
	n := noteAt(b)
	r := Noted{Type: NoRecordType}
	taken := atomic.LoadUint32(&n.n)
	if taken == noteOpen {
		r.Doubt = n.msg.flags != openFlags && n.msg.iov != 0
		return r
	}
	r.N = int(taken)
	if n.msg.controllen >= controlByteLen && n.ctl.hdr.Level == unix.SOL_TLS && n.ctl.hdr.Type == tlsGetRecordType {
		r.Type = int(n.ctl.data[0])
	}
	return r
}

func (n *note) vector(p []byte) {
	n.iov.base, n.iov.len = uintptr(unsafe.Pointer(&p[0])), uintptr(len(p))
	n.msg.iov, n.msg.iovlen = uintptr(unsafe.Pointer(&n.iov)), 1
}

// TLSRecvNoted is TLSRecv with the result in a note too. OpenNote must have been
// called, and the note is not opened again before p's bytes are accounted for. Neither p
// nor the note may be on a goroutine's stack, which can move.
func TLSRecvNoted(fd int, note, p []byte) (n, typ int, whole bool, err error) {
	if len(p) == 0 {
		return 0, NoRecordType, false, unix.EINVAL
	}
	t := noteAt(note)
	t.vector(p)
	t.msg.control, t.msg.controllen = uintptr(unsafe.Pointer(&t.ctl)), unsafe.Sizeof(t.ctl)
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
	runtime.KeepAlive(p)
	v := ReadNote(note)
	if v.Doubt {
		return 0, NoRecordType, false, unix.EFAULT
	}
	return v.N, v.Type, int(t.msg.flags)&unix.MSG_EOR != 0, nil
}

// TLSSendNoted is TLSSendData with the result in a note too. OpenNote must have been
// called. p is not on a goroutine's stack either.
func TLSSendNoted(fd int, note, p []byte) (n int, err error) {
	if len(p) == 0 {
		return 0, nil
	}
	t := noteAt(note)
	t.vector(p)
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
		runtime.KeepAlive(p)
		return ReadNote(note).N, nil
	}
}
