package supervise

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"

	"github.com/ktlsvisor/ktlsvisor/internal/config"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/pidfd"
)

// patience bounds every wait of these tests.
const patience = 10 * time.Second

// unit is a supervisor with one pool whose workers are played by the test.
type unit struct {
	t     *testing.T
	s     *Supervisor
	store *memStore
	led   int
	pool  *pool
	peers map[uint64]net.Conn // the clients' ends, by session
	keys  keySetter           // the kernel's keys, for supervisors that can change them
}

// fake is a worker: a real process, which only sleeps, and the other end of its
// channel.
type fake struct {
	t   *testing.T
	w   *worker
	ch  *wire.Channel
	cmd *exec.Cmd
}

func newUnit(t *testing.T) *unit { return newUnitOf(t, 64) }

// newUnitOf has room for so many sessions.
func newUnitOf(t *testing.T, slots int) *unit {
	t.Helper()
	goleak.VerifyNone(t)
	st := newMemStore()
	led, fd, err := createLedger(slots)
	if err != nil {
		t.Fatal(err)
	}
	u := &unit{t: t, store: st, led: fd, peers: map[uint64]net.Conn{}}
	u.start(led, 1)
	for i := led.slots - 1; i >= 0; i-- {
		u.s.freeSlots = append(u.s.freeSlots, i)
	}
	go u.s.run()
	t.Cleanup(func() {
		u.end()
		st.closeAll()
		sys.CloseAll([]int{fd})
		for _, c := range u.peers {
			_ = c.Close()
		}
		goleak.VerifyNone(t)
	})
	return u
}

// start makes a supervisor; run is not started yet.
func (u *unit) start(led *ledger, incarnation uint32) {
	log := hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, Output: &testLog{u.t}})
	s := newSupervisor(context.Background(), log, u.store)
	s.led, s.generation = led, incarnation
	s.leads(incarnation)
	s.retain = newRetainer(u.store, s.post)
	pc := config.NewPool()
	pc.Name, pc.Command, pc.Workers = "p", []string{"/nonexistent"}, 0
	pc.FreezeTimeout = config.Duration(time.Minute)
	pc.Heartbeat, pc.Poison = 0, 0 // a test that wants them says so
	s.cfg = &config.Config{MaxSessions: led.slots, Pools: []config.Pool{pc}}
	u.pool = &pool{name: "p", cfg: pc, command: pc.Command, serving: 1, newest: 1, workers: map[uint64]*worker{}, parked: map[uint64]*session{}}
	s.pools["p"] = u.pool
	if u.keys != nil {
		s.keys, s.kernel.Rekey = u.keys, true
	}
	s.front = newFront(log, s.admit, func(counter) {})
	u.s = s
}

// end stops the supervisor as a crash would: nothing is said to anyone.
func (u *unit) end() {
	u.s.call(func() {
		for _, w := range u.s.workers {
			if w.ch != nil {
				w.out.abandon()
				_ = w.ch.Close()
				w.ch = nil
			}
		}
		close(u.s.stop)
	})
	<-u.s.done
	u.s.cancel()
	u.s.retain.close()
	u.s.led.close()
}

type testLog struct{ t *testing.T }

// Write also makes sure that no record state is logged: there are keys in it.
func (l *testLog) Write(p []byte) (int, error) {
	l.t.Logf("%s", p)
	list := strings.Trim(fmt.Sprint([]byte(secretText)), "[]")
	for _, form := range []string{secretText, hex.EncodeToString([]byte(secretText)), list, strings.ReplaceAll(list, " ", ", ")} {
		if bytes.Contains(p, []byte(form)) {
			l.t.Errorf("a secret was logged: %s", p)
		}
	}
	return len(p), nil
}

// secretText is in the record state of every session at first.
const secretText = "keys of it"

// worker adds a ready worker of a generation.
func (u *unit) worker(gen uint32) *fake {
	u.t.Helper()
	a, b, err := sys.PacketPair()
	if err != nil {
		u.t.Fatal(err)
	}
	ch, err := wire.NewChannel(b)
	if err != nil {
		u.t.Fatal(err)
	}
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		u.t.Fatal(err)
	}
	proc, err := pidfd.Open(cmd.Process.Pid)
	if err != nil {
		u.t.Fatal(err)
	}
	f := &fake{t: u.t, ch: ch, cmd: cmd}
	u.s.call(func() {
		u.s.lastWorker++
		f.w = &worker{pid: cmd.Process.Pid, gen: gen, pool: u.pool, proc: proc, state: workerReady, rekeys: true}
		f.w.ID, f.w.X = u.s.lastWorker, f.w
		if err := u.s.listen(f.w, a); err != nil {
			u.t.Error(err)
		}
		u.s.workers[f.w.ID], u.pool.workers[f.w.ID] = f.w, f.w
		if err := u.s.keepChannel(f.w); err != nil {
			u.t.Error(err)
		}
		u.s.watch(f.w)
	})
	u.t.Cleanup(func() { f.kill(); _ = ch.Close(); _ = proc.Close() })
	return f
}

// kill is kill -9.
func (f *fake) kill() {
	_ = f.ch.Close()
	_ = f.cmd.Process.Kill()
	_ = f.cmd.Wait()
}

func (f *fake) send(m *wire.Message) {
	f.t.Helper()
	if err := f.ch.Send(m); err != nil {
		f.t.Fatal(err)
	}
}

