package keeper

import (
	"testing"
	"time"
)

var sockets = command{Op: "put", Kind: KindSocket, From: 1, Count: 1000, FDs: 1, Tag: "s"}

func wantSockets(t *testing.T, s *child) {
	t.Helper()
	wantFound(t, s.ok(command{Op: "get", Kind: KindSocket}).Found, sockets)
}

func TestSupervisorKilled(t *testing.T) {
	w := startKeeper(t, keeperConfig{})
	s := w.next()
	if n := s.ok(command{Op: "lead"}).Incarnation; n != 1 {
		t.Fatalf("incarnation %d, want 1", n)
	}
	if n := s.ok(command{Op: "lead"}).Incarnation; n != 1 {
		t.Fatalf("incarnation %d after leading twice, want 1", n)
	}
	s.ok(sockets)
	base := w.fds()
	start := time.Now()
	s.kill()
	s = w.next()
	if n := s.ok(command{Op: "lead"}).Incarnation; n != 2 {
		t.Fatalf("incarnation %d, want 2", n)
	}
	if d := time.Since(start); d > time.Second {
		t.Errorf("the next supervisor led after %v, the limit is 1s", d)
	}
	wantSockets(t, s)
	w.wantFDs(base)
}

// What the leader had sent when it died is stored, though nobody could be told.
func TestPutOfTheDying(t *testing.T) {
	w := startKeeper(t, keeperConfig{Min: time.Millisecond, Max: time.Millisecond})
	for i := range 5 {
		s := w.lead()
		last := command{Op: "put-and-die", Kind: KindWorker, From: uint64(i), Count: 1, FDs: 100, Tag: "w"}
		s.send(last)
		s = w.lead()
		wantFound(t, s.ok(command{Op: "get", Kind: KindWorker, IDs: []uint64{uint64(i)}}).Found, last)
		s.kill()
	}
}

func TestSuccession(t *testing.T) {
	w := startKeeper(t, keeperConfig{})
	a := w.lead()
	a.ok(sockets)
	base := w.fds()
	pid := a.ok(command{Op: "successor"}).Pid
	b := w.next()
	if b.pid != pid {
		t.Fatalf("pid %d called, want %d", b.pid, pid)
	}
	wantSockets(t, b) // it may look before it leads
	b.refused(command{Op: "lead"}, "led")
	b.refused(command{Op: "reclaim"}, "led")
	b.refused(command{Op: "put", Kind: KindSocket, From: 1, Count: 3, FDs: 1, Tag: "x"}, "not leader")

	a.ok(command{Op: "yield"})
	a.refused(command{Op: "put", Kind: KindSocket, From: 1, Count: 3, FDs: 1, Tag: "x"}, "not leader")
	if n := b.ok(command{Op: "lead"}).Incarnation; n != 2 {
		t.Fatalf("incarnation %d, want 2", n)
	}
	for _, op := range []command{
		{Op: "put", Kind: KindSocket, From: 1, Count: 3, FDs: 1, Tag: "x"},
		{Op: "delete", Kind: KindSocket, From: 1, Count: 3},
		{Op: "yield"},
		{Op: "successor"},
		{Op: "done"},
	} {
		a.refused(op, "not leader")
	}
	a.refused(command{Op: "reclaim"}, "led")
	wantSockets(t, b)

	t.Log("the old one exits; the new one is nobody's child but the keeper's now")
	a.exit(0)
	w.wantFDs(base)
	start := time.Now()
	b.kill()
	c := w.lead()
	if d := time.Since(start); d > time.Second {
		t.Errorf("the next supervisor led after %v, the limit is 1s", d)
	}
	wantSockets(t, c)
	if !eventually(func() bool { return !alive(b.pid) }) {
		t.Error("the supervisor that was not the keeper's child was not reaped")
	}
	w.wantFDs(base)
}

