package ktls

import (
	"errors"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// wirePosition computes where in the TCP stream the records sealed so far end.
// The kernel does not tell whether it holds a sealed record that TCP had no room
// for, and a shutdown drops such a record silently; but the length of everything
// sealed is known, since the sequence number counts records, and TCP tells how
// much it was given.
//
// Positions are those of sys.TCPWritten, which stay the same for the life of a
// connection, so they can travel with a session.
type wirePosition struct {
	known bool
	base  uint64 // position after record seq-1
	seq   uint64
	plain uint64 // bytes taken since then

	afterKey uint64 // position after the KeyUpdate that was sent, until the next key is set

	// Where it is not known: the position seen last, and since when.
	still      uint64
	stillSince time.Time
}

// stillLongEnough is for how long TCP must be given nothing, although it has room,
// before the kernel is taken to have nothing left.
const stillLongEnough = 50 * time.Millisecond

// start notes the position before the first record.
func (w *wirePosition) start(fd int, seq uint64) {
	base, err := sys.TCPWritten(fd)
	*w = wirePosition{known: err == nil, base: base, seq: seq}
}

// resume goes on from an exported position, if the exporter was the last to write.
// After its crash it was not, and its count is lost.
func (w *wirePosition) resume(fd int, c kernelCipher, base, seq uint64) {
	*w = wirePosition{}
	if now, err := sendSeq(fd, c); err == nil && base != 0 && now == seq {
		*w = wirePosition{known: true, base: base, seq: seq}
	}
}

// beforeRekey notes the position when a KeyUpdate was sealed, rekeyed goes on from
// there when the sequence number has begun anew.
func (w *wirePosition) beforeRekey(fd int, c kernelCipher, version uint16) {
	w.afterKey, _ = w.position(fd, c, version)
}

func (w *wirePosition) rekeyed() {
	*w = wirePosition{known: w.known && w.afterKey != 0, base: w.afterKey}
}

// position returns what resume wants; 0, 0 when it is not known. It is never 0
// otherwise, since the handshake was in front.
func (w *wirePosition) position(fd int, c kernelCipher, version uint16) (end, seq uint64) {
	if !w.known {
		return 0, 0
	}
	seq, err := sendSeq(fd, c)
	if err != nil || seq < w.seq {
		return 0, 0
	}
	return w.base + w.plain + (seq-w.seq)*c.overhead(version), seq
}

// drained reports that TCP was given every sealed record. Where the position is not
// known it is an estimate, which takes several calls. An error means that it never
// will be: the connection is gone.
func (w *wirePosition) drained(fd int, c kernelCipher, version uint16) (bool, error) {
	written, err := sys.TCPWritten(fd)
	switch {
	case errors.Is(err, sys.EAGAIN): // acknowledgements are coming in too fast to count
		return false, nil
	case err != nil:
		return false, err
	}
	if end, _ := w.position(fd, c, version); end != 0 {
		if written <= end {
			return written == end, nil
		}
		w.known = false // somebody left a record open that is not counted
	}
	if w.still != written || !sys.IsWritable(fd) {
		w.still, w.stillSince = written, time.Now()
		return false, nil
	}
	return time.Since(w.stillSince) >= stillLongEnough, nil
}

// sendSeq reads the sequence number of the next record to be sealed. The key that
// comes with it is wiped at once.
func sendSeq(fd int, c kernelCipher) (uint64, error) {
	var ci cryptoInfo
	defer ci.wipe()
	if err := ci.load(fd, sys.TLSSend, c); err != nil {
		return 0, err
	}
	return ci.seq(), nil
}

// used is at most how far the keys of both directions have been used, in blocks of
// 16 bytes, for a session whose last owner died and took its own count along: from the
// records under the key and from all bytes of the connection, whichever says less.
func (l *kernelLayer) used() (tx, rx uint64) {
	_ = l.control(func(fd int) error {
		if n, err := sys.TCPWritten(fd); err == nil {
			tx = l.usedAtMost(fd, sys.TLSSend, n)
		}
		if n, err := sys.TCPReceived(fd); err == nil {
			rx = l.usedAtMost(fd, sys.TLSReceive, n)
		}
		return nil
	})
	return tx, rx
}

func (l *kernelLayer) usedAtMost(fd int, dir sys.TLSDirection, bytes uint64) uint64 {
	var ci cryptoInfo
	defer ci.wipe()
	if err := ci.load(fd, dir, l.cipher); err != nil {
		return bytes / 16
	}
	records := ci.seq()
	return min(records*usage(maxPlaintext), bytes/16+2*records)
}
