package load

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// A book knows what was sent; the verifier asks it and tells it. It is called
// from the goroutine that feeds the verifier.
type book interface {
	// sent is how many frames were handed to the connection so far: the
	// sequence number of the next one.
	sent() uint64
	// mayLose reports whether frames first to last can have been lost with
	// an owner that was allowed to crash.
	mayLose(first, last uint64) bool
	// echoed is told of a frame that came back whole and right.
	echoed(seq uint64, bytes int)
	// interrupted is told of a gap that is allowed: frames first to last did
	// not come back whole, and bytes of them are missing.
	interrupted(first, last uint64, bytes int64)
}

// A verifier compares the echoed stream with the stream that was sent. It is a
// pure state machine: bytes in, events out.
//
//	    right byte                    whole frame found, pieces check out
//	   +---------+                  +-------------------------------------+
//	   v         |                  v                                     |
//	[strict] ----+                [strict]                            [searching]
//	   |  wrong byte, may not be lost: WrongBytesError                    ^
//	   +-- wrong byte, may be lost -----------------------------------+
type verifier struct {
	gen  generator
	book book

	next uint64 // the frame that must come next
	want []byte // its bytes; empty when not generated yet
	at   int    // how many of them have come

	searching bool
	held      []byte // while searching: everything since the first byte of frame next
}

// A WrongBytesError is a deviation from what was sent that no crash explains.
type WrongBytesError struct {
	Frame uint64 // the frame that was expected
	At    int    // byte of that frame at which the stream went wrong
	Wrong int64  // bytes at hand that differ, at least 1
	What  string
}

func (e *WrongBytesError) Error() string {
	return fmt.Sprintf("frame %d, byte %d: %s (%d bytes differ)", e.Frame, e.At, e.What, e.Wrong)
}

// feed takes the next bytes of the stream. After an error the verifier must
// not be used again.
func (v *verifier) feed(p []byte) error {
	for len(p) > 0 {
		if v.searching {
			v.held = append(v.held, p...)
			rest, err := v.search()
			if err != nil || v.searching {
				return err
			}
			p = rest
			continue
		}
		if v.at == 0 {
			if v.next >= v.book.sent() {
				return &WrongBytesError{Frame: v.next, Wrong: int64(len(p)), What: "bytes came back that were not sent"}
			}
			v.want = v.gen.appendFrame(v.want[:0], v.next)
		}
		n := min(len(p), len(v.want)-v.at)
		if bytes.Equal(p[:n], v.want[v.at:v.at+n]) {
			v.at += n
			p = p[n:]
			if v.at == len(v.want) {
				v.frameDone()
			}
			continue
		}
		if !v.book.mayLose(v.next, v.next) {
			return v.deviation(p[:n])
		}
		v.searching = true
		v.held = append(v.held[:0], v.want[:v.at]...)
	}
	return nil
}

func (v *verifier) frameDone() {
	v.book.echoed(v.next, len(v.want))
	v.next++
	v.at = 0
}

// deviation describes what is wrong with p, the bytes that came where
// v.want[v.at:] was expected.
func (v *verifier) deviation(p []byte) error {
	e := &WrongBytesError{Frame: v.next, At: -1, What: "a byte differs from what was sent"}
	for i, b := range p {
		if b != v.want[v.at+i] {
			if e.At < 0 {
				e.At = v.at + i
			}
			e.Wrong++
		}
	}
	return e
}

// search looks in v.held for a frame to go on with. It returns what follows
// that frame and leaves the search, or goes on searching.
func (v *verifier) search() (rest []byte, err error) {
	sent := v.book.sent()
	var magic [4]byte
	binary.BigEndian.PutUint32(magic[:], frameMagic)
	for i := 0; ; i++ {
		j := bytes.Index(v.held[i:], magic[:])
		if j < 0 {
			break
		}
		i += j
		seq, ok := candidate(v.held[i:])
		if !ok || seq >= sent {
			continue // a tail that is still too short, or not ours
		}
		if seq <= v.next {
			// An old frame in full was doubled; anything less is chance,
			// or the beginning of frame next that we hold since before
			// the gap.
			if intact(v.held[i:]) {
				return nil, &WrongBytesError{Frame: v.next, Wrong: int64(len(v.held) - i),
					What: fmt.Sprintf("frame %d came twice or out of order", seq)}
			}
			continue
		}
		want := v.gen.appendFrame(v.want[:0], seq)
		v.want = want
		have := v.held[i:]
		if !bytes.HasPrefix(have, want) {
			continue // not all here yet, or cut itself
		}
		if err := v.checkGap(v.held[:i], seq); err != nil {
			return nil, err
		}
		// rest keeps the array; the next search, which may begin before
		// rest is used up, starts with one of its own.
		rest = have[len(want):]
		v.held = nil
		v.next = seq
		v.searching = false
		v.frameDone()
		return rest, nil
	}
	var room int64
	for seq := v.next; seq < sent && room < int64(len(v.held)); seq++ {
		room += int64(v.gen.frameLen(seq))
	}
	if int64(len(v.held)) > room {
		return nil, &WrongBytesError{Frame: v.next, Wrong: int64(len(v.held)) - room, What: "more bytes came back than were sent"}
	}
	return nil, nil
}

// checkGap decides whether got, which came where frames v.next to seq-1 were
// expected, is what a crash of the owner can leave of them, and reports it.
func (v *verifier) checkGap(got []byte, seq uint64) error {
	var sent []byte
	for s := v.next; s < seq; s++ {
		sent = v.gen.appendFrame(sent, s)
	}
	if !v.book.mayLose(v.next, seq-1) {
		return &WrongBytesError{Frame: v.next, Wrong: max(1, int64(len(sent)-len(got))),
			What: fmt.Sprintf("a gap up to frame %d, which was sent after the last phase that may lose frames", seq)}
	}
	if len(got) >= len(sent) || !isRemainder(got, sent) {
		return &WrongBytesError{Frame: v.next, Wrong: max(1, int64(len(got))),
			What: fmt.Sprintf("what came before frame %d is not what was sent with pieces missing", seq)}
	}
	v.book.interrupted(v.next, seq-1, int64(len(sent)-len(got)))
	return nil
}

// isRemainder reports whether got is sent with at most two stretches cut out.
// One crash of the owner cuts one; two are allowed because the next owner may
// die before a whole frame has passed.
func isRemainder(got, sent []byte) bool {
	head := 0
	for head < len(got) && head < len(sent) && got[head] == sent[head] {
		head++
	}
	got, sent = got[head:], sent[head:]
	for len(got) > 0 && len(sent) > 0 && got[len(got)-1] == sent[len(sent)-1] {
		got, sent = got[:len(got)-1], sent[:len(sent)-1]
	}
	return bytes.Contains(sent, got)
}
