package ktls

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// Owners that are killed with -9 at random moments under traffic. The next one, another
// process, goes on from the journal; crypto/tls at the other end checks every record,
// and the test every byte.

const killedEnv = "KTLSVISOR_TEST_KTLS_KILLED"

func init() { secondProcess(killedEnv, killedOwner) }

const (
	killArena = 8 << 20
	killSlots = 64
	noteSize  = 64 // of shared memory a session, in which an owner notes what it has read
	maxRead   = 40_000
)

// frame makes a message of n bytes that says who sent it and in which turn.
func frame(b []byte, owner, turn uint32, n int) []byte {
	b = b[:n]
	for i := range b {
		b[i] = byte(int(turn) + i)
	}
	binary.BigEndian.PutUint32(b, owner)
	binary.BigEndian.PutUint32(b[4:], turn)
	binary.BigEndian.PutUint32(b[8:], uint32(n))
	return b
}

const frameMin = 12

// killedOwner takes an arena and sessions and works with them until it is killed.
func killedOwner() error {
	owner, err := strconv.Atoi(os.Getenv(killedEnv))
	if err != nil {
		return err
	}
	ch, err := sys.NewPacketConn(3)
	if err != nil {
		return err
	}
	_, fds, err := ch.Recv(make([]byte, 10))
	if err != nil || len(fds) != 2 {
		return fmt.Errorf("%d descriptors, %w", len(fds), err)
	}
	mem, err := sys.MapShared(fds[0], killArena)
	if err != nil {
		return err
	}
	notes, err := sys.MapShared(fds[1], killSlots*noteSize)
	if err != nil {
		return err
	}
	a, err := OpenArena(mem)
	if err != nil {
		return err
	}
	failed := make(chan error)
	n := 0
	for ; ; n++ {
		sock, facts, record, err := receiveMoved(ch)
		if err != nil {
			return fmt.Errorf("session %d: %w", n, err)
		}
		if len(record) == 1 { // the last was the last
			break
		}
		c, err := Import(sock, facts, record)
		if err != nil {
			return fmt.Errorf("session %d: %w", n, err)
		}
		key := JournalKey{uint64(n + 1), uint64(owner)}
		if retains(n) {
			if _, err := a.NewCommits(c, key, nil, false); err != nil {
				return err
			}
		}
		p, err := a.Place(key)
		if err == nil {
			err = c.Journal(p)
		}
		if err != nil {
			return err
		}
		note := notes[n*noteSize:][:noteSize]
		i := n
		go func() { failed <- killedReader(c, note, i) }()
		go func() { failed <- killedWriter(c, p, uint32(owner)) }()
	}
	if err := ch.Send([]byte("ready"), nil); err != nil {
		return err
	}
	return <-failed
}

// killedReader checks what the peer sends, and notes how far it has come.
func killedReader(c *Conn, note []byte, n int) error {
	retain := retains(n)
	in := streamAt(note, n)
	buf := make([]byte, maxRead)
	for {
		k, err := c.Read(buf[:1+rand.IntN(maxRead)])
		if err != nil {
			return fmt.Errorf("session %d: read: %w", n, err)
		}
		if err := in.add(buf[:k]); err != nil {
			return fmt.Errorf("session %d: %w", n, err)
		}
		if retain {
			if !in.found || rand.IntN(3) > 0 {
				continue
			}
			k = rand.IntN(c.Uncommitted() + 1)
			done := sys.LoadShared(note[16:]) + uint64(k)
			sys.StoreShared(note[8:], in.first+done)
			if done, err := c.Commit(k, nil, nil, true); err != nil || !done {
				return fmt.Errorf("session %d: commit: %v, %w", n, done, err)
			}
			sys.StoreShared(note[16:], done)
			sys.StoreShared(note, in.first+done)
			continue
		}
		if in.found {
			sys.StoreShared(note, in.at)
		}
	}
}

