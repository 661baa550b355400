package ktls

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// A session can go through a second process: the test binary itself, which with
// this variable imports what comes over descriptor 3, touches nothing, and gives
// it back.
const passageEnv = "KTLSVISOR_TEST_KTLS_PASSAGE"

func init() { secondProcess(passageEnv, passageChild) }

func passageChild() error {
	ch, err := sys.NewPacketConn(3)
	if err != nil {
		return err
	}
	for {
		sock, facts, record, err := receiveMoved(ch)
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		c, err := Import(sock, facts, record)
		if err != nil {
			return err
		}
		back, st, err := c.Detach()
		if err != nil {
			return err
		}
		err = sendMoved(ch, back, st)
		_ = back.Close()
		if err != nil {
			return err
		}
	}
}

// sendMoved sends a detached session: its socket, facts and record, each as a
// descriptor, since a record can be larger than a message.
func sendMoved(ch *sys.PacketConn, sock Socket, st *State) error {
	defer st.Wipe()
	facts, err := st.MarshalFacts()
	if err != nil {
		return err
	}
	record, err := st.MarshalRecord()
	if err != nil {
		return err
	}
	f, err := sys.SealedMemfd("facts", facts)
	if err != nil {
		return err
	}
	defer sys.CloseAll([]int{f})
	r, err := sys.SealedMemfd("record", record)
	if err != nil {
		return err
	}
	defer sys.CloseAll([]int{r})
	rc, err := sock.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	cerr := rc.Control(func(fd uintptr) { serr = ch.Send([]byte("session"), []int{int(fd), f, r}) })
	return errors.Join(serr, cerr)
}

func receiveMoved(ch *sys.PacketConn) (sock *os.File, facts, record []byte, err error) {
	_, fds, err := ch.Recv(make([]byte, 100))
	if err != nil {
		return nil, nil, nil, err
	}
	if len(fds) != 3 {
		sys.CloseAll(fds)
		return nil, nil, nil, fmt.Errorf("%d descriptors instead of 3", len(fds))
	}
	defer sys.CloseAll(fds[1:])
	sock = os.NewFile(uintptr(fds[0]), "session")
	if facts, err = sys.ReadSealedMemfd(fds[1], maxFacts); err == nil {
		record, err = sys.ReadSealedMemfd(fds[2], maxRecord)
	}
	if err != nil {
		_ = sock.Close()
	}
	return sock, facts, record, err
}

// passage is the second process, started on first use.
type passage struct {
	t    testing.TB
	once sync.Once
	ch   *sys.PacketConn
}

// newPassage ends the process with t, which then fails if the process did.
func newPassage(t testing.TB) *passage { return &passage{t: t} }

func (p *passage) start() {
	a, b, err := sys.PacketPair()
	if err != nil {
		p.t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(b), "channel")
	if p.ch, err = sys.NewPacketConn(a); err != nil {
		p.t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), passageEnv+"=1")
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	_ = theirs.Close()
	p.t.Cleanup(func() {
		_ = p.ch.Close()
		if err := cmd.Wait(); err != nil {
			p.t.Errorf("the second process: %v", err)
		}
	})
}

// pass takes a detached session through the second process.
func (p *passage) pass(t testing.TB, sock Socket, st *State) (moved *os.File, facts, record []byte) {
	t.Helper()
	p.once.Do(p.start)
	_ = p.ch.SetReadDeadline(time.Now().Add(testWait))
	if err := sendMoved(p.ch, sock, st); err != nil {
		t.Fatalf("to the second process: %v", err)
	}
	_ = sock.Close()
	moved, facts, record, err := receiveMoved(p.ch)
	if err != nil {
		t.Fatalf("from the second process: %v", err)
	}
	return moved, facts, record
}