// The leader dies while its predecessor still finishes handshakes: the keeper is
// not its parent, and does not wait for the predecessor.
func TestLeaderOfAnotherParentKilled(t *testing.T) {
	w := startKeeper(t, keeperConfig{LeadWithin: time.Minute})
	a := w.lead()
	a.ok(sockets)
	a.ok(command{Op: "successor"})
	b := w.next()
	a.ok(command{Op: "yield"})
	b.ok(command{Op: "lead"})
	start := time.Now()
	b.kill()
	c := w.next()
	if n := c.ok(command{Op: "lead"}).Incarnation; n != 3 {
		t.Fatalf("incarnation %d, want 3", n)
	}
	if d := time.Since(start); d > time.Second {
		t.Errorf("the next supervisor led after %v, the limit is 1s", d)
	}
	a.refused(command{Op: "reclaim"}, "led")
	wantSockets(t, c)
}

func TestSuccessorFails(t *testing.T) {
	w := startKeeper(t, keeperConfig{LeadWithin: time.Minute})
	a := w.lead()
	a.ok(sockets)
	a.ok(command{Op: "successor"})
	b := w.next()
	a.ok(command{Op: "yield"})
	b.kill()
	w.wantLog("a supervisor ended")
	a.ok(command{Op: "reclaim"})
	a.ok(command{Op: "put", Kind: KindSocket, From: 1, Count: 1000, FDs: 1, Tag: "s"})
	if n := a.ok(command{Op: "lead"}).Incarnation; n != 1 {
		t.Fatalf("incarnation %d after taking the lead back, want 1", n)
	}
	if c := w.nextWithin(300 * time.Millisecond); c != nil {
		t.Fatal("another supervisor was started")
	}
	t.Log("a second try works")
	a.ok(command{Op: "yield"})
	a.ok(command{Op: "successor"})
	b = w.next()
	if n := b.ok(command{Op: "lead"}).Incarnation; n != 2 {
		t.Fatalf("incarnation %d, want 2", n)
	}
	wantSockets(t, b)
}

// Both sides of a succession die before the new one led.
func TestAllDieInSuccession(t *testing.T) {
	w := startKeeper(t, keeperConfig{LeadWithin: time.Minute})
	a := w.lead()
	a.ok(sockets)
	a.ok(command{Op: "successor"})
	b := w.next()
	a.ok(command{Op: "yield"})
	b.kill()
	a.kill()
	c := w.lead()
	wantSockets(t, c)
}

// The leader dies when its successor has attached: the successor leads, and no
// third one is started.
func TestLeaderDiesBeforeYield(t *testing.T) {
	w := startKeeper(t, keeperConfig{LeadWithin: time.Minute})
	a := w.lead()
	a.ok(sockets)
	a.ok(command{Op: "successor"})
	b := w.next()
	a.kill()
	w.wantLog("the supervisor died")
	if n := b.ok(command{Op: "lead"}).Incarnation; n != 2 {
		t.Fatalf("incarnation %d, want 2", n)
	}
	wantSockets(t, b)
	if c := w.nextWithin(300 * time.Millisecond); c != nil {
		t.Fatal("another supervisor was started")
	}
}

// A successor that attached but never leads is waited for only so long.
func TestSuccessorHangs(t *testing.T) {
	w := startKeeper(t, keeperConfig{LeadWithin: 300 * time.Millisecond})
	a := w.lead()
	a.ok(sockets)
	a.ok(command{Op: "successor"})
	b := w.next()
	a.kill()
	c := w.lead()
	wantSockets(t, c)
	b.refused(command{Op: "lead"}, "led")
}

// A supervisor that the keeper started and that never leads is killed.
func TestSupervisorHangsAtStart(t *testing.T) {
	w := startKeeper(t, keeperConfig{LeadWithin: 300 * time.Millisecond})
	a := w.next()
	b := w.lead()
	if !eventually(func() bool { return !alive(a.pid) }) {
		t.Fatal("the one that hung lives")
	}
	b.ok(sockets)
}

// A leader that lost its channel can do nothing more; when it does not exit, it
// is killed, so that another can lead.
func TestLeaderLosesChannel(t *testing.T) {
	w := startKeeper(t, keeperConfig{LeadWithin: 300 * time.Millisecond})
	a := w.lead()
	a.ok(sockets)
	a.ok(command{Op: "close"})
	a.refused(command{Op: "put", Kind: KindSocket, From: 1, Count: 1, Tag: "x"}, "closed")
	b := w.lead()
	if alive(a.pid) {
		t.Fatal("two supervisors live, one of them without a channel")
	}
	wantSockets(t, b)
}
