package bench

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// rawBatch is how many descriptors go in one message, as in the protocol.
const rawBatch = 64

// rawRate passes n descriptors of TCP sockets to another process, which closes them,
// and nothing else: the limit of what any protocol over SCM_RIGHTS can do.
func rawRate(n int) (perSecond float64, err error) {
	ours, theirs, err := sys.PacketPair()
	if err != nil {
		return 0, err
	}
	pc, err := sys.NewPacketConn(ours)
	if err != nil {
		sys.CloseAll([]int{theirs})
		return 0, err
	}
	defer func() { _ = pc.Close() }()
	peer := os.NewFile(uintptr(theirs), "raw")
	sink, err := startRoleWith("raw-sink", peer, strconv.Itoa(n))
	_ = peer.Close()
	if err != nil {
		return 0, err
	}
	defer func() { _ = sink.stop() }()
	var fds []int
	defer func() { sys.CloseAll(fds) }()
	ln, err := listen()
	if err != nil {
		return 0, err
	}
	defer func() { _ = ln.Close() }()
	for range rawBatch {
		c, err := net.Dial("tcp4", ln.Addr().String())
		if err != nil {
			return 0, err
		}
		rc, err := c.(*net.TCPConn).SyscallConn()
		if err == nil {
			err = rc.Control(func(fd uintptr) {
				if d, derr := sys.Dup(int(fd)); derr == nil {
					fds = append(fds, d)
				}
			})
		}
		_ = c.Close()
		if err != nil {
			return 0, err
		}
	}
	if _, err := sink.answer(); err != nil { // it is there
		return 0, err
	}
	msg := make([]byte, rawBatch)
	begin := time.Now()
	for sent := 0; sent < n; sent += rawBatch {
		if err := pc.Send(msg, fds[:min(rawBatch, n-sent)]); err != nil {
			return 0, fmt.Errorf("bare descriptors: %w", err)
		}
	}
	if _, err := sink.answer(); err != nil {
		return 0, err
	}
	return float64(n) / time.Since(begin).Seconds(), nil
}

// rawSink takes descriptors from descriptor 3 and closes them.
func rawSink(args []string, in *bufio.Scanner, out io.Writer) error {
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	pc, err := sys.NewPacketConn(3)
	if err != nil {
		return err
	}
	defer func() { _ = pc.Close() }()
	fmt.Fprintln(out, "ready")
	buf := make([]byte, sys.MaxPacket)
	for n > 0 {
		_, fds, err := pc.Recv(buf)
		if err != nil {
			return err
		}
		sys.CloseAll(fds)
		n -= len(fds)
	}
	fmt.Fprintln(out, "done")
	for in.Scan() {
	}
	return in.Err()
}
