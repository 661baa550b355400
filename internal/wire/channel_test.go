package wire

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"reflect"
	"syscall"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// ends are both ends of a channel; a is bare, to say what Send would not.
type ends struct {
	t *testing.T
	a *sys.PacketConn
	s *Channel // the same socket as a, as a Channel
	b *Channel
}

func newEnds(t *testing.T) *ends {
	t.Helper()
	x, y, err := sys.PacketPair()
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewChannel(x)
	if err != nil {
		t.Fatal(err)
	}
	b, err := NewChannel(y)
	if err != nil {
		t.Fatal(err)
	}
	e := &ends{t: t, a: s.Conn(), s: s, b: b}
	t.Cleanup(func() { _ = s.Close(); _ = b.Close() })
	return e
}

// tcpFD returns a TCP socket's descriptor.
func tcpFD(t *testing.T) int {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // an MPTCP socket is none
	ln, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	fd := -1
	rc, err := ln.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := rc.Control(func(p uintptr) { fd, err = sys.Dup(int(p)) }); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sys.CloseAll([]int{fd}) })
	return fd
}

func memFD(t *testing.T, data []byte) int {
	t.Helper()
	fd, err := sys.SealedMemfd("test", data)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sys.CloseAll([]int{fd}) })
	return fd
}

func countFDs(t *testing.T) int {
	t.Helper()
	l, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(l)
}

func inode(t *testing.T, fd int) uint64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// Sockets and cargoes of every size arrive, each with its own session.
func TestSendRecv(t *testing.T) {
	e := newEnds(t)
	var m Message
	m.Type, m.Last, m.Group = TypeAdopt, true, "g"
	for i, size := range []int{0, 10, MaxInline, MaxInline + 1, 1 << 20} {
		m.Items = append(m.Items, Item{Ref: Ref{ID: uint64(i + 1), Epoch: 5}, Socket: tcpFD(t), Flags: FlagRestored,
			Cargo: Cargo{App: bytes.Repeat([]byte{byte(i)}, size)}})
	}
	m.Blobs = []Blob{{Group: "g", Data: []byte("small")}, {Group: "h", Data: make([]byte, MaxInline+1)}}
	during := countFDs(t)
	if err := e.s.Send(&m); err != nil {
		t.Fatal(err)
	}
	got, err := e.b.Recv()
	if err != nil {
		t.Fatal(err)
	}
	for i := range got.Items {
		if inode(t, got.Items[i].Socket) != inode(t, m.Items[i].Socket) {
			t.Errorf("item %d has another one's socket", i)
		}
		flags, _, errno := syscall.Syscall(syscall.SYS_FCNTL, uintptr(got.Items[i].Socket), syscall.F_GETFD, 0)
		if errno != 0 || flags&syscall.FD_CLOEXEC == 0 {
			t.Errorf("item %d is not close-on-exec (%v)", i, errno)
		}
	}
	got.CloseSockets()
	for i := range m.Items {
		m.Items[i].Socket = -1
		if m.Items[i].Cargo.App != nil && len(m.Items[i].Cargo.App) == 0 {
			m.Items[i].Cargo.App = nil
		}
	}
	if !reflect.DeepEqual(got, &m) {
		t.Error("the message changed on its way")
	}
	if after := countFDs(t); after != during {
		t.Errorf("%d descriptors before, %d after", during, after)
	}
	// The largest.
	big := &Message{Type: TypeParked, Items: []Item{{Ref: Ref{ID: 1, Epoch: 1}, Cargo: Cargo{App: make([]byte, MaxCargo-64)}}}}
	if err := e.s.Send(big); err != nil {
		t.Fatal(err)
	}
	if got, err := e.b.Recv(); err != nil || len(got.Items[0].Cargo.App) != MaxCargo-64 || got.Items[0].Socket != -1 {
		t.Errorf("largest cargo: %v", err)
	}
	big.Items[0].Cargo.App = make([]byte, MaxCargo)
	if err := e.s.Send(big); err == nil {
		t.Error("a cargo over the limit was sent")
	}
	big = &Message{Type: TypeParked, Blobs: []Blob{{Group: "g", Data: make([]byte, MaxCargo+1)}}}
	if err := e.s.Send(big); err == nil {
		t.Error("a blob over the limit was sent")
	}
	if err := e.s.Send(&Message{Type: TypeAdopt, Items: []Item{{Ref: Ref{ID: 1}, Socket: 1 << 20, Cargo: Cargo{App: make([]byte, MaxInline+1)}}}}); err == nil {
		t.Error("a descriptor that is none was sent")
	}
	if after := countFDs(t); after != during {
		t.Errorf("%d descriptors before, %d after", during, after)
	}
}

