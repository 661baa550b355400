package ktls

import (
	"math"

	"github.com/ktlsvisor/ktlsvisor/internal/plaincbor"
)

// Facts and records in the form in which we write them, without reflection: every
// session that moves is encoded once and decoded twice, and the general decoder takes
// longer for that than the kernel does for the socket. Whatever is not in this form (an
// unknown key, another order, certificates) is left to the general decoder: what the two
// take is the same, and so is what they make of it.

// encode appends r; it gives what cbor.Marshal gives.
func (r *record) encode(b []byte) []byte {
	start := len(b)
	b = append(b, 0xb8, 0) // a map; the number of pairs comes at the end
	n := byte(0)
	num := func(key byte, v uint64) {
		if v != 0 {
			n++
			b = plaincbor.AppendUint(plaincbor.AppendUint(b, uint64(key)), v)
		}
	}
	str := func(key byte, v []byte) {
		if len(v) > 0 {
			n++
			b = plaincbor.AppendBytes(plaincbor.AppendUint(b, uint64(key)), v)
		}
	}
	dir := func(key byte, k *keys) {
		if k != nil {
			n++
			b = k.encode(plaincbor.AppendUint(b, uint64(key)))
		}
	}
	n = 3
	b = cborInt(append(b, 1), r.V)
	b = append(cborBytesHead(append(b, 2), r.ID), r.ID...)
	b = plaincbor.AppendUint(append(b, 3), uint64(r.Layer))
	dir(4, r.TX)
	dir(5, r.RX)
	str(6, r.Raw)
	str(7, r.Plain)
	str(8, r.Sealed)
	str(9, r.Ctl)
	num(10, uint64(r.CtlTyp))
	str(11, r.Unread)
	str(12, r.Queued)
	str(13, r.Hand)
	num(14, uint64(r.RXEnd))
	num(15, uint64(r.TXEnd))
	num(16, uint64(r.Owed))
	num(17, uint64(r.Asked))
	num(18, r.RXUsed)
	num(19, r.TXUsed)
	num(20, r.RXGen)
	num(21, r.TXGen)
	num(22, uint64(r.Empties))
	num(23, uint64(r.Warnings))
	num(24, uint64(r.Handshakes))
	num(25, r.Wire)
	num(26, r.WireSeq)
	num(27, r.RXPos)
	num(28, r.TXPos)
	if n < 24 { // the short form
		b = append(b[:start+1], b[start+2:]...)
		b[start] = 0xa0 | n
	} else {
		b[start+1] = n
	}
	return b
}

func (k *keys) encode(b []byte) []byte {
	at, n := len(b), byte(0)
	b = append(b, 0)
	for i, v := range [][]byte{k.Secret, k.Key, k.IV} {
		if len(v) > 0 {
			n++
			b = plaincbor.AppendBytes(append(b, byte(i+1)), v)
		}
	}
	for i, v := range []uint64{k.Seq, k.Gen} {
		if v != 0 {
			n++
			b = plaincbor.AppendUint(append(b, byte(i+4)), v)
		}
	}
	b[at] = 0xa0 | n
	return b
}

// size is not less than what encode appends.
func (r *record) size() int {
	n := 256 + len(r.ID) + len(r.Raw) + len(r.Plain) + len(r.Sealed) + len(r.Ctl) + len(r.Unread) + len(r.Queued) + len(r.Hand)
	for _, k := range []*keys{r.TX, r.RX} {
		if k != nil {
			n += 48 + len(k.Secret) + len(k.Key) + len(k.IV)
		}
	}
	return n
}

func cborInt(b []byte, v int) []byte {
	if v < 0 {
		return plaincbor.AppendHead(b, 1, uint64(-1-v))
	}
	return plaincbor.AppendUint(b, uint64(v))
}

// cborBytesHead is the head of v, or null, as the general encoder has it.
func cborBytesHead(b, v []byte) []byte {
	if v == nil {
		return append(b, 0xf6)
	}
	return plaincbor.AppendHead(b, plaincbor.Bytes, uint64(len(v)))
}

