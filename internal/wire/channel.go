package wire

import (
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/fault"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// Channel is one end of a control channel. One goroutine may receive while
// another sends.
type Channel struct {
	pc  *sys.PacketConn
	buf []byte
	out []byte // of Send: what it sends and the descriptors of that
	fds []int

	in, far *mailbox // of a Pair, in place of all the above
}

// NewChannel takes ownership of fd, also when it fails.
func NewChannel(fd int) (*Channel, error) {
	pc, err := sys.NewPacketConn(fd)
	if err != nil {
		return nil, fmt.Errorf("control channel: %w", err)
	}
	return &Channel{pc: pc, buf: make([]byte, sys.MaxPacket)}, nil
}

// Close closes the channel; pending calls return.
func (c *Channel) Close() error {
	if c.in != nil {
		c.far.end()
		c.in.close()
		return nil
	}
	return c.pc.Close()
}

// Dup returns a duplicate of the channel's descriptor, which the caller owns. Not for a
// Pair, which has none; neither are Conn and Send.
func (c *Channel) Dup() (int, error) { return c.pc.Dup() }

// Conn gives access to deadlines.
func (c *Channel) Conn() *sys.PacketConn { return c.pc }

// Send sends m, whose sockets (ADOPT) and arena (WELCOME) are duplicated into the message: the caller
// keeps its own. Cargoes and blobs larger than MaxInline go into memory files. It
// waits in the poller, never in the kernel, while the peer does not read, and tries
// again for up to ShortageLimit when the machine is short of something.
func (c *Channel) Send(m *Message) error {
	for began := time.Now(); ; time.Sleep(shortagePause) {
		err := c.try(m)
		if !Shortage(err) || time.Since(began) > ShortageLimit {
			return err
		}
	}
}

// ShortageLimit is how long a shortage may last. Nothing tells when it is over.
const (
	ShortageLimit = 2 * time.Second
	shortagePause = 10 * time.Millisecond
)

// Shortage says that an error of Send is about memory or descriptors, which others may
// give back: nothing was sent, and neither the message nor the channel is to blame.
func Shortage(err error) bool {
	for _, e := range []error{syscall.ENOBUFS, syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE, syscall.ETOOMANYREFS} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func (c *Channel) try(m *Message) error {
	if fault.Enabled {
		return c.sendFaulty(m)
	}
	return c.send(m)
}

func (c *Channel) send(m *Message) error {
	out := *m
	if m.anyLarge() { // what goes into memory files is taken out
		out.Items = append([]Item(nil), m.Items...)
		out.Blobs = append([]Blob(nil), m.Blobs...)
	}
	var own []int
	fds := c.fds[:0]
	defer func() { sys.CloseAll(own) }()
	total := 0
	largeFD := func(b []byte) (int, error) {
		if total += len(b); total > MaxLarge {
			return -1, fmt.Errorf("states of %d bytes in one message, the limit is %d", total, MaxLarge)
		}
		return largeFD(b)
	}
	for i := range out.Items {
		it := &out.Items[i]
		if m.Type == TypeAdopt || it.WithSocket {
			fds = append(fds, it.Socket)
		}
		if it.Cargo.Size() <= MaxInline {
			continue
		}
		b, err := encMode.Marshal(&it.Cargo)
		if err != nil {
			return fmt.Errorf("%s: session %d: encode: %w", m.Type, it.ID, err)
		}
		fd, err := largeFD(b)
		if err != nil {
			return fmt.Errorf("%s: session %d: %w", m.Type, it.ID, err)
		}
		own, fds = append(own, fd), append(fds, fd)
		it.Cargo, it.Large = Cargo{}, true
	}
	for i := range out.Blobs {
		bl := &out.Blobs[i]
		if len(bl.Data) <= MaxInline {
			continue
		}
		fd, err := largeFD(bl.Data)
		if err != nil {
			return fmt.Errorf("%s: group %q: %w", m.Type, bl.Group, err)
		}
		own, fds = append(own, fd), append(fds, fd)
		bl.Data, bl.Large = nil, true
	}
	if m.hasFile() {
		fds = append(fds, m.File)
	}
	c.fds = fds[:0]
	b, ok := appendMessage(c.out[:0], &out)
	if ok {
		c.out = b[:0]
	} else { // in memory of its own: out stays, grown to what moves need
		var err error
		if b, err = Encode(&out); err != nil {
			return err
		}
	}
	if len(b) > sys.MaxPacket {
		return fmt.Errorf("%s: message of %d bytes, the limit is %d", m.Type, len(b), sys.MaxPacket)
	}
	return c.pc.Send(b, fds)
}

// hasFile says whether a memory file comes with m.
func (m *Message) hasFile() bool {
	return m.Type == TypeMarks || m.Type == TypeWelcome && m.Welcome != nil && m.Welcome.Arena > 0
}

func (m *Message) anyLarge() bool {
	for i := range m.Items {
		if m.Items[i].Cargo.Size() > MaxInline {
			return true
		}
	}
	for i := range m.Blobs {
		if len(m.Blobs[i].Data) > MaxInline {
			return true
		}
	}
	return false
}

func largeFD(b []byte) (int, error) {
	if err := fault.At("before-memfd").Err; err != nil {
		return -1, fmt.Errorf("memfd: %w", err)
	}
	if len(b) > MaxCargo {
		return -1, fmt.Errorf("state of %d bytes, the limit is %d", len(b), MaxCargo)
	}
	return sys.SealedMemfd("ktlsvisor-cargo", b)
}

// DescriptorsLostError reports a message some of whose descriptors the kernel
// dropped because this process is at its NOFILE limit. The ones that arrived are
// closed. The channel is still good; Message says what they were meant for.
type DescriptorsLostError struct {
	Message *Message
	Err     error
}

func (e *DescriptorsLostError) Error() string { return e.Message.Type.String() + ": " + e.Err.Error() }

// Unwrap returns sys.ErrControlTruncated.
func (e *DescriptorsLostError) Unwrap() error { return e.Err }

// Recv receives one message. Sockets of its items belong to the caller. On any
// error every descriptor of the message has been closed; io.EOF means that the
// peer is gone, ErrProtocol that it is not to be trusted any further. After a
// *DescriptorsLostError the channel can be used on.
func (c *Channel) Recv() (*Message, error) {
	if c.in != nil {
		return c.in.take()
	}
	if fault.Enabled {
		return c.recvFaulty()
	}
	return c.recv()
}

func (c *Channel) recv() (*Message, error) {
	n, fds, err := c.pc.Recv(c.buf)
	if errors.Is(err, sys.ErrControlTruncated) {
		// The bytes are there. Their number is not, but CBOR knows its own end.
		if m := decodeFirst(c.buf); m != nil {
			return nil, &DescriptorsLostError{Message: m, Err: err}
		}
	}
	if err != nil {
		return nil, err
	}
	m, err := Decode(c.buf[:n])
	if err != nil {
		sys.CloseAll(fds)
		return nil, err
	}
	if err := m.takeFDs(fds); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrProtocol, m.Type, err)
	}
	return m, nil
}

