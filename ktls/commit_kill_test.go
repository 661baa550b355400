package ktls

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

const commitChildEnv = "KTLSVISOR_TEST_KTLS_COMMITS"

func init() { secondProcess(commitChildEnv, commitChild) }

// commitJob is what the second process goes on from.
type commitJob struct {
	Facts, Record, State []byte
	Key                  JournalKey
	Seed                 uint64
}

const commitArena = 64 << 20

// echoByte is byte i of the stream that the peer sends; no short piece of it occurs
// twice soon.
func echoByte(i uint64) byte {
	x := (i/8 + 1) * 0x9E3779B97F4A7C15
	return byte(x >> (8 * (i % 8)))
}

// commitChild is a committing echo over descriptor 3 with an arena in 4, until it is
// killed. Its state is the number of bytes that it has answered. It checks that what it
// reads begins just there.
func commitChild() error {
	var job commitJob
	if err := gob.NewDecoder(os.Stdin).Decode(&job); err != nil {
		return err
	}
	mem, err := sys.MapShared(4, commitArena)
	if err != nil {
		return err
	}
	if err := sys.SetNonblock(3); err != nil {
		return err
	}
	c, err := Import(os.NewFile(3, "session"), job.Facts, job.Record)
	if err != nil {
		return err
	}
	a, err := OpenArena(mem)
	if err != nil {
		return err
	}
	free, err := bindCommits(a, c, job.Key, job.State)
	if err != nil {
		return err
	}
	if _, err := os.Stdout.Write([]byte("!")); err != nil {
		return err
	}
	return committingEcho(a, c, free, job)
}

func bindCommits(a *Arena, c *Conn, key JournalKey, state []byte) (free func(), err error) {
	k, err := a.NewCommits(c, key, state, false)
	if err != nil || c.Layer() != LayerSoftware {
		return k.Free, err
	}
	p, err := a.Place(key)
	if err != nil {
		return nil, err
	}
	return func() { p.Free(); k.Free() }, c.Journal(p)
}

func committingEcho(a *Arena, c *Conn, free func(), job commitJob) error {
	r := rand.New(rand.NewPCG(job.Seed, 1))
	buf := make([]byte, 100_000)
	done := uint64(0)
	if job.State != nil {
		done = binary.BigEndian.Uint64(job.State)
	}
	var pending []byte
	for {
		n, err := c.Read(buf[:1+r.IntN(len(buf))])
		if errors.Is(err, io.EOF) {
			if _, err := c.Commit(len(pending), nil, pending, true); err != nil {
				return err
			}
			return c.CloseWrite()
		}
		if err != nil {
			return err
		}
		for i, b := range buf[:n] {
			if at := done + uint64(len(pending)+i); b != echoByte(at) {
				return fmt.Errorf("byte %d of the input is wrong, after %d answered ones", at, done)
			}
		}
		pending = append(pending, buf[:n]...)
		if r.IntN(3) == 0 && len(pending) < 300_000 {
			continue
		}
		take := len(pending)
		if r.IntN(2) == 0 && len(pending) < 300_000 && c.Buffered() > 0 {
			take = r.IntN(len(pending) + 1)
		}
		state := binary.BigEndian.AppendUint64(nil, done+uint64(take))
		if ok, err := c.Commit(take, state, pending[:take], true); err != nil || !ok {
			return fmt.Errorf("commit: %v, %w", ok, err)
		}
		done += uint64(take)
		pending = append(pending[:0], pending[take:]...)
		if r.IntN(20) == 0 {
			// A move to the same process: what is uncommitted is read again.
			sock, st, err := c.Detach()
			if err != nil {
				return err
			}
			facts, err := st.MarshalFacts()
			if err != nil {
				return err
			}
			record, err := st.MarshalRecord()
			if err != nil {
				return err
			}
			if c, err = Import(sock, facts, record); err != nil {
				return err
			}
			old := free
			if free, err = bindCommits(a, c, job.Key, state); err != nil {
				return err
			}
			old()
			pending = pending[:0]
		}
	}
}

// A committing echo is killed with -9 again and again while its peer sends and reads
// without pause: the peer gets every byte once, and the echo goes on from its last state.
func TestCommitsOverKills(t *testing.T) {
	bothLayers(t, func(t *testing.T, layer Layer) {
		for _, version := range []uint16{tls.VersionTLS13, tls.VersionTLS12} {
			t.Run(tls.VersionName(version), func(t *testing.T) { commitsOverKills(t, layer, version) })
		}
	})
}