// expect receives the next message, which must be of this type.
func (f *fake) expect(typ wire.Type) *wire.Message {
	f.t.Helper()
	_ = f.ch.Conn().SetReadDeadline(time.Now().Add(patience))
	m, err := f.ch.Recv()
	if err != nil {
		f.t.Fatalf("waiting for %s: %v", typ, err)
	}
	m.CloseSockets()
	if m.Type != typ {
		f.t.Fatalf("got %s %+v, want %s", m.Type, m, typ)
	}
	return m
}

// silent checks that nothing is on its way to the worker, after everything that
// the supervisor has to do has been done.
func (u *unit) silent(f *fake) {
	u.t.Helper()
	u.settle(f)
	_ = f.ch.Conn().SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	m, err := f.ch.Recv()
	if err == nil {
		u.t.Fatalf("got %s %+v, want nothing", m.Type, m)
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		u.t.Fatal(err)
	}
}

// settle returns when what a worker sent has been handled.
func (u *unit) settle(f *fake) {
	u.t.Helper()
	f.send(&wire.Message{Type: wire.TypeAdopted}) // nothing
	u.until(func() bool { return true })
}

// until waits for a condition in the ledger's goroutine.
func (u *unit) until(cond func() bool) {
	u.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		ok := false
		u.s.call(func() { ok = cond() })
		if ok {
			return
		}
		if time.Now().After(deadline) {
			u.t.Fatal("the condition did not come true")
		}
		time.Sleep(time.Millisecond)
	}
}

// session admits a session and returns its id; it is given to whichever worker.
func (u *unit) session(software bool) uint64 {
	u.t.Helper()
	return u.sessionWith(func(a *admission) { a.software = software })
}

func (u *unit) sessionWith(change func(*admission)) uint64 {
	u.t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		u.t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	peer, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		u.t.Fatal(err)
	}
	c, err := ln.Accept()
	if err != nil {
		u.t.Fatal(err)
	}
	f, err := c.(*net.TCPConn).File()
	if err != nil {
		u.t.Fatal(err)
	}
	fd, err := dupFile(f)
	if err != nil {
		u.t.Fatal(err)
	}
	_, _ = f.Close(), c.Close()
	a := &admission{fd: fd, facts: facts{Pool: "p", Peer: "test", Facts: []byte("facts")},
		record: []byte("initial " + secretText)}
	change(a)
	var id uint64
	u.s.call(func() {
		u.s.admitSession(a)
		for k := range u.s.sessions {
			id = max(id, k)
		}
	})
	u.peers[id] = peer
	return id
}

// owned admits a session and has f adopt it.
func (u *unit) owned(f *fake, software bool) wire.Ref {
	u.t.Helper()
	id := u.session(software)
	m := f.expect(wire.TypeAdopt)
	if len(m.Items) != 1 || m.Items[0].ID != id || string(m.Items[0].Cargo.Facts) != "facts" {
		u.t.Fatalf("ADOPT %+v", m.Items)
	}
	ref := m.Items[0].Ref
	f.send(&wire.Message{Type: wire.TypeAdopted, Refs: []wire.Ref{ref}})
	if m = f.expect(wire.TypeResume); m.Refs[0] != ref {
		u.t.Fatalf("RESUME %+v, want %+v", m.Refs, ref)
	}
	return ref
}

// owner is who owns a session by the ledger's shared memory.
func (u *unit) owner(id uint64) (owner uint64, e entry) {
	u.s.call(func() {
		if ss := u.s.sessions[id]; ss != nil {
			e, _, _ = u.s.led.get(int(ss.slot))
			owner = e.Owner
		}
	})
	return owner, e
}

func (u *unit) counters() (c struct{ moved, lost, interrupted, unknown, peer uint64 }) {
	u.s.call(func() {
		x := u.s.led.counters()
		c.moved, c.lost, c.interrupted, c.unknown, c.peer = x.Moved, x.Lost, x.Interrupted, x.ClosedUnknown, x.ClosedByPeer
	})
	return c
}

// move begins to move everything from f to the workers of another generation.
func (u *unit) retire(f *fake, serving uint32) {
	u.s.call(func() {
		u.pool.serving = serving
		f.w.state = workerRetiring
	})
}

func (u *unit) peerSeesEnd(id uint64) {
	u.t.Helper()
	_ = u.peers[id].SetReadDeadline(time.Now().Add(patience))
	if _, err := u.peers[id].Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		u.t.Fatalf("the peer of a lost session sees %v, want the end", err)
	}
}

func parkedItem(ref wire.Ref, record string) *wire.Message {
	return &wire.Message{Type: wire.TypeParked, Items: []wire.Item{{Ref: ref, Cargo: wire.Cargo{Record: []byte(record), App: []byte("app")}}}}
}

func refs(r ...wire.Ref) []wire.Ref { return r }

func closeFDs(fds []int) { sys.CloseAll(fds) }

// offered is a unit with one session, owned by old as own, that is parked as try
// with record state "parked" and offered to young.
func offered(t *testing.T, software bool) (u *unit, old, young *fake, own, try wire.Ref) {
	t.Helper()
	u = newUnit(t)
	old = u.worker(1)
	own = u.owned(old, software)
	young = u.worker(2)
	u.retire(old, 2)
	try = old.expect(wire.TypeFreeze).Refs[0]
	old.send(parkedItem(try, "parked"))
	young.expect(wire.TypeAdopt)
	return u, old, young, own, try
}

// freezing is a unit with a group "room" of n members at old that is asked to
// freeze.
func freezing(t *testing.T, n int) (u *unit, old, young *fake, ms []wire.Ref, fr *wire.Message) {
	t.Helper()
	u = newUnit(t)
	old = u.worker(1)
	ms = u.members(old, n, "room")
	young = u.worker(2)
	u.retire(old, 2)
	return u, old, young, ms, old.expect(wire.TypeFreeze)
}
