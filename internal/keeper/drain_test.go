package keeper

import (
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/testlog"
)

// worker starts a worker with its stdout with the keeper.
func (w *world) worker(s *child, name string) *child {
	w.t.Helper()
	pid := s.ok(command{Op: "writer", From: 1, Name: name}).Pid
	c := w.next()
	if c.pid != pid {
		w.t.Fatalf("pid %d called, want the worker %d", c.pid, pid)
	}
	w.t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGKILL) })
	return c
}

// While no supervisor leads, a worker writes as much as it likes. Without anybody
// reading it would stop at 64 KiB, and without the keeper's descriptor die.
func TestDrainWhileNobodyLeads(t *testing.T) {
	w := startKeeper(t, keeperConfig{LeadWithin: time.Minute})
	s := w.lead()
	worker := w.worker(s, "echo-1")
	base := w.fds()
	s.kill()
	next := w.next() // attached, but does not lead
	if r := worker.ok(command{Op: "write", Count: 1000, N: 1100, Tag: "line"}); r.N < 1<<20 {
		t.Fatalf("wrote %d bytes", r.N)
	}
	if !eventually(func() bool { return strings.Contains(w.out.String(), "echo-1: line 000999 xxx") }) {
		t.Fatal("the output did not come")
	}
	for line := range strings.Lines(w.out.String()) {
		if !strings.HasPrefix(line, "echo-1: line ") && !strings.Contains(line, "lines of worker output dropped") {
			t.Fatalf("odd line %.80q", line)
		}
	}

	t.Log("a leader is back: the keeper leaves the output to it")
	next.ok(command{Op: "lead"})
	w.wantFDs(base)
	worker.ok(command{Op: "write", Count: 1, N: 10, Tag: "for the leader"})
	got := next.ok(command{Op: "read-output"})
	if got.Err != "" || !strings.HasPrefix(got.Text, "for the leader 000000") {
		t.Fatalf("the leader read %q", got.Text)
	}
	if strings.Contains(w.out.String(), "for the leader") {
		t.Fatal("the keeper read the output while a supervisor led")
	}

	t.Log("and again, with a yield instead of a death")
	next.ok(command{Op: "yield"})
	worker.ok(command{Op: "write", Count: 500, N: 1000, Tag: "again"})
	if !eventually(func() bool { return strings.Contains(w.out.String(), "echo-1: again 000499 xxx") }) {
		t.Fatal("the output did not come")
	}
	next.ok(command{Op: "reclaim"})

	t.Log("the worker dies without a parent: it is reaped, and nothing else happens")
	worker.kill()
	if !eventually(func() bool { return !alive(worker.pid) }) {
		t.Fatal("the worker was not reaped")
	}
	next.ok(command{Op: "delete", Kind: KindOutput, From: 1, Count: 1, Name: "echo-1"})
	w.wantFDs(base - 1)
}

// The pipe's open file description stays as its other holders had it: the
// keeper's reading must not make it non-blocking.
func TestDrainLeavesFlagsAlone(t *testing.T) {
	w := startKeeper(t, keeperConfig{LeadWithin: time.Minute})
	s := w.lead()
	worker := w.worker(s, "echo-1")
	if s.ok(command{Op: "output-blocking"}).N != 1 {
		t.Fatal("the test's own pipe is not blocking")
	}
	s.ok(command{Op: "yield"})
	worker.ok(command{Op: "write", Count: 1, N: 1, Tag: "x"})
	if !eventually(func() bool { return strings.Contains(w.out.String(), "echo-1: x") }) {
		t.Fatal("the output did not come")
	}
	s.ok(command{Op: "reclaim"})
	if s.ok(command{Op: "output-blocking"}).N != 1 {
		t.Fatal("the keeper made the pipe non-blocking for everybody")
	}
}

// Without a free descriptor the output is read as soon as there is one again.
func TestDrainWithoutDescriptors(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Close() }()
	fd, err := sys.Dup(int(r.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	_ = r.Close()
	h := newHeld(Key{Kind: KindOutput, ID: 1, Name: "echo-1"}, nil, []int{fd})
	defer h.release()
	var out testlog.Buffer
	d := drains{log: hclog.NewNullLogger(), sink: newSink(&out)}
	defer d.sink.close()
	defer d.stop()

	var limit, none syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	none = limit
	none.Cur = 0
	restore := func() { _ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit) }
	defer restore()
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	d.start([]*held{h})
	d.stop() // with nothing opened
	d.start([]*held{h})
	if _, err := w.WriteString("a line\n"); err != nil {
		t.Fatal(err)
	}
	if s := out.String(); s != "" {
		t.Fatalf("there was a descriptor: %q", s)
	}
	restore()
	if !eventually(func() bool { return out.String() == "echo-1: a line\n" }) {
		t.Fatalf("the output did not come: %q", out.String())
	}
}

// The output is mostly a terminal, and a worker may print anything.
func TestDrainedLinesAreText(t *testing.T) {
	for in, want := range map[string]string{
		"plain\ttext, äöü":         "plain\ttext, äöü",
		"\x1b[2J\x1b]0;title\x07x": ".[2J.]0;title.x",
		"a\rb\r":                   "a.b",
		"\xff\x00\u0085\x7f":       "?...",
	} {
		if got := string(printable([]byte(in))); got != want {
			t.Errorf("printable(%q) = %q, want %q", in, got, want)
		}
	}
}

// An Output that takes nothing costs lines, and neither the worker nor the keeper.
func TestDrainWithoutReader(t *testing.T) {
	blocked := make(chan struct{})
	s := newSink(blockingWriter(blocked))
	for range sinkLines + 100 {
		s.write([]byte("x\n"))
	}
	if n := s.dropped.Load(); n < 99 || n > 100 {
		t.Fatalf("%d lines dropped, want 99 or 100", n)
	}
	close(blocked)
	s.close()
	<-s.done
}

type blockingWriter chan struct{}

func (b blockingWriter) Write(p []byte) (int, error) {
	<-b
	return len(p), nil
}
