package supervise

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/ktlsvisor/ktlsvisor/internal/plaincbor"
)

// ktlsFacts are the facts of a slot that travel with its session, without decoding the
// rest: every move needs them and none changes them. ok is false when they are not there
// in the form in which putFacts writes; facts says why.
func (l *ledger) ktlsFacts(i int) (b []byte, ok bool) {
	place := l.slot(i)[factsOff : factsOff+factsSize]
	n := int(binary.LittleEndian.Uint32(place[4:]))
	if n == 0 || n > len(place)-8 || crc32.Checksum(place[4:8+n], crcTable) != binary.LittleEndian.Uint32(place) {
		return nil, false
	}
	in := plaincbor.NewReader(place[8 : 8+n])
	in.Map(func(key uint64) {
		if key == 2 {
			b = append([]byte(nil), in.Part()...)
		} else {
			in.Skip()
		}
	})
	return b, in.Done() && len(b) > 0
}