// takeFDs distributes the descriptors over the items; on error it closes all.
func (m *Message) takeFDs(fds []int) (err error) {
	all := fds
	var used []int // memory files, closed in any case
	defer func() {
		sys.CloseAll(used)
		if err != nil {
			for _, fd := range all {
				if !contains(used, fd) {
					sys.CloseAll([]int{fd})
				}
			}
		}
	}()
	next := func() (int, error) {
		if len(fds) == 0 {
			return -1, fmt.Errorf("%d descriptors came with it, more are needed", len(all))
		}
		fd := fds[0]
		fds = fds[1:]
		return fd, nil
	}
	var total int64
	large := func() ([]byte, error) {
		fd, err := next()
		if err != nil {
			return nil, err
		}
		used = append(used, fd)
		size, err := sys.FileSize(fd)
		if err != nil {
			return nil, fmt.Errorf("memory file: %w", err)
		}
		// Before anything is read: a few small messages must not fill this process.
		if total += size; size > MaxLarge || total > MaxLarge {
			return nil, fmt.Errorf("memory files of more than %d bytes in one message", MaxLarge)
		}
		return sys.ReadSealedMemfd(fd, MaxCargo)
	}
	for i := range m.Items {
		it := &m.Items[i]
		it.Socket = -1
		if m.Type == TypeAdopt || it.WithSocket {
			if it.Socket, err = next(); err != nil {
				return err
			}
			if !sys.IsTCP(it.Socket) {
				return fmt.Errorf("session %d: its descriptor is no TCP socket", it.ID)
			}
		}
		if !it.Large {
			continue
		}
		b, err := large()
		if err != nil {
			return fmt.Errorf("session %d: %w", it.ID, err)
		}
		if err := decMode.Unmarshal(b, &it.Cargo); err != nil {
			return fmt.Errorf("session %d: cargo: %w", it.ID, err)
		}
		it.Large = false
	}
	for i := range m.Blobs {
		bl := &m.Blobs[i]
		if !bl.Large {
			continue
		}
		if bl.Data, err = large(); err != nil {
			return fmt.Errorf("group %q: %w", bl.Group, err)
		}
		bl.Large = false
	}
	if m.hasFile() {
		if m.File, err = next(); err != nil {
			return err
		}
	}
	if len(fds) > 0 {
		return fmt.Errorf("%d descriptors too many", len(fds))
	}
	return nil
}