// killedWriter sends frames, and changes keys.
func killedWriter(c *Conn, p *Place, owner uint32) error {
	buf := make([]byte, 20*maxPlaintext)
	for turn := uint32(0); ; {
		if !p.Live() {
			return errors.New("the journal ended")
		}
		var err error
		switch k := rand.IntN(100); {
		case k < 40:
			_, err = c.Write(frame(buf, owner, turn, frameMin+rand.IntN(300)))
			turn++
		case k < 70:
			_, err = c.Write(frame(buf, owner, turn, frameMin+rand.IntN(maxPlaintext-frameMin)))
			turn++
		case k < 80: // several records in one write, each a frame of its own
			records := 2 + rand.IntN(18)
			for i := range records {
				frame(buf[i*maxPlaintext:], owner, turn, maxPlaintext)
				turn++
			}
			_, err = c.Write(buf[:records*maxPlaintext])
		case k < 97:
			err = c.QueueWrite(frame(buf, owner, turn, frameMin+rand.IntN(3*maxPlaintext)))
			turn++
			if err == nil && rand.IntN(3) == 0 {
				err = c.Flush()
			}
		default:
			if c.p.version == tls.VersionTLS13 {
				err = c.KeyUpdate(rand.IntN(2) == 0)
			}
		}
		if err != nil {
			return fmt.Errorf("write: %w", err)
		}
	}
}

// countingStream is what peers send: 8-byte words that count up. It is read from a
// place that is one of two at first.
type countingStream struct {
	at     uint64 // of the next byte
	intent uint64 // or else this one's
	found  bool
	first  uint64
	head   []byte
}

func streamByte(at uint64) byte {
	var w [8]byte
	binary.BigEndian.PutUint64(w[:], (at/8)*0x9e3779b97f4a7c15)
	return w[at%8]
}

func (s *countingStream) matches(p []byte, at uint64) bool {
	for i, b := range p {
		if b != streamByte(at+uint64(i)) {
			return false
		}
	}
	return true
}

func (s *countingStream) add(p []byte) error {
	if !s.found {
		if s.head = append(s.head, p...); len(s.head) < 32 {
			return nil
		}
		p = s.head
		if s.matches(p[:32], s.intent) {
			s.at = s.intent
		} else if !s.matches(p[:32], s.at) {
			return fmt.Errorf("bytes that should not follow byte %d", s.at)
		}
		s.found, s.first = true, s.at
	}
	if !s.matches(p, s.at) {
		return fmt.Errorf("other bytes than those sent, after byte %d", s.at)
	}
	s.at += uint64(len(p))
	return nil
}

// streamAt is the stream of session n where the next owner reads on: behind what it
// noted as committed, or was about to; without Commits, behind what the journals say that
// owners were given.
func streamAt(note []byte, n int) *countingStream {
	if retains(n) {
		return &countingStream{at: sys.LoadShared(note), intent: sys.LoadShared(note[8:])}
	}
	given := sys.LoadShared(note[24:])
	return &countingStream{at: given, intent: given}
}

// retains says which sessions commit what they have read, and read again what they have
// not.
func retains(n int) bool { return n%3 == 2 }

// killedPeer is the client of one session.
type killedPeer struct {
	c      *tls.Conn
	stop   chan struct{} // closed: send no more
	ended  chan struct{} // closed: nothing more is received
	slow   bool
	sent   uint64
	frames int
	errs   chan error // of both directions; nil at their end
	sock   *os.File   // duplicate of the owner's socket
	facts  []byte
	record []byte
}

func (p *killedPeer) send() error {
	buf := make([]byte, 30_000)
	for {
		select {
		case <-p.stop:
			// crypto/tls loses its receiving key when it is asked for a KeyUpdate after
			// CloseWrite, so that comes last.
			<-p.ended
			return p.c.CloseWrite()
		default:
		}
		b := buf[:1+rand.IntN(len(buf))]
		if rand.IntN(3) == 0 {
			b = buf[:1+rand.IntN(50)]
		}
		for i := range b {
			b[i] = streamByte(p.sent + uint64(i))
		}
		n, err := p.c.Write(b)
		p.sent += uint64(n)
		if err != nil {
			return fmt.Errorf("peer: write: %w", err)
		}
	}
}

