package ktls

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// probeCopies asks what io.Copy may do with a kernel session, by doing it: sendfile
// from a file, and splice from a pipe whose buffers are small, as those of packets
// from a network are. Kernels were seen that seal uninitialised memory for these.
func (k kernelEdge) probeCopies(module Check) []Check {
	checks := []Check{
		{Feature: FeatureSendfile, Direction: DirectionSend},
		{Feature: FeatureSplice, Direction: DirectionSend},
		{Feature: FeatureSplice, Direction: DirectionReceive},
	}
	// A control record and a record with a bad header both give EINVAL, the second only
	// once; an empty record and the end of the stream both give 0. And it moves one
	// record a call where recvmsg takes as many as fit.
	checks[2].verdict(StatusUnsupported, "splice(2) cannot tell a control record from a bad one, nor an empty one from the end; recvmsg is used", "") // nothing to do about it
	if module.Status != StatusSupported {
		for i := range checks {
			checks[i].verdict(module.Status, "no kernel TLS", module.Remedy)
		}
		return checks
	}
	for i, try := range []func(from, to *net.TCPConn) error{k.sendsFile, k.splices} {
		checks[i].verdict(k.tryCopy(try))
	}
	return checks
}

// tryCopy runs try over a connection with keys.
func (k kernelEdge) tryCopy(try func(from, to *net.TCPConn) error) (status Status, reason, remedy string) {
	const version = tls.VersionTLS12 // every kernel with TLS has it, and the copying is the same
	a, b, err := k.readyPair()
	if err != nil {
		return StatusUnknown, err.Error(), ""
	}
	defer closeBoth(a, b)
	keys := throwawayKeys(version, kernelAES128GCM)
	defer keys.wipe()
	if err := k.setKeys(a, sys.TLSSend, keys.bytes()); err != nil {
		return refusedKeys(err, version, kernelAES128GCM, DirectionSend)
	}
	if err := k.setKeys(b, sys.TLSReceive, keys.bytes()); err != nil {
		return refusedKeys(err, version, kernelAES128GCM, DirectionReceive)
	}
	switch err := try(a, b); {
	case err == nil:
		return StatusSupported, "", ""
	case errors.Is(err, sys.EMFILE), errors.Is(err, sys.ENFILE), errors.Is(err, sys.ENOMEM):
		return StatusUnknown, err.Error(), ""
	case errors.Is(err, os.ErrDeadlineExceeded):
		return StatusUnsupported, "not all that was sent arrived; data is copied", "another kernel"
	default:
		return StatusUnsupported, err.Error() + "; data is copied", "another kernel"
	}
}

// sendsFile sends a file of several pages by sendfile.
func sendsFile(from, to *net.TCPConn) error {
	content := bytes.Repeat([]byte("a file of the probe "), 1000)
	f, err := sys.SealedMemfd("ktls-probe", content)
	if err != nil {
		return err
	}
	defer func() { _ = sys.Close(f) }()
	if err := onFD(from, func(fd int) error {
		n, err := sys.SendFile(fd, f, len(content))
		if err == nil && n != len(content) {
			err = fmt.Errorf("sendfile took %d of %d bytes", n, len(content))
		}
		return err
	}); err != nil {
		return fmt.Errorf("sendfile: %w", err)
	}
	return arrives(to, content)
}

// Small buffers in a pipe, more than a record has room for (MAX_MSG_FRAGS in
// include/linux/skmsg.h is 17).
const (
	spliceParts = 40
	splicePart  = 100
)

// splices sends small buffers by splice.
func splices(from, to *net.TCPConn) error {
	r, w, err := sys.PacketPipe()
	if err != nil {
		return fmt.Errorf("pipe: %w", err)
	}
	defer func() { _, _ = sys.Close(r), sys.Close(w) }()
	if err := sys.GrowPipe(w, 64*os.Getpagesize()); err != nil {
		return fmt.Errorf("pipe of %d pages: %w", 64, err)
	}
	var content []byte
	for i := range spliceParts {
		part := bytes.Repeat([]byte{byte('A' + i)}, splicePart)
		if _, err := sys.Write(w, part); err != nil {
			return fmt.Errorf("pipe: %w", err)
		}
		content = append(content, part...)
	}
	if err := onFD(from, func(fd int) error {
		for left := len(content); left > 0; {
			n, err := sys.Splice(fd, r, left)
			if err != nil {
				return err
			}
			left -= n
		}
		return nil
	}); err != nil {
		return fmt.Errorf("splice: %w", err)
	}
	return arrives(to, content)
}

// arrives reads data records and compares.
func arrives(to *net.TCPConn, want []byte) error {
	rc, err := to.SyscallConn()
	if err != nil {
		return err
	}
	got := make([]byte, 0, 2*len(want))
	for len(got) < len(want) {
		var n, typ int
		rerr := rc.Read(func(fd uintptr) bool {
			n, typ, _, err = sys.TLSRecv(int(fd), got[len(got):cap(got)])
			return !errors.Is(err, sys.EAGAIN)
		})
		switch {
		case rerr != nil:
			return rerr
		case err != nil:
			return fmt.Errorf("the receiver: %w", err)
		case typ != int(typeData):
			return fmt.Errorf("a record of type %d arrived", typ)
		}
		got = got[:len(got)+n]
	}
	if !bytes.Equal(got, want) {
		return errors.New("other bytes arrived than were sent")
	}
	return nil
}