func commitsOverKills(t *testing.T, layer Layer, version uint16) {
	kills, mode, slow := 12, ModeSoftware, 1
	if layer == LayerKernel {
		mode = ModeKernel
	}
	// More of them: KTLSVISOR_TEST_KILLS=1000.
	if n := os.Getenv("KTLSVISOR_TEST_KILLS"); n != "" {
		if _, err := fmt.Sscan(n, &kills); err != nil {
			t.Fatal(err)
		}
	}
	if guest.InGuest() {
		slow = 5
	}
	client := testClientTLS(t)
	client.MaxVersion = version
	conn, peer := connect(t, &Config{TLS: testServerTLS(t), Mode: mode}, client)
	_ = peer.SetDeadline(time.Time{})
	sock, st, err := conn.Detach()
	if err != nil {
		t.Fatal(err)
	}
	job := commitJob{}
	if job.Facts, err = st.MarshalFacts(); err != nil {
		t.Fatal(err)
	}
	if job.Record, err = st.MarshalRecord(); err != nil {
		t.Fatal(err)
	}
	base := job.Record
	f, err := sock.(interface{ File() (*os.File, error) }).File()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	_ = sock.Close()

	var sent, got atomic.Uint64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		p := make([]byte, 30_000)
		for {
			select {
			case <-stop:
				_ = peer.CloseWrite()
				return
			default:
			}
			n := 1 + rand.IntN(len(p))
			if rand.IntN(2) == 0 {
				n = 1 + rand.IntN(200)
			}
			for i := range n {
				p[i] = echoByte(sent.Load() + uint64(i))
			}
			if _, err := peer.Write(p[:n]); err != nil {
				if !errors.Is(err, net.ErrClosed) {
					t.Errorf("peer: write: %v", err)
				}
				return
			}
			sent.Add(uint64(n))
		}
	})
	wg.Go(func() {
		p := make([]byte, 20_000)
		for {
			n, err := peer.Read(p)
			for i := range n {
				if at := got.Load() + uint64(i); p[i] != echoByte(at) {
					t.Errorf("peer: byte %d is wrong", at)
					_ = peer.NetConn().Close()
					return
				}
			}
			got.Add(uint64(n))
			if errors.Is(err, io.EOF) {
				return
			}
			if err != nil && !errors.Is(err, net.ErrClosed) {
				t.Errorf("peer: read after %d bytes: %v", got.Load(), err)
			}
			if err != nil {
				return
			}
		}
	})

	defer func() { // when it fails
		_ = peer.NetConn().Close()
		wg.Wait()
	}()
	again, unsent := 0, 0
	for i := range kills {
		job.Key = JournalKey{7, uint64(i + 1)}
		job.Seed = rand.Uint64()
		mem, cmd, ready := startCommitting(t, &job, f)
		if _, err := ready.Read(make([]byte, 1)); err != nil {
			t.Fatalf("kill %d: the second process did not begin: %v, %v", i, err, cmd.Wait())
		}
		if i < kills-1 {
			time.Sleep(time.Duration(rand.IntN(12_000*slow)) * time.Microsecond)
			_ = cmd.Process.Signal(syscall.SIGKILL)
			err = cmd.Wait()
			if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || !ws.Signaled() {
				t.Fatalf("kill %d: the second process ended by itself: %v", i, err)
			}
			commits, err := OpenCommits(mem)
			if err != nil {
				t.Fatal(err)
			}
			var journal *Recovered
			record := base
			if layer == LayerSoftware {
				js, err := OpenJournals(mem)
				if err != nil {
					t.Fatal(err)
				}
				if journal, err = js.Recover(job.Key, job.Facts, int(f.Fd())); err != nil {
					t.Fatalf("kill %d: %v", i, err)
				}
				record = journal.Record
			}
			k, err := commits.Amend(job.Key, record, journal)
			if err != nil || k == nil || !k.Exact {
				t.Fatalf("kill %d: %+v, %v", i, k, err)
			}
			job.Record = k.Record
			again, unsent = again+k.Again, unsent+k.Unsent
			job.State = k.State
			_ = sys.Unmap(mem)
			continue
		}
		close(stop)
		if err := cmd.Wait(); err != nil {
			t.Fatal(err)
		}
		_ = sys.Unmap(mem)
	}
	wg.Wait()
	if sent.Load() != got.Load() || got.Load() == 0 {
		t.Errorf("%d bytes sent, %d came back", sent.Load(), got.Load())
	}
	t.Logf("%d kills, %d bytes each way; %d read again, %d of committed output sent by the next one", kills-1, got.Load(), again, unsent)
}

func startCommitting(t *testing.T, job *commitJob, sock *os.File) (mem []byte, cmd *exec.Cmd, ready io.Reader) {
	t.Helper()
	fd, mem := sharedArena(t, commitArena, 16)
	var in bytes.Buffer
	if err := gob.NewEncoder(&in).Encode(job); err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "arena")
	defer func() { _ = file.Close() }()
	cmd = exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), commitChildEnv+"=1")
	cmd.ExtraFiles = []*os.File{sock, file}
	cmd.Stdin, cmd.Stderr = &in, os.Stderr
	ready, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	return mem, cmd, ready
}
