package ktls

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

// The test binary is its own second process: with this variable set it owns
// sessions that come over descriptor 3 instead of running tests.
const childEnv = "KTLSVISOR_TEST_KTLS_OWNER"

func init() { secondProcess(childEnv, childOwner) }

// secondProcess ends the process after run, if it was started with env set.
func secondProcess(env string, run func() error) {
	if os.Getenv(env) == "" {
		return
	}
	if err := run(); err != nil {
		fmt.Fprintf(os.Stderr, "second process, %s: %v\n", env, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// childOwner takes a session, echoes as long as it was told to, gives it back, and
// so on until its channel ends.
func childOwner() error {
	ch, err := sys.NewPacketConn(3)
	if err != nil {
		return err
	}
	for {
		s, hold, err := receiveSession(ch)
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		c, err := Import(s.sock, s.facts, s.record)
		if err != nil {
			return err
		}
		if err := ch.Send([]byte("adopted"), nil); err != nil {
			return err
		}
		if err := echoFor(c, hold); err != nil {
			return err
		}
		if err := sendSession(ch, c, 0); err != nil {
			return err
		}
	}
}

// passed is a session on its way between processes.
type passed struct {
	sock          *os.File
	facts, record []byte
}

func sendSession(ch *sys.PacketConn, c *Conn, hold time.Duration) error {
	sock, st, err := c.Detach()
	if err != nil {
		return err
	}
	defer func() { _ = sock.Close() }()
	defer st.Wipe()
	facts, err := st.MarshalFacts()
	if err != nil {
		return err
	}
	record, err := st.MarshalRecord()
	if err != nil {
		return err
	}
	if _, err := st.MarshalSecrets(); os.Getenv(childEnv) != "" && !errors.Is(err, ErrNoSecrets) {
		return fmt.Errorf("a process that was given a kernel session can name its secrets: %v", err)
	}
	return sendPassed(ch, sock, facts, record, hold)
}

func sendPassed(ch *sys.PacketConn, sock Socket, facts, record []byte, hold time.Duration) error {
	rc, err := sock.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := rc.Control(func(fd uintptr) {
		serr = ch.Send(append([]byte(hold.String()+"\n"), facts...), []int{int(fd)})
	}); err != nil {
		return err
	}
	if serr != nil {
		return serr
	}
	return ch.Send(record, nil)
}

func receiveSession(ch *sys.PacketConn) (*passed, time.Duration, error) {
	buf := make([]byte, sys.MaxPacket)
	n, fds, err := ch.Recv(buf)
	if err != nil {
		return nil, 0, err
	}
	if len(fds) != 1 {
		sys.CloseAll(fds)
		return nil, 0, fmt.Errorf("%d descriptors", len(fds))
	}
	word, facts, _ := bytes.Cut(bytes.Clone(buf[:n]), []byte("\n"))
	hold, err := time.ParseDuration(string(word))
	if err != nil {
		sys.CloseAll(fds)
		return nil, 0, err
	}
	s := &passed{sock: os.NewFile(uintptr(fds[0]), "session"), facts: facts}
	if n, _, err = ch.Recv(buf); err != nil {
		return nil, 0, errors.Join(err, s.sock.Close())
	}
	s.record = bytes.Clone(buf[:n])
	return s, hold, nil
}

// echoFor echoes until the time is up, wherever in a record that is. What it read
// and could not write any more travels as queued output.
func echoFor(c *Conn, hold time.Duration) error {
	buf := make([]byte, 10_000)
	if err := c.SetDeadline(time.Now().Add(hold)); err != nil {
		return err
	}
	for {
		n, err := c.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		} else if err != nil {
			return err
		}
		k, err := c.Write(buf[:n])
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return c.QueueWrite(buf[k:n])
		} else if err != nil {
			return err
		}
	}
}

// child starts the second process.
func child(t *testing.T) (*sys.PacketConn, *exec.Cmd) {
	t.Helper()
	a, b, err := sys.PacketPair()
	if err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(b), "channel")
	ch, err := sys.NewPacketConn(a)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ch.Close() })
	_ = ch.SetReadDeadline(time.Now().Add(3 * testWait))
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"=1")
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = theirs.Close()
	return ch, cmd
}

func wantAdopted(t *testing.T, ch *sys.PacketConn) {
	t.Helper()
	buf := make([]byte, 100)
	n, fds, err := ch.Recv(buf)
	sys.CloseAll(fds)
	if err != nil || string(buf[:n]) != "adopted" {
		t.Fatalf("child said %q, %v", buf[:n], err)
	}
}