// Whatever comes with a message that is refused is closed.
func TestRecvClosesEverything(t *testing.T) {
	enc := func(m *Message) []byte {
		b, err := Encode(m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	one := Item{Ref: Ref{ID: 1, Epoch: 1}}
	large := Item{Ref: Ref{ID: 1, Epoch: 1}, Large: true}
	adopt := func(items ...Item) []byte { return enc(&Message{Type: TypeAdopt, Items: items}) }
	tcp := func() int { return tcpFD(t) }
	unsealed := func() int {
		fd, err := sys.SharedMemfd("test", 100)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { sys.CloseAll([]int{fd}) })
		return fd
	}
	cargo := func(c Cargo) int {
		b, err := encMode.Marshal(&c)
		if err != nil {
			t.Fatal(err)
		}
		return memFD(t, b)
	}
	udp := func() int {
		fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { sys.CloseAll([]int{fd}) })
		return fd
	}
	for name, tc := range map[string]struct {
		b   []byte
		fds []int
	}{
		"garbage":                 {[]byte("garbage"), []int{tcp(), tcp()}},
		"no descriptor":           {adopt(one), nil},
		"too few":                 {adopt(one, Item{Ref: Ref{ID: 2}}), []int{tcp()}},
		"too many":                {adopt(one), []int{tcp(), tcp()}},
		"MARKS without memory":    {enc(&Message{Type: TypeMarks}), nil},
		"MARKS with too much":     {enc(&Message{Type: TypeMarks}), []int{memFD(t, nil), memFD(t, nil)}},
		"where none belongs":      {enc(&Message{Type: TypePing}), []int{tcp()}},
		"no socket":               {adopt(one), []int{memFD(t, []byte("x"))}},
		"a UDP socket":            {adopt(one), []int{udp()}},
		"second is no socket":     {adopt(one, Item{Ref: Ref{ID: 2}}), []int{tcp(), memFD(t, nil)}},
		"no memory file":          {adopt(large), []int{tcp()}},
		"a socket in its place":   {adopt(large), []int{tcp(), tcp()}},
		"not sealed":              {adopt(large), []int{tcp(), unsealed()}},
		"garbage in it":           {adopt(large), []int{tcp(), memFD(t, []byte("garbage"))}},
		"too large":               {adopt(large), []int{tcp(), memFD(t, make([]byte, MaxCargo+1))}},
		"one too many after it":   {adopt(large), []int{tcp(), cargo(Cargo{App: []byte("x")}), tcp()}},
		"blob not sealed":         {enc(&Message{Type: TypeParked, Blobs: []Blob{{Group: "g", Large: true}}}), []int{unsealed()}},
		"blob without its memory": {enc(&Message{Type: TypeParked, Blobs: []Blob{{Group: "g", Large: true}}}), nil},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnds(t)
			before := countFDs(t)
			if err := e.a.Send(tc.b, tc.fds); err != nil {
				t.Fatal(err)
			}
			m, err := e.b.Recv()
			if !errors.Is(err, ErrProtocol) || m != nil {
				t.Errorf("message %+v, error %v; want ErrProtocol", m, err)
			}
			if after := countFDs(t); after != before {
				t.Errorf("%d descriptors before, %d after", before, after)
			}
		})
	}
}

