package keeper

import (
	"errors"
	"fmt"

	"github.com/fxamacker/cbor/v2"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// The keeper lives longer than the supervisors it serves, so a new supervisor
// speaks to an old keeper. Each side sends the newest version it knows in HELLO;
// both then use the lower one. Anything a version does not define closes the
// channel.
const version = 1

// op is what a message is. Numbers are on the wire: never renumber.
type op uint8

const (
	opHello     op = iota + 1 // version, the sender's pidfd; must come first
	opLead                    // reply: incarnation
	opPut                     // entries with their descriptors
	opGet                     // kind, ids; replies: entries with descriptors, more
	opList                    // kind; replies: entries, more
	opDelete                  // keys as entries without data
	opSuccessor               // reply: one descriptor
	opYield
	opReclaim
	opDone      // code, text
	opTerminate // from the keeper, id 0, no reply
	opReply     // from the keeper
)

// failure is the reason in a reply. Numbers are on the wire: never renumber.
type failure uint8

const (
	failNone failure = iota
	failNotLeader
	failLed
	failFull
	failEnding
)

func (f failure) err(text string) error {
	var sentinel error
	switch f {
	case failNone:
		return nil
	case failNotLeader:
		sentinel = ErrNotLeader
	case failLed:
		sentinel = ErrLed
	case failFull:
		sentinel = ErrFull
	case failEnding:
		sentinel = ErrEnding
	default:
		sentinel = fmt.Errorf("keeper: failure %d", f)
	}
	if text == "" {
		return sentinel
	}
	return fmt.Errorf("%w: %s", sentinel, text)
}

// message is every request and every reply; which fields count depends on Op.
type message struct {
	ID          uint64      `cbor:"1,keyasint"`
	Op          op          `cbor:"2,keyasint"`
	Version     uint32      `cbor:"3,keyasint,omitempty"`
	Kind        Kind        `cbor:"4,keyasint,omitempty"`
	IDs         []uint64    `cbor:"5,keyasint,omitempty"`
	Entries     []wireEntry `cbor:"6,keyasint,omitempty"`
	More        bool        `cbor:"7,keyasint,omitempty"`
	Failure     failure     `cbor:"8,keyasint,omitempty"`
	Text        string      `cbor:"9,keyasint,omitempty"`
	Incarnation uint32      `cbor:"10,keyasint,omitempty"`
	Code        int         `cbor:"11,keyasint,omitempty"`
}

// wireEntry is an entry, a key, or an entry of a list. FDs descriptors of the
// message belong to it, in order.
type wireEntry struct {
	Kind Kind   `cbor:"1,keyasint"`
	ID   uint64 `cbor:"2,keyasint,omitempty"`
	Name string `cbor:"3,keyasint,omitempty"`
	Meta []byte `cbor:"4,keyasint,omitempty"`
	FDs  uint8  `cbor:"5,keyasint,omitempty"`
}

const (
	maxIDs     = 4096 // ids in one GET: at most 9 bytes each
	maxEntries = 4096 // entries in one message
	// entryOverhead bounds what an entry takes on the wire besides its name and
	// data: map head, five keys, kind, id, two length heads, count.
	entryOverhead = 32
	// pageBytes is how much of a message entries may fill; the rest is for the head.
	pageBytes = sys.MaxPacket - 1024
	maxText   = 512 // bytes of an error text or of DONE's message
)

var (
	encMode = mustEnc()
	decMode = mustDec()
)

func mustEnc() cbor.EncMode {
	m, err := cbor.EncOptions{}.EncMode()
	if err != nil {
		panic(err) // constant options: cannot happen on input
	}
	return m
}

func mustDec() cbor.DecMode {
	m, err := cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		MaxNestedLevels:   4,
		MaxArrayElements:  maxEntries,
		MaxMapPairs:       16,
		IndefLength:       cbor.IndefLengthForbidden,
		TagsMd:            cbor.TagsForbidden,
		ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
	}.DecMode()
	if err != nil {
		panic(err) // constant options: cannot happen on input
	}
	return m
}

func encode(m *message) ([]byte, error) {
	b, err := encMode.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode message: %w", err)
	}
	if len(b) > sys.MaxPacket {
		return nil, fmt.Errorf("message of %d bytes, the limit is %d", len(b), sys.MaxPacket)
	}
	return b, nil
}

// decode reads a message that came with nfds descriptors and checks everything
// that does not depend on the receiver's state.
func decode(b []byte, nfds int) (*message, error) {
	var m message
	if err := decMode.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("malformed message: %w", err)
	}
	want := 0
	for i := range m.Entries {
		e := &m.Entries[i]
		if len(e.Name) > MaxName || len(e.Meta) > MaxMeta {
			return nil, fmt.Errorf("malformed message: entry %s %d: %d bytes of name, %d of data", e.Kind, e.ID, len(e.Name), len(e.Meta))
		}
		want += int(e.FDs)
	}
	if m.Op == opHello || (m.Op == opReply && m.Code == replyChannel) {
		want++
	}
	if want != nfds {
		return nil, fmt.Errorf("malformed message: %d descriptors came, %d were announced", nfds, want)
	}
	return &m, nil
}

// replyChannel in a reply's Code says that its one descriptor is a channel.
const replyChannel = 1

var errNoHead = errors.New("malformed message: no head")

// decodeHead reads the message at the start of b, whose length is not known
// because its descriptors were dropped (sys.ErrControlTruncated), to learn whom
// to answer. CBOR ends by itself, so what follows in b does not matter.
func decodeHead(b []byte) (*message, error) {
	var m message
	if _, err := decMode.UnmarshalFirst(b, &m); err != nil {
		return nil, fmt.Errorf("%w: %w", errNoHead, err)
	}
	return &m, nil
}

// pageOf counts how many of the entries fit into one message. sizes reports the
// bytes and descriptors of entry i.
func pageOf(n int, sizes func(i int) (size, fds int)) int {
	size, fds := 0, 0
	for i := range min(n, maxEntries) {
		s, f := sizes(i)
		size += s + entryOverhead
		fds += f
		if i > 0 && (size > pageBytes || fds > sys.MaxFDs) {
			return i
		}
	}
	return min(n, maxEntries)
}

// short cuts text for a message, at a byte limit and to valid UTF-8.
func short(text string) string {
	if len(text) <= maxText {
		return text
	}
	end := maxText
	for end > 0 && text[end]&0xc0 == 0x80 {
		end--
	}
	return text[:end]
}
