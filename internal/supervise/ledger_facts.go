package supervise

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/fxamacker/cbor/v2"

	"github.com/ktlsvisor/ktlsvisor/internal/plaincbor"
)

// details are what the facts of package ktls say of a session, as far as it is shown.
type details struct {
	Version uint16 `cbor:"3,keyasint"`
	Suite   uint16 `cbor:"4,keyasint"`
	Reason  string `cbor:"7,keyasint"`
	SNI     string `cbor:"8,keyasint"`
	ALPN    string `cbor:"9,keyasint"`
	Peer    string `cbor:"21,keyasint"`
}

// detailsOf returns nothing of what cannot be read: then the slot has it.
func detailsOf(ktlsFacts []byte) (d details) {
	if cbor.Unmarshal(ktlsFacts, &d) != nil {
		return details{}
	}
	d.Reason = clip(d.Reason, maxReason)
	return d
}

// same returns v, or nothing if it is what is known already.
func same[T comparable](v, known T) (rest T) {
	if v == known {
		return rest
	}
	return v
}

// without leaves out what can be told from ktlsFacts.
func (f facts) without(ktlsFacts []byte) *facts {
	d := detailsOf(ktlsFacts)
	f.Peer, f.SNI, f.ALPN, f.Reason = same(f.Peer, d.Peer), same(f.SNI, d.SNI), same(f.ALPN, d.ALPN), same(f.Reason, d.Reason)
	f.Version, f.Suite = same(f.Version, d.Version), same(f.Suite, d.Suite)
	return &f
}

// with is the contrary of without.
func (f *facts) with(ktlsFacts []byte) {
	d := detailsOf(ktlsFacts)
	f.Peer, f.SNI, f.ALPN, f.Reason = cmp.Or(f.Peer, d.Peer), cmp.Or(f.SNI, d.SNI), cmp.Or(f.ALPN, d.ALPN), cmp.Or(f.Reason, d.Reason)
	f.Version, f.Suite = cmp.Or(f.Version, d.Version), cmp.Or(f.Suite, d.Suite)
}

// putFacts enters what is known of a session, before its first entry is written.
func (l *ledger) putFacts(i int, f *facts) error {
	return putPlace(l.factsPlace(i, f), f.without(f.Facts))
}

// factsPlace is what there is room for: what has a Base may have keys as well.
func (l *ledger) factsPlace(i int, f *facts) []byte {
	l.touch(i) // so that the next supervisor finds it, if this one is killed
	if len(f.Base) > 0 {
		return l.slot(i)[factsOff:keysOff]
	}
	return l.slot(i)[factsOff:]
}

// putBigFacts is putFacts for those whose ktls facts are with the keeper.
func (l *ledger) putBigFacts(i int, f *facts) error {
	small := f.without(f.Facts)
	small.Facts, small.Overflow = nil, true
	return putPlace(l.factsPlace(i, f), small)
}

// facts reads what putFacts wrote; big are the facts that putBigFacts left out.
func (l *ledger) facts(i int, big []byte) (*facts, error) {
	f := new(facts)
	if err := getPlace(l.slot(i)[factsOff:], f); err != nil {
		return nil, fmt.Errorf("facts in the ledger: %w", err)
	}
	if f.Overflow {
		f.with(big)
	} else {
		f.with(f.Facts)
	}
	return f, nil
}

// ktlsFacts are the facts of a slot that travel with its session. Every move needs them
// and none changes them.
func (l *ledger) ktlsFacts(i int) (b []byte, ok bool) { return l.factsPart(i, 2) }

// base is the record state of the handshake, of a session in the kernel layer.
func (l *ledger) base(i int) ([]byte, error) {
	if b, ok := l.factsPart(i, 11); ok {
		return b, nil
	}
	if _, err := l.facts(i, nil); err != nil {
		return nil, err
	}
	return nil, errors.New("record state in the ledger: nothing there")
}

// factsPart returns one of the facts of a slot without decoding the rest. ok is false when
// it is not there in the form in which putFacts writes; facts says why.
func (l *ledger) factsPart(i int, part uint64) (b []byte, ok bool) {
	place := l.slot(i)[factsOff:]
	n := int(binary.LittleEndian.Uint32(place[4:]))
	if n == 0 || n > len(place)-8 || crc32.Checksum(place[4:8+n], crcTable) != binary.LittleEndian.Uint32(place) {
		return nil, false
	}
	in := plaincbor.NewReader(place[8 : 8+n])
	in.Map(func(key uint64) {
		if key == part {
			b = append([]byte(nil), in.Part()...)
		} else {
			in.Skip()
		}
	})
	return b, in.Done() && len(b) > 0
}