// The memory that one message makes its receiver take is bounded, and what is too
// much in all is cut into several messages.
func TestLargeInAll(t *testing.T) {
	e := newEnds(t)
	before := countFDs(t)
	var items []Item
	for i := range 5 {
		items = append(items, Item{Ref: Ref{ID: uint64(i + 1), Epoch: 1}, Cargo: Cargo{App: make([]byte, MaxCargo-64)}})
	}
	if err := e.s.Send(&Message{Type: TypeParked, Items: items}); err == nil {
		t.Error("more than the limit was sent")
	}
	got := 0
	for _, part := range BatchItems(items) {
		// The last message of a group has the group's state too.
		blobs := []Blob{{Group: "g", Data: make([]byte, MaxCargo)}}
		if err := e.s.Send(&Message{Type: TypeParked, Group: "g", Items: part, Blobs: blobs}); err != nil {
			t.Fatal(err)
		}
		m, err := e.b.Recv()
		if err != nil {
			t.Fatal(err)
		}
		got += len(m.Items)
	}
	if got != len(items) {
		t.Errorf("%d of %d items came", got, len(items))
	}
	for i := range items {
		items[i].Cargo, items[i].Large = Cargo{}, true
	}
	b, err := Encode(&Message{Type: TypeParked, Items: items})
	if err != nil {
		t.Fatal(err)
	}
	cargo, err := encMode.Marshal(&Cargo{App: make([]byte, MaxCargo-64)})
	if err != nil {
		t.Fatal(err)
	}
	fd := memFD(t, cargo)
	if err := e.a.Send(b, []int{fd, fd, fd, fd, fd}); err != nil {
		t.Fatal(err)
	}
	if _, err := e.b.Recv(); !errors.Is(err, ErrProtocol) {
		t.Errorf("error %v, want ErrProtocol", err)
	}
	if after := countFDs(t); after != before+1 { // fd
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func TestRecvEnds(t *testing.T) {
	e := newEnds(t)
	if err := e.a.Send([]byte{0xa1, 0, 3}, nil); err != nil {
		t.Fatal(err)
	}
	_ = e.s.Close()
	if m, err := e.b.Recv(); err != nil || m.Type != TypeReady { // what was sent before is still there
		t.Fatalf("%+v, %v", m, err)
	}
	if _, err := e.b.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("error %v, want EOF", err)
	}
	_ = e.b.Close()
	if _, err := e.b.Recv(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("error %v, want ErrClosed", err)
	}
}

// A receiver at its NOFILE limit learns what it missed, and the channel goes on.
func TestDescriptorsLost(t *testing.T) {
	e := newEnds(t)
	fds := []int{tcpFD(t), tcpFD(t)}
	var lim syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &lim); err != nil {
		t.Fatal(err)
	}
	before := countFDs(t)
	m := &Message{Type: TypeAdopt, Items: []Item{{Ref: Ref{ID: 1, Epoch: 2}, Socket: fds[0]}, {Ref: Ref{ID: 3, Epoch: 4}, Socket: fds[1]}}}
	if err := e.s.Send(m); err != nil {
		t.Fatal(err)
	}
	free, err := sys.Dup(0) // the next descriptor: room for one
	if err != nil {
		t.Fatal(err)
	}
	_ = sys.Close(free)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: uint64(free) + 1, Max: lim.Max}); err != nil {
		t.Fatal(err)
	}
	got, err := e.b.Recv()
	_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &lim)
	var lost *DescriptorsLostError
	if !errors.As(err, &lost) || !errors.Is(err, sys.ErrControlTruncated) || got != nil {
		t.Fatalf("%+v, error %v; want DescriptorsLostError", got, err)
	}
	if it := lost.Message.Items; len(it) != 2 || it[0].Ref != m.Items[0].Ref || it[1].Ref != m.Items[1].Ref {
		t.Errorf("it was %+v", it)
	}
	if after := countFDs(t); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
	if err := e.s.Send(&Message{Type: TypePing, Nonce: 1}); err != nil {
		t.Fatal(err)
	}
	if m, err := e.b.Recv(); err != nil || m.Type != TypePing {
		t.Errorf("afterwards: %+v, %v", m, err)
	}
}
