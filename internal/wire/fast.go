package wire

import (
	"math"

	"github.com/ktlsvisor/ktlsvisor/internal/plaincbor"
)

// The messages of a move (ADOPT, PARKED and those that are a list of refs) without
// reflection: they are most of what goes over a channel, with a hundred bytes or a
// thousand for each session. What they say in another form, and every other message, is
// left to the general codec, with the same result.

// appendMessage appends m as the general encoder would; false, and b as it was, if m is
// for that one.
func appendMessage(b []byte, m *Message) ([]byte, bool) {
	switch m.Type {
	case TypeAdopt, TypeAdopted, TypeFreeze, TypeParked, TypeThaw, TypeResume, TypeRelease, TypeAbort, TypeClosedAck, TypeClose:
	default:
		return b, false
	}
	if m.Hello != nil || m.Welcome != nil || len(m.Blobs) > 0 || len(m.Refused) > 0 || len(m.Closed) > 0 || len(m.Held) > 0 ||
		m.Nonce != 0 || m.Text != "" || m.Millis != 0 || m.Drain || len(m.Rekeys) > 0 || m.Exposed != 0 {
		return b, false
	}
	pairs := uint64(1)
	for _, there := range []bool{len(m.Items) > 0, len(m.Refs) > 0, m.Last, m.Group != ""} {
		if there {
			pairs++
		}
	}
	b = plaincbor.AppendHead(b, plaincbor.Map, pairs)
	b = plaincbor.AppendUint(append(b, 0), uint64(m.Type))
	if len(m.Items) > 0 {
		b = plaincbor.AppendHead(append(b, 3), plaincbor.Array, uint64(len(m.Items)))
		for i := range m.Items {
			b = m.Items[i].append(b)
		}
	}
	if len(m.Refs) > 0 {
		b = plaincbor.AppendHead(append(b, 5), plaincbor.Array, uint64(len(m.Refs)))
		for _, r := range m.Refs {
			b = r.append(plaincbor.AppendHead(b, plaincbor.Map, 2))
		}
	}
	if m.Last {
		b = plaincbor.AppendTrue(append(b, 10))
	}
	if m.Group != "" {
		b = plaincbor.AppendText(append(b, 11), m.Group)
	}
	return b, true
}

func (r *Ref) append(b []byte) []byte {
	b = plaincbor.AppendUint(append(b, 1), r.ID)
	return plaincbor.AppendUint(append(b, 2), uint64(r.Epoch))
}

func (it *Item) append(b []byte) []byte {
	at, pairs := len(b), byte(2)
	b = it.Ref.append(append(b, 0))
	if it.Cargo.Size() > 0 {
		pairs++
		b = it.Cargo.append(append(b, 3))
	}
	if it.Group != "" {
		pairs++
		b = plaincbor.AppendText(append(b, 4), it.Group)
	}
	if it.Flags != 0 {
		pairs++
		b = plaincbor.AppendUint(append(b, 5), uint64(it.Flags))
	}
	if it.Large {
		pairs++
		b = plaincbor.AppendTrue(append(b, 6))
	}
	if it.WithSocket {
		pairs++
		b = plaincbor.AppendTrue(append(b, 7))
	}
	b[at] = plaincbor.Map<<5 | pairs
	return b
}

func (c *Cargo) append(b []byte) []byte {
	at, pairs := len(b), byte(0)
	b = append(b, 0)
	for i, v := range [...][]byte{c.Facts, c.Record, c.App} {
		if len(v) > 0 {
			pairs++
			b = plaincbor.AppendBytes(append(b, byte(i+1)), v)
		}
	}
	b[at] = plaincbor.Map<<5 | pairs
	return b
}

// decodeMessage reads what appendMessage writes; nil if b is for the general decoder.
func decodeMessage(b []byte) *Message {
	m := new(Message)
	in := plaincbor.NewReader(b)
	in.Map(func(key uint64) {
		switch key {
		case 0:
			m.Type = Type(in.Uint(math.MaxUint8))
		case 3:
			m.Items = make([]Item, in.Array(MaxItems))
			for i := range m.Items {
				m.Items[i].read(&in)
			}
		case 5:
			m.Refs = make([]Ref, in.Array(MaxItems))
			for i := range m.Refs {
				r := &m.Refs[i]
				in.Map(func(key uint64) { r.read(&in, key) })
			}
		case 10:
			m.Last = in.Bool()
		case 11:
			m.Group = in.Text()
		default:
			in.Bad = true
		}
	})
	if !in.Done() {
		return nil
	}
	return m
}

func (r *Ref) read(in *plaincbor.Reader, key uint64) {
	switch key {
	case 1:
		r.ID = in.Uint(math.MaxUint64)
	case 2:
		r.Epoch = Epoch(in.Uint(math.MaxUint64))
	default:
		in.Bad = true
	}
}

func (it *Item) read(in *plaincbor.Reader) {
	in.Map(func(key uint64) {
		switch key {
		case 3:
			it.Cargo.read(in)
		case 4:
			it.Group = in.Text()
		case 5:
			it.Flags = Flags(in.Uint(math.MaxUint8))
		case 6:
			it.Large = in.Bool()
		case 7:
			it.WithSocket = in.Bool()
		default:
			it.Ref.read(in, key)
		}
	})
}

func (c *Cargo) read(in *plaincbor.Reader) {
	in.Map(func(key uint64) {
		switch key {
		case 1:
			c.Facts = in.Part()
		case 2:
			c.Record = in.Part()
		case 3:
			c.App = in.Part()
		default:
			in.Bad = true
		}
	})
	// Two copies: what is used up at once, and what the application keeps.
	n := len(c.Facts)
	both := append(append(make([]byte, 0, n+len(c.Record)), c.Facts...), c.Record...)
	if c.Facts != nil {
		c.Facts = both[:n:n]
	}
	if c.Record != nil {
		c.Record = both[n:]
	}
	if c.App != nil {
		c.App = append(make([]byte, 0, len(c.App)), c.App...)
	}
}