// A session goes back and forth between two processes while a stock client sends
// without pause: every byte comes back once and in order, and the process that was
// only given the socket never has the session's secrets.
func TestKernelSessionBetweenProcesses(t *testing.T) {
	guest.NeedKernelTLS(t)
	for _, version := range []uint16{tls.VersionTLS13, tls.VersionTLS12} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			client := testClientTLS(t)
			client.MaxVersion = version
			conn, peer := connect(t, &Config{TLS: testServerTLS(t), Mode: ModeKernel}, client)
			ch, cmd := child(t)

			stop := make(chan struct{})
			var sent, echoed int
			var wg sync.WaitGroup
			wg.Go(func() {
				for n := 1; ; n = (n*7 + 13) % 20_011 {
					select {
					case <-stop:
						_ = peer.CloseWrite()
						return
					default:
					}
					msg := make([]byte, n+1)
					for i := range msg {
						msg[i] = byte((sent + i) % 251)
					}
					if _, err := peer.Write(msg); err != nil {
						t.Errorf("client: write: %v", err)
						return
					}
					sent += len(msg)
				}
			})
			wg.Go(func() {
				buf := make([]byte, 8192)
				for {
					n, err := peer.Read(buf)
					for i := range n {
						if buf[i] != byte((echoed+i)%251) {
							t.Errorf("client: wrong byte at %d", echoed+i)
							return
						}
					}
					echoed += n
					if err != nil {
						if !errors.Is(err, io.EOF) {
							t.Errorf("client: read: %v", err)
						}
						return
					}
				}
			})

			const moves = 12
			for i := range moves {
				if err := echoFor(conn, time.Duration(i)*3*time.Millisecond); err != nil {
					t.Fatalf("move %d: %v", i, err)
				}
				if err := sendSession(ch, conn, time.Duration(i)*5*time.Millisecond); err != nil {
					t.Fatalf("move %d: %v", i, err)
				}
				wantAdopted(t, ch)
				s, _, err := receiveSession(ch)
				if err != nil {
					t.Fatalf("move %d: %v", i, err)
				}
				if conn, err = Import(s.sock, s.facts, s.record); err != nil {
					t.Fatalf("move %d: %v", i, err)
				}
				if conn.Layer() != LayerKernel {
					t.Errorf("move %d: layer %s", i, conn.Layer())
				}
			}
			close(stop)
			_ = conn.SetDeadline(time.Now().Add(testWait))
			if _, err := io.Copy(struct{ io.Writer }{conn}, struct{ io.Reader }{conn}); err != nil {
				t.Errorf("the rest: %v", err)
			}
			if err := conn.Close(); err != nil {
				t.Error(err)
			}
			wg.Wait()
			if sent != echoed || sent < moves*1000 {
				t.Errorf("%d bytes sent, %d came back", sent, echoed)
			}
			_ = ch.Close()
			if err := cmd.Wait(); err != nil {
				t.Errorf("child: %v", err)
			}
		})
	}
}

// The owner is killed with -9 and another process goes on from the retained
// socket and the state of when the owner got it, although records were read and
// written since.
func TestKernelSessionOutlivesItsOwner(t *testing.T) {
	guest.NeedKernelTLS(t)
	for _, version := range []uint16{tls.VersionTLS13, tls.VersionTLS12} {
		client := testClientTLS(t)
		client.MaxVersion = version
		conn, peer := connect(t, &Config{TLS: testServerTLS(t), Mode: ModeKernel}, client)
		for i := range 3 {
			sock, st, err := conn.Detach()
			if err != nil {
				t.Fatal(err)
			}
			facts, err := st.MarshalFacts()
			if err != nil {
				t.Fatal(err)
			}
			record, err := st.MarshalRecord()
			if err != nil {
				t.Fatal(err)
			}
			ch, cmd := child(t)
			if err := sendPassed(ch, sock, facts, record, time.Hour); err != nil {
				t.Fatal(err)
			}
			wantAdopted(t, ch)
			for j := range 20 {
				want := "message " + strconv.Itoa(100*i+j)
				if _, err := peer.Write([]byte(want)); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, len(want))
				if _, err := io.ReadFull(peer, got); err != nil || string(got) != want {
					t.Fatalf("%q came back as %q, %v", want, got, err)
				}
			}
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			_ = ch.Close()
			if conn, err = Import(sock, facts, record); err != nil {
				t.Fatalf("after kill -9: %v", err)
			}
			_ = conn.SetDeadline(time.Now().Add(testWait))
			exchange(t, conn, peer)
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		if n, err := peer.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("the client got %d bytes, %v; expected close_notify", n, err)
		}
	}
}

// Go's listeners use multipath TCP unless told otherwise. A client without it is
// served by the kernel all the same; one with it goes to software, with a reason
// that names the remedy.
func TestKernelAndMultipathTCP(t *testing.T) {
	guest.NeedKernelTLS(t)
	for _, multipath := range []bool{false, true} {
		c, s := tcpPairOf(t, true, multipath)
		if mp, err := s.MultipathTCP(); err != nil || mp != multipath {
			t.Fatalf("multipath %v: the connection has it %v, %v", multipath, mp, err)
		}
		err := attachKernel(s)
		if !multipath && err != nil {
			t.Errorf("plain client of a multipath listener: %v", err)
		}
		if multipath && (!errors.Is(err, ErrNoKernelTLS) || !bytes.Contains([]byte(err.Error()), []byte("SetMultipathTCP(false)"))) {
			t.Errorf("multipath client: %v", err)
		}
		if multipath {
			continue
		}
		tx, rx := newRawHalf(t, v13, gcm, 0), newRawHalf(t, v13, gcm, 0)
		l, err := newKernelLayer(s, params{version: v13, suite: gcm}, tx.direction(), rx.direction())
		if err != nil {
			t.Fatal(err)
		}
		peer := &rawPeer{t: t, c: c, version: v13, out: rx, in: tx}
		peer.send(typeData, []byte("question"))
		if got := string(readAll(t, l, 8, 100)); got != "question" {
			t.Errorf("got %q", got)
		}
		if _, err := l.write([]byte("answer")); err != nil {
			t.Fatal(err)
		}
		peer.want(typeData, "answer")
	}
}