func (p *killedPeer) receive() error {
	defer close(p.ended)
	var owner, turn uint32
	buf := make([]byte, 20*maxPlaintext)
	want := make([]byte, len(buf))
	for {
		if _, err := io.ReadFull(p.c, buf[:frameMin]); err == io.EOF { //nolint:errorlint // tls.Conn's own
			return nil
		} else if err != nil {
			return fmt.Errorf("peer: read after %d frames: %w", p.frames, err)
		}
		from, at, n := binary.BigEndian.Uint32(buf), binary.BigEndian.Uint32(buf[4:]), int(binary.BigEndian.Uint32(buf[8:]))
		if from > owner {
			owner, turn = from, 0
		}
		if from != owner || at != turn || n < frameMin || n > len(buf) {
			return fmt.Errorf("peer: frame %d of owner %d, length %d; expected %d of %d", at, from, n, turn, owner)
		}
		if _, err := io.ReadFull(p.c, buf[frameMin:n]); err != nil {
			return fmt.Errorf("peer: read in a frame: %w", err)
		}
		if string(buf[:n]) != string(frame(want, from, at, n)) {
			return fmt.Errorf("peer: frame %d of owner %d has other bytes", at, from)
		}
		turn++
		p.frames++
		if p.slow && rand.IntN(20) == 0 {
			time.Sleep(time.Duration(rand.IntN(3000)) * time.Microsecond)
		}
	}
}

// oddConn writes in pieces, so that records arrive in pieces.
type oddConn struct{ net.Conn }

func (c oddConn) Write(p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var k int
		k, err = c.Conn.Write(p[n:min(len(p), n+1+rand.IntN(9000))])
		n += k
	}
	return n, err
}

func TestKilledOwners(t *testing.T) {
	kills := 30
	if s := os.Getenv("KTLSVISOR_KILLS"); s != "" {
		kills, _ = strconv.Atoi(s)
	} else if testing.Short() {
		kills = 10
	}
	notesFD, err := sys.SharedMemfd("notes", killSlots*noteSize)
	if err != nil {
		t.Fatal(err)
	}
	defer sys.CloseAll([]int{notesFD})
	notes, err := sys.MapShared(notesFD, killSlots*noteSize)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sys.Unmap(notes) }()
	var peers []*killedPeer
	var wg sync.WaitGroup
	for i, tc := range testSuites {
		p := newKilledPeer(t, i, tc.version, tc.suite)
		peers = append(peers, p)
		wg.Go(func() { p.errs <- p.send() })
		wg.Go(func() { p.errs <- p.receive() })
	}
	defer func() {
		for _, p := range peers {
			_, _ = p.sock.Close(), p.c.NetConn().Close()
		}
		wg.Wait()
	}()
	unsent, unread, kept := 0, 0, 0
	for kill := range kills {
		j, commits, done := runKilled(t, kill+1, notesFD, peers)
		for i, p := range peers {
			note := notes[i*noteSize:][:noteSize]
			rc, err := p.sock.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			key := JournalKey{uint64(i + 1), uint64(kill + 1)}
			var r *Recovered
			_ = rc.Control(func(fd uintptr) { r, err = j.Recover(key, p.facts, int(fd)) })
			if err != nil {
				t.Fatalf("kill %d, session %d: %v", kill+1, i, err)
			}
			p.record = r.Record
			if !retains(i) {
				// An owner notes what it was given after each Read.
				before, noted := sys.LoadShared(note[24:]), sys.LoadShared(note)
				given := before + r.Read
				if given < noted || given > max(before, noted)+32+maxRead {
					t.Fatalf("kill %d, session %d: %d bytes were given to owners; the last noted %d, and had %d at first", kill+1, i, given, noted, before)
				}
				sys.StoreShared(note[24:], given)
			}
			if retains(i) {
				k, err := commits.Amend(key, r.Record, r)
				if err != nil || k == nil {
					t.Fatalf("kill %d, session %d: %v, %v", kill+1, i, k, err)
				}
				p.record = k.Record
				kept += k.Again
			}
			unsent, unread = unsent+r.Unsent, unread+r.Unread
			sys.StoreShared(note[16:], 0)
			if len(p.errs) > 0 {
				t.Fatalf("kill %d, session %d: %v", kill+1, i, <-p.errs)
			}
		}
		done()
	}
	t.Logf("%d kills of %d sessions; owners left %d bytes to send, %d to read, and %d that had been read and not committed", kills, len(peers), unsent, unread, kept)
	if unsent == 0 || unread == 0 || kept == 0 {
		t.Error("nothing was in progress at any kill")
	}
	for i, p := range peers {
		lastOwner(t, i, p, notes[i*noteSize:][:noteSize], uint32(kills+1))
	}
}

