package keeper

import (
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/vmtest/guest"
)

func TestStore(t *testing.T) {
	w := startKeeper(t, keeperConfig{})
	s := w.lead()
	base, own := w.fds(), s.ok(command{Op: "fds"}).N

	wantFound := func(cmd command) {
		t.Helper()
		wantFound(t, s.ok(command{Op: "get", Kind: cmd.Kind}).Found, cmd)
	}

	t.Log("what Initial held is there")
	got := s.ok(command{Op: "get", Kind: KindBlob}).Found
	if len(got) != 1 || got[0].Key.Name != "initial" || got[0].Meta != "m" || got[0].FDs[0] != "initial" {
		t.Fatalf("got %+v", got)
	}

	t.Log("more than one message either way")
	sockets := command{Op: "put", Kind: KindSocket, From: 100, Count: 1200, FDs: 1, Tag: "a"}
	s.ok(sockets)
	wide := command{Op: "put", Kind: KindWorker, From: 1, Count: 3, FDs: MaxFDs, Tag: "wide", Name: strings.Repeat("n", MaxName)}
	s.ok(wide)
	fat := command{Op: "put", Kind: KindListener, From: 1 << 60, Count: 9, FDs: 0, Tag: strings.Repeat("f", MaxMeta)}
	s.ok(fat)
	w.wantFDs(base + 1200 + 3*MaxFDs)
	wantFound(sockets)
	wantFound(wide)
	wantFound(fat)

	t.Log("replaced: the old descriptors are closed")
	part := command{Op: "put", Kind: KindSocket, From: 100, Count: 1200, FDs: 2, Tag: "b"}
	s.ok(part)
	w.wantFDs(base + 2400 + 3*MaxFDs)
	wantFound(part)

	t.Log("by id; unknown ids are left out")
	got = s.ok(command{Op: "get", Kind: KindSocket, IDs: []uint64{5, 100, 1299, 1300}}).Found
	if len(got) != 2 || got[0].FDs[0] != "b/100/0" || got[1].FDs[1] != "b/1299/1" {
		t.Fatalf("got %+v", got)
	}

	t.Log("one id, several names")
	s.ok(command{Op: "put", Kind: KindSocket, From: 100, Count: 1, FDs: 1, Tag: "c", Name: "other"})
	if got = s.ok(command{Op: "get", Kind: KindSocket, IDs: []uint64{100}}).Found; len(got) != 2 {
		t.Fatalf("got %+v", got)
	}
	s.ok(command{Op: "delete", Kind: KindSocket, From: 100, Count: 1, Name: "other"})
	wantFound(part)

	t.Log("a list brings no descriptors")
	if got = s.ok(command{Op: "list", Kind: KindSocket}).Found; len(got) != 1200 || len(got[0].FDs) != 0 || got[0].Meta != "b" {
		t.Fatalf("%d entries, first %+v", len(got), got[0])
	}

	t.Log("deleted, also what is not there")
	s.ok(command{Op: "delete", Kind: KindSocket, From: 0, Count: 1300})
	s.ok(command{Op: "delete", Kind: KindWorker, From: 1, Count: 3, Name: wide.Name})
	s.ok(command{Op: "delete", Kind: KindListener, From: 1 << 60, Count: 9})
	w.wantFDs(base)
	if n := s.ok(command{Op: "fds"}).N; n != own {
		t.Fatalf("the supervisor has %d descriptors, had %d", n, own)
	}
}

func TestPutChecksEntries(t *testing.T) {
	w := startKeeper(t, keeperConfig{})
	s := w.lead()
	for _, tc := range []struct {
		name string
		cmd  command
		want string
	}{
		{"name too long", command{Name: strings.Repeat("n", MaxName+1)}, "limit is 255"},
		{"meta too large", command{Tag: strings.Repeat("m", MaxMeta+1)}, "sealed memfd"},
		{"too many descriptors", command{FDs: MaxFDs + 1}, "limit is 253"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.cmd.Op, tc.cmd.Kind, tc.cmd.From, tc.cmd.Count = "put", KindSocket, 7, 1
			r := s.do(tc.cmd)
			if !strings.Contains(r.Err, tc.want) || !strings.Contains(r.Err, "socket 7") {
				t.Fatalf("error %q, want the key and %q", r.Err, tc.want)
			}
		})
	}
	s.ok(command{Op: "put", Kind: KindSocket, From: 7, Count: 1, FDs: 1, Tag: "x"})
}

func TestManyGoroutines(t *testing.T) {
	w := startKeeper(t, keeperConfig{})
	s := w.lead()
	base, own := w.fds(), s.ok(command{Op: "fds"}).N
	s.ok(command{Op: "hammer"})
	w.wantFDs(base + 16*4*2)
	if n := s.ok(command{Op: "fds"}).N; n != own {
		t.Fatalf("the supervisor has %d descriptors, had %d", n, own)
	}
}

