package supervise

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/config"
	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/pidfd"
)

// bareUnit is a unit whose pool retains nothing.
func bareUnit(t *testing.T) *unit {
	t.Helper()
	u := newUnit(t)
	u.s.call(func() { u.pool.cfg.Retain = false })
	return u
}

// bare makes a worker one of whose sockets nobody keeps duplicates.
func (f *fake) bare(u *unit) *fake {
	u.s.call(func() { f.w.bare = true })
	return f
}

// kept says how many sockets of a session the keeper has: 0 or 1.
func (u *unit) kept(id uint64) int {
	list, _ := u.store.List(context.Background(), keeper.KindSocket)
	n := 0
	for i := range list {
		if list[i].Key.ID == id {
			n++
		}
	}
	return n
}

func (u *unit) awaitKept(id uint64, n int) {
	u.t.Helper()
	u.until(func() bool { u.s.sweepAt = time.Time{}; return u.kept(id) == n })
}

// socket is a duplicate of a session's socket, as its worker has one; from the keeper,
// so before that gives it up.
func (u *unit) socket(id uint64) int {
	u.t.Helper()
	list, err := u.store.Get(context.Background(), keeper.KindSocket, id)
	if err != nil || len(list) != 1 {
		u.t.Fatal(err, len(list))
	}
	fd := list[0].FDs[0]
	u.t.Cleanup(func() { sys.CloseAll([]int{fd}) })
	return fd
}

// bareOwned admits a session that f adopts, and waits until only f has its socket.
func (u *unit) bareOwned(f *fake) (ref wire.Ref, sock int) {
	u.t.Helper()
	id := u.session(false)
	m := f.expect(wire.TypeAdopt)
	sock = u.socket(id)
	ref = m.Items[0].Ref
	f.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(ref)})
	f.expect(wire.TypeResume)
	u.awaitKept(id, 0)
	return ref, sock
}

func parkedWith(try wire.Ref, sock int) *wire.Message {
	m := parkedItem(try, "parked")
	m.Items[0].WithSocket, m.Items[0].Socket = true, sock
	return m
}

// The keeper has the socket while nobody owns the session, and only then.
func TestBareMove(t *testing.T) {
	u := bareUnit(t)
	old := u.worker(1).bare(u)
	own, sock := u.bareOwned(old)
	young := u.worker(2).bare(u)
	u.retire(old, 2)
	try := old.expect(wire.TypeFreeze).Refs[0]
	old.send(parkedWith(try, sock))
	if m := young.expect(wire.TypeAdopt); m.Items[0].ID != own.ID || string(m.Items[0].Cargo.Record) != "parked" {
		t.Fatalf("ADOPT %+v", m.Items)
	}
	if u.kept(own.ID) != 1 {
		t.Error("the keeper does not have the socket of a parked session")
	}
	young.send(&wire.Message{Type: wire.TypeAdopted, Refs: refs(try)})
	young.expect(wire.TypeResume)
	old.expect(wire.TypeRelease)
	u.awaitKept(own.ID, 0)
	if c := u.counters(); c.moved != 1 || c.lost+c.interrupted != 0 {
		t.Errorf("counters %+v", c)
	}
}

// An attempt that comes to nothing leaves the worker alone with the socket again.
func TestBareMoveCalledOff(t *testing.T) {
	u := bareUnit(t)
	old := u.worker(1).bare(u)
	own, sock := u.bareOwned(old)
	young := u.worker(2).bare(u)
	u.retire(old, 2)
	try := old.expect(wire.TypeFreeze).Refs[0]
	old.send(parkedWith(try, sock))
	young.expect(wire.TypeAdopt)
	young.send(&wire.Message{Type: wire.TypeRefused, Refused: []wire.Refused{{Ref: try, Why: "no"}}})
	if m := old.expect(wire.TypeThaw); m.Refs[0] != try {
		t.Fatalf("THAW %+v", m.Refs)
	}
	u.awaitKept(own.ID, 0)
}

// A keeper that can hold no more costs no session.
func TestBareMoveWhenTheKeeperIsFull(t *testing.T) {
	u := bareUnit(t)
	old := u.worker(1).bare(u)
	own, sock := u.bareOwned(old)
	young := u.worker(2).bare(u)
	u.retire(old, 2)
	try := old.expect(wire.TypeFreeze).Refs[0]
	u.store.mu.Lock()
	u.store.full = true
	u.store.mu.Unlock()
	old.send(parkedWith(try, sock))
	if m := old.expect(wire.TypeThaw); m.Refs[0] != try {
		t.Fatalf("THAW %+v", m.Refs)
	}
	u.silent(young)
	if id, _ := u.owner(own.ID); id != old.w.ID {
		t.Errorf("owner %d", id)
	}
}

// A worker that dies takes its sockets along: its sessions are lost, and said to be.
func TestBareWorkerDies(t *testing.T) {
	u := bareUnit(t)
	f := u.worker(1).bare(u)
	u.bareOwned(f)
	f.kill()
	u.until(func() bool { return len(u.s.sessions) == 0 })
	if c := u.counters(); c.lost != 1 || c.interrupted != 0 {
		t.Errorf("counters %+v", c)
	}
}