func newKilledPeer(t *testing.T, i int, version, suite uint16) *killedPeer {
	t.Helper()
	p := &killedPeer{stop: make(chan struct{}), ended: make(chan struct{}), errs: make(chan error, 2), slow: i%2 == 0}
	pair := tcpPair
	if p.slow {
		pair = func(t testing.TB) (_, _ *net.TCPConn) { return tcpPairSmall(t, 32<<10) }
	}
	c, s := pair(t)
	conf := testClientTLS(t)
	conf.MinVersion, conf.MaxVersion = version, version
	if version == tls.VersionTLS12 {
		conf.CipherSuites = []uint16{suite}
	}
	p.c = tls.Client(oddConn{c}, conf)
	failed := make(chan error, 1)
	go func() { failed <- p.c.Handshake() }()
	conn, err := Server(context.Background(), s, &Config{TLS: testServerBoth(t), Mode: ModeSoftware})
	if err = errors.Join(err, <-failed); err != nil {
		t.Fatal(err)
	}
	_, _ = c.SetDeadline(never), s.SetDeadline(never)
	sock, st, err := conn.Detach()
	if err != nil {
		t.Fatal(err)
	}
	defer st.Wipe()
	if p.facts, err = st.MarshalFacts(); err == nil {
		p.record, err = st.MarshalRecord()
	}
	if err != nil {
		t.Fatal(err)
	}
	p.sock = duplicate(t, sock)
	_ = sock.Close()
	return p
}

// runKilled lets a process own the sessions for a moment.
func runKilled(t *testing.T, owner, notes int, peers []*killedPeer) (j *Journals, commits *CommitLog, done func()) {
	t.Helper()
	arena, mem := sharedArena(t, killArena, killSlots)
	defer sys.CloseAll([]int{arena})
	a, b, err := sys.PacketPair()
	if err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(b), "channel")
	ch, err := sys.NewPacketConn(a)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ch.Close() }()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), killedEnv+"="+strconv.Itoa(owner), "GORACE=atexit_sleep_ms=0")
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = theirs.Close()
	err = ch.Send([]byte("arena"), []int{arena, notes})
	for _, p := range peers {
		if err == nil {
			err = sendRecord(ch, p.sock, p.facts, p.record)
		}
	}
	if err == nil {
		err = sendRecord(ch, peers[0].sock, peers[0].facts, []byte{0})
	}
	if err == nil {
		_ = ch.SetReadDeadline(time.Now().Add(testWait))
		_, _, err = ch.Recv(make([]byte, 10))
	}
	time.Sleep(time.Duration(rand.IntN(20_000)) * time.Microsecond)
	_ = cmd.Process.Kill()
	werr := cmd.Wait() // seen dead
	if st, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); err != nil || !ok || !st.Signaled() {
		t.Fatalf("owner %d: %v, %v", owner, err, werr)
	}
	if j, err = OpenJournals(mem); err != nil {
		t.Fatal(err)
	}
	if j.Len() != len(peers) {
		t.Fatalf("%d journals of %d sessions", j.Len(), len(peers))
	}
	if commits, err = OpenCommits(mem); err != nil {
		t.Fatal(err)
	}
	return j, commits, func() { _ = sys.Unmap(mem) }
}

func sendRecord(ch *sys.PacketConn, sock *os.File, facts, record []byte) error {
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

// lastOwner goes on in this process, and ends the session.
func lastOwner(t *testing.T, i int, p *killedPeer, note []byte, owner uint32) {
	t.Helper()
	c, err := Import(duplicate(t, p.sock), p.facts, p.record)
	if err != nil {
		t.Fatalf("session %d: %v", i, err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(testWait))
	written := make(chan error, 1)
	go func() {
		_, err := c.Write(frame(make([]byte, 100), owner, 0, 100))
		written <- errors.Join(err, c.CloseWrite())
	}()
	close(p.stop)
	in := streamAt(note, i)
	buf := make([]byte, maxRead)
	for err == nil {
		var n int
		if n, err = c.Read(buf); n > 0 {
			if bad := in.add(buf[:n]); bad != nil {
				t.Fatalf("session %d: %v", i, bad)
			}
		}
	}
	if !errors.Is(err, io.EOF) {
		t.Fatalf("session %d: last read: %v", i, err)
	}
	if err := errors.Join(<-written, <-p.errs, <-p.errs); err != nil {
		t.Fatalf("session %d: %v", i, err)
	}
	if in.found && in.at != p.sent {
		t.Errorf("session %d: %d bytes were read, %d sent", i, in.at, p.sent)
	}
	if p.frames == 0 {
		t.Errorf("session %d: the peer got nothing", i)
	}
}