// The keeper refuses what it has no descriptors for and keeps what it has.
func TestKeeperOutOfDescriptors(t *testing.T) {
	w := startKeeper(t, keeperConfig{Nofile: 400})
	s := w.lead()
	base := w.fds()
	first := command{Op: "put", Kind: KindSocket, From: 1, Count: 200, FDs: 1, Tag: "a"}
	s.ok(first)
	// Fits into the table of descriptors, but would take the headroom.
	r := s.refused(command{Op: "put", Kind: KindWorker, From: 9, Count: 1, FDs: 150, Tag: "b"}, "full")
	if !strings.Contains(r.Err, "worker 9") || !strings.Contains(r.Err, "NOFILE") {
		t.Fatalf("error %q names neither key nor remedy", r.Err)
	}
	// The kernel cannot even deliver these (MSG_CTRUNC).
	r = s.refused(command{Op: "put", Kind: KindWorker, From: 10, Count: 1, FDs: MaxFDs, Tag: "c"}, "full")
	if !strings.Contains(r.Err, "worker 10") {
		t.Fatalf("error %q does not name the key", r.Err)
	}
	w.wantFDs(base + 200)
	wantFound(t, s.ok(command{Op: "get", Kind: KindSocket}).Found, first)
	// A supervisor can still be started.
	s.kill()
	s = w.lead()
	wantFound(t, s.ok(command{Op: "get", Kind: KindSocket}).Found, first)
	s.ok(command{Op: "delete", Kind: KindSocket, From: 1, Count: 200})
	s.ok(command{Op: "put", Kind: KindWorker, From: 10, Count: 1, FDs: MaxFDs, Tag: "c"})
}

// A supervisor out of descriptors gets an error, leaks nothing, and can go on.
func TestSupervisorOutOfDescriptors(t *testing.T) {
	w := startKeeper(t, keeperConfig{})
	s := w.lead()
	all := command{Op: "put", Kind: KindSocket, From: 1, Count: 900, FDs: 1, Tag: "a"}
	s.ok(all)
	own := s.ok(command{Op: "fds"}).N
	s.ok(command{Op: "nofile", N: uint64(own) + 300})
	if r := s.do(command{Op: "get", Kind: KindSocket}); !strings.Contains(r.Err, "too many open files in this process") {
		t.Fatalf("error %q", r.Err)
	}
	if !eventually(func() bool { return s.ok(command{Op: "fds"}).N == own }) {
		t.Fatalf("the supervisor has %d descriptors, had %d", s.ok(command{Op: "fds"}).N, own)
	}
	s.ok(command{Op: "nofile", N: 2000})
	wantFound(t, s.ok(command{Op: "get", Kind: KindSocket}).Found, all)
}

// A user without privileges may have only so many descriptors in flight between
// processes (ETOOMANYREFS): a large put then goes slower.
func TestDescriptorsInFlight(t *testing.T) {
	if !guest.Unprivileged(t) { // root may have any number of descriptors in flight
		return
	}
	w := startKeeper(t, keeperConfig{})
	s := w.lead()
	s.ok(command{Op: "nofile", N: 100})
	base := w.fds()
	s.ok(command{Op: "put-one-fd-often", Kind: KindSocket, Count: 3000, Tag: "x"})
	w.wantFDs(base + 3000)
}

// The keeper is never restarted, so what an entry costs it matters.
func TestStoreMemory(t *testing.T) {
	const n = 50_000
	s := newStore(1 << 30)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range n {
		// No descriptor has that number: closing it does nothing.
		if err := s.put([]*held{newHeld(Key{Kind: KindSocket, ID: uint64(i)}, nil, []int{1 << 30})}); err != nil {
			t.Fatal(err)
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if per := (after.HeapAlloc - before.HeapAlloc) / n; per > 100 {
		t.Errorf("%d bytes an entry, the limit is 100", per)
	}
	runtime.KeepAlive(s)
}

func TestStoreLimits(t *testing.T) {
	s := newStore(100)
	put := func(id uint64, name string, fds, meta int) error {
		list := make([]int, fds)
		for i := range list {
			list[i] = -1
		}
		return s.put([]*held{newHeld(Key{Kind: KindBlob, ID: id, Name: name}, make([]byte, meta), list)})
	}
	for i := range uint64(3) {
		if err := put(1, fmt.Sprint(i), 12, 10); err != nil {
			t.Fatal(err)
		}
	}
	if err := put(2, "", 1, 0); err == nil {
		t.Fatal("the headroom was given away")
	}
	if err := put(1, "1", 12, 10); err != nil {
		t.Fatalf("replacing needs no room: %v", err)
	}
	s.remove(Key{Kind: KindBlob, ID: 1, Name: "0"})
	if err := put(2, "", 12, 10); err != nil {
		t.Fatal(err)
	}
	if s.count != 3 || s.fds != 36 || s.bytes != 32 {
		t.Fatalf("count %d, descriptors %d, bytes %d", s.count, s.fds, s.bytes)
	}
}