// What comes back has to be the session's own socket, and from a worker that was asked.
func TestBareLies(t *testing.T) {
	for name, lie := range map[string]struct {
		bare bool
		msg  func(try wire.Ref, own, other int) *wire.Message
	}{
		"another session's": {true, func(try wire.Ref, _, other int) *wire.Message { return parkedWith(try, other) }},
		"none":              {true, func(try wire.Ref, _, _ int) *wire.Message { return parkedItem(try, "parked") }},
		"not asked for":     {false, func(try wire.Ref, own, _ int) *wire.Message { return parkedWith(try, own) }},
	} {
		t.Run(name, func(t *testing.T) {
			u := bareUnit(t)
			old := u.worker(1).bare(u)
			own, sock := u.bareOwned(old)
			other, othersock := u.bareOwned(old)
			young := u.worker(2).bare(u)
			u.retire(old, 2)
			tries := old.expect(wire.TypeFreeze).Refs
			try := tries[0]
			if try.ID == other.ID {
				sock, othersock = othersock, sock
			}
			u.s.call(func() { old.w.bare = lie.bare })
			old.send(lie.msg(try, sock, othersock))
			u.until(func() bool { return old.w.ch == nil })
			u.silent(young)
			if id, _ := u.owner(own.ID); id != 0 && id != old.w.ID { // it may have been killed over it
				t.Errorf("owner %d", id)
			}
			if u.kept(own.ID)+u.kept(other.ID) != 0 {
				t.Error("the keeper has a socket that was a lie")
			}
		})
	}
}

// holding replaces the process of a fake worker by one that has these descriptors.
func (u *unit) holding(f *fake, fds ...int) {
	u.t.Helper()
	cmd := exec.Command("sleep", "1000")
	for _, fd := range fds {
		d, err := sys.Dup(fd)
		if err != nil {
			u.t.Fatal(err)
		}
		file := os.NewFile(uintptr(d), "socket")
		defer file.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, file)
	}
	if err := cmd.Start(); err != nil {
		u.t.Fatal(err)
	}
	proc, err := pidfd.Open(cmd.Process.Pid)
	if err != nil {
		u.t.Fatal(err)
	}
	waited := make(chan struct{})
	go func() { _ = cmd.Wait(); close(waited) }()
	u.t.Cleanup(func() { _ = cmd.Process.Kill(); <-waited; _ = proc.Close() })
	u.s.call(func() {
		_ = f.w.proc.Close() // nobody waits for that process any more
		f.w.proc, f.w.pid = proc, cmd.Process.Pid
		u.s.watch(f.w)
	})
}

// The sockets of a worker that hangs are taken before it is killed, and its sessions go
// on when it has been seen dead.
func TestBareWorkerHangs(t *testing.T) {
	u := bareUnit(t)
	f := u.worker(1).bare(u)
	one, sock1 := u.bareOwned(f)
	two, sock2 := u.bareOwned(f)
	gone, _ := u.bareOwned(f) // whatever became of it
	u.holding(f, sock1, sock2, sock2)
	other := u.worker(1).bare(u)
	u.s.call(func() { u.s.hung(f.w) })
	got := map[uint64]bool{}
	for len(got) < 2 {
		for _, it := range other.expect(wire.TypeAdopt).Items {
			if it.Flags != wire.FlagRestored|wire.FlagInterrupted {
				t.Errorf("flags %v", it.Flags)
			}
			got[it.ID] = true
			u.s.call(func() {
				if u.s.workers[f.w.ID] != nil {
					t.Error("adopted before the old owner was seen dead")
				}
			})
		}
	}
	if !got[one.ID] || !got[two.ID] {
		t.Errorf("adopted: %v", got)
	}
	u.until(func() bool { return u.s.sessions[gone.ID] == nil })
	if c := u.counters(); c.lost != 1 || c.interrupted != 2 {
		t.Errorf("counters %+v", c)
	}
	// They are the right ones, and alive.
	for _, ref := range []wire.Ref{one, two} {
		fd := u.socket(ref.ID)
		if _, err := syscall.Write(fd, []byte("x")); err != nil {
			t.Fatal(err)
		}
		_ = u.peers[ref.ID].SetReadDeadline(time.Now().Add(patience))
		if _, err := u.peers[ref.ID].Read(make([]byte, 1)); err != nil {
			t.Errorf("the client of session %d got %v", ref.ID, err)
		}
	}
}

// Keys of a session are changed on a socket that is borrowed from its owner.
func TestBareSocketIsBorrowed(t *testing.T) {
	u := bareUnit(t)
	f := u.worker(1).bare(u)
	ref, sock := u.bareOwned(f)
	u.holding(f, sock)
	want, err := sys.SocketCookie(sock)
	if err != nil {
		t.Fatal(err)
	}
	var with func(func(int) error) error
	u.s.call(func() { with = u.s.socketOf(u.s.sessions[ref.ID]) })
	got := uint64(0)
	if err := with(func(fd int) (err error) { got, err = sys.SocketCookie(fd); return err }); err != nil || got != want {
		t.Errorf("cookie %d, want %d, error %v", got, want, err)
	}
	u.s.call(func() { u.pool.cfg.HangTimeout = config.Duration(time.Second) })
	if err := borrowed(context.Background(), f.w.proc, f.w.pid, want+1, nil); !errors.Is(err, errNoSocket) {
		t.Errorf("a socket that the worker does not have: %v", err)
	}
}