// read fills an empty d; false means that b is for the general decoder, and d is of no
// use.
func (d *decodedRecord) read(b []byte) bool {
	r := &d.record
	in := plaincbor.NewReader(b)
	in.Map(func(key uint64) {
		switch key {
		case 1:
			r.V = int(in.Uint(math.MaxInt32))
		case 2:
			r.ID = in.Bytes()
		case 3:
			r.Layer = Layer(in.Uint(math.MaxUint8))
		case 4:
			r.TX = &d.tx
			d.tx.read(&in)
		case 5:
			r.RX = &d.rx
			d.rx.read(&in)
		case 6:
			r.Raw = in.Bytes()
		case 7:
			r.Plain = in.Bytes()
		case 8:
			r.Sealed = in.Bytes()
		case 9:
			r.Ctl = in.Bytes()
		case 10:
			r.CtlTyp = recordType(in.Uint(math.MaxUint8))
		case 11:
			r.Unread = in.Bytes()
		case 12:
			r.Queued = in.Bytes()
		case 13:
			r.Hand = in.Bytes()
		case 14:
			r.RXEnd = ending(in.Uint(math.MaxUint8))
		case 15:
			r.TXEnd = ending(in.Uint(math.MaxUint8))
		case 16:
			r.Owed = uint32(in.Uint(math.MaxUint32))
		case 17:
			r.Asked = uint32(in.Uint(math.MaxUint32))
		case 18:
			r.RXUsed = in.Uint(math.MaxUint64)
		case 19:
			r.TXUsed = in.Uint(math.MaxUint64)
		case 20:
			r.RXGen = in.Uint(math.MaxUint64)
		case 21:
			r.TXGen = in.Uint(math.MaxUint64)
		case 22:
			r.Empties = uint8(in.Uint(math.MaxUint8))
		case 23:
			r.Warnings = uint8(in.Uint(math.MaxUint8))
		case 24:
			r.Handshakes = uint8(in.Uint(math.MaxUint8))
		case 25:
			r.Wire = in.Uint(math.MaxUint64)
		case 26:
			r.WireSeq = in.Uint(math.MaxUint64)
		case 27:
			r.RXPos = in.Uint(math.MaxUint64)
		case 28:
			r.TXPos = in.Uint(math.MaxUint64)
		default:
			in.Bad = true
		}
	})
	if !in.Done() {
		r.TX.wipe()
		r.RX.wipe()
		return false
	}
	return true
}

func (k *keys) read(r *plaincbor.Reader) {
	r.Map(func(key uint64) {
		switch key {
		case 1:
			k.Secret = r.Bytes()
		case 2:
			k.Key = r.Bytes()
		case 3:
			k.IV = r.Bytes()
		case 4:
			k.Seq = r.Uint(math.MaxUint64)
		case 5:
			k.Gen = r.Uint(math.MaxUint64)
		default:
			r.Bad = true
		}
	})
}

// decode is that of facts without certificates and what belongs to them.
func (f *facts) decode(b []byte) bool {
	in := plaincbor.NewReader(b)
	in.Map(func(key uint64) {
		switch key {
		case 1:
			f.V = int(in.Uint(math.MaxInt32))
		case 2:
			f.ID = in.Bytes()
		case 3:
			f.Version = uint16(in.Uint(math.MaxUint16))
		case 4:
			f.Suite = uint16(in.Uint(math.MaxUint16))
		case 5:
			f.Client = in.Bool()
		case 6:
			f.Layer = Layer(in.Uint(math.MaxUint8))
		case 7:
			f.Reason = in.Text()
		case 8:
			f.ServerName = in.Text()
		case 9:
			f.Protocol = in.Text()
		case 10:
			f.Resumed = in.Bool()
		case 11:
			f.Curve = uint16(in.Uint(math.MaxUint16))
		case 12:
			f.ECH = in.Bool()
		case 13:
			f.HRR = in.Bool()
		case 20:
			f.Local = in.Text()
		case 21:
			f.Remote = in.Text()
		default:
			in.Bad = true
		}
	})
	return in.Done()
}