func contains(list []int, fd int) bool {
	for _, x := range list {
		if x == fd {
			return true
		}
	}
	return false
}

// HasSockets says whether a socket came with one of m's items.
func (m *Message) HasSockets() bool {
	for i := range m.Items {
		if m.Items[i].Socket > 0 {
			return true
		}
	}
	return false
}

// CloseSockets closes the sockets of m's items and its memory file, for a receiver that
// will not use them.
func (m *Message) CloseSockets() {
	if m.File > 0 {
		sys.CloseAll([]int{m.File})
		m.File = -1
	}
	for i := range m.Items {
		if m.Items[i].Socket > 0 {
			sys.CloseAll([]int{m.Items[i].Socket})
			m.Items[i].Socket = -1
		}
	}
}

// Load is what items add to a message: bytes in the packet and bytes in memory files.
type Load struct {
	Items, Inline, Large int
}

// LoadOf is the load of one item.
func LoadOf(it *Item) Load {
	l := Load{Items: 1, Inline: 160}
	if n := it.Cargo.Size(); n <= MaxInline {
		l.Inline += n
	} else {
		l.Large = n
	}
	return l
}

// Add returns the sum.
func (l Load) Add(o Load) Load {
	return Load{l.Items + o.Items, l.Inline + o.Inline, l.Large + o.Large}
}

// Fits reports whether one message can carry the load, two descriptors an item, and
// a group's blob besides.
func (l Load) Fits() bool {
	const inline, large = sys.MaxPacket - 8<<10, MaxLarge - MaxCargo - 1<<20
	return l.Items <= MaxItems && l.Inline <= inline && l.Large <= large
}

// BatchItems cuts items into runs that fit one message each.
func BatchItems(items []Item) [][]Item {
	var out [][]Item
	var sum Load
	start := 0
	for i := range items {
		l := LoadOf(&items[i])
		if i > start && !sum.Add(l).Fits() {
			out = append(out, items[start:i])
			start, sum = i, Load{}
		}
		sum = sum.Add(l)
	}
	if start < len(items) {
		out = append(out, items[start:])
	}
	return out
}

// BatchRefs cuts refs into runs of at most MaxItems.
func BatchRefs(refs []Ref) [][]Ref {
	var out [][]Ref
	for len(refs) > MaxItems {
		out = append(out, refs[:MaxItems])
		refs = refs[MaxItems:]
	}
	if len(refs) > 0 {
		out = append(out, refs)
	}
	return out
}
