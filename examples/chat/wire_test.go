package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/handoff"
)

// A wire is a client and the session it has, whichever process serves it: what
// travels with a session is here. It keeps the rules of handoff.Conn that the
// chat relies on.
type wire struct {
	t  *testing.T
	id uint64

	mu      sync.Mutex
	changed *sync.Cond
	in      []byte // sent by the client, not read
	inEnd   error  // what Read gives after in
	out     []byte // written for the client
	moving  bool
	reading bool // a Read waits
	full    bool // Write gives a timeout
	readDL  bool // Read gives a timeout

	state   []byte
	crashed bool
	group   string
	refuse  error  // JoinGroup's answer
	home    string // a group that lives in another process: joining it takes a move

	result chan error // of the handler
}

func newWire(t *testing.T, id uint64) *wire {
	w := &wire{t: t, id: id, result: make(chan error, 1)}
	w.changed = sync.NewCond(&w.mu)
	return w
}

func (w *wire) ID() uint64                         { return w.id }
func (w *wire) State() []byte                      { return w.state }
func (w *wire) SetState(b []byte)                  { w.state = b }
func (w *wire) Interrupted() bool                  { return w.crashed }
func (w *wire) SetWriteDeadline(t time.Time) error { return nil }

func (w *wire) Group() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.group
}

func (w *wire) SetReadDeadline(t time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.readDL = !t.IsZero()
	w.changed.Broadcast()
	return nil
}

func (w *wire) Unread(p []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.in = append(bytes.Clone(p), w.in...)
}

func (w *wire) JoinGroup(_ context.Context, name string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.refuse != nil {
		return w.refuse
	}
	if w.group == name {
		return nil
	}
	w.group = name
	if w.home != "" && w.home == name {
		w.home = ""
		return fmt.Errorf("joining: %w", handoff.ErrMoving)
	}
	return nil
}

func (w *wire) LeaveGroup(context.Context) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.group = ""
	return nil
}

func (w *wire) Read(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for {
		switch {
		case w.moving:
			return 0, handoff.ErrMoving
		case w.readDL:
			return 0, os.ErrDeadlineExceeded
		case len(w.in) > 0:
			n := copy(p, w.in)
			w.in = w.in[n:]
			return n, nil
		case w.inEnd != nil:
			return 0, w.inEnd
		}
		w.reading = true
		w.changed.Broadcast()
		w.changed.Wait()
		w.reading = false
	}
}

func (w *wire) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.full {
		return 0, os.ErrDeadlineExceeded
	}
	w.out = append(w.out, p...)
	w.changed.Broadcast()
	return len(p), nil
}

// The client's side.

func (w *wire) types(s string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.in = append(w.in, s...)
	w.changed.Broadcast()
}

func (w *wire) set(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
	w.changed.Broadcast()
}

// until waits for a state of the wire.
func (w *wire) until(what string, ok func() bool) {
	w.t.Helper()
	expired := time.AfterFunc(10*time.Second, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.changed.Broadcast()
	})
	defer expired.Stop()
	deadline := time.Now().Add(10 * time.Second)
	w.mu.Lock()
	defer w.mu.Unlock()
	for !ok() {
		if !time.Now().Before(deadline) {
			w.t.Fatalf("client %d: not %s after 10 s; it has seen:\n%s", w.id, what, w.out)
		}
		w.changed.Wait()
	}
}

// settled waits until everything typed was handled.
func (w *wire) settled() {
	w.t.Helper()
	w.until("handled", func() bool { return w.reading && len(w.in) == 0 })
}

// sees waits for a line and forgets everything up to it.
func (w *wire) sees(line string) {
	w.t.Helper()
	w.until(fmt.Sprintf("shown %q", line), func() bool {
		before, after, ok := bytes.Cut(append([]byte("\n"), w.out...), []byte("\n"+line+"\n"))
		if ok {
			_ = before
			w.out = bytes.Clone(after)
		}
		return ok
	})
}

// seen is what the client was shown and has not looked at.
func (w *wire) seen() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := string(w.out)
	w.out = nil
	return s
}

func (w *wire) ended() error {
	w.t.Helper()
	select {
	case err := <-w.result:
		return err
	case <-time.After(10 * time.Second):
		w.t.Fatalf("client %d: its handler still runs after 10 s", w.id)
		return nil
	}
}

func mustChat(t *testing.T, version string) *chat {
	t.Helper()
	c, err := newChat(version)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func serve(t *testing.T, c *chat, wires ...*wire) {
	for _, w := range wires {
		go func() { w.result <- c.serve(t.Context(), w) }()
	}
}

// hangUp ends clients and their handlers.
func hangUp(wires ...*wire) {
	for _, w := range wires {
		w.set(func() { w.inEnd = io.EOF; w.moving = false })
		if err := w.ended(); !errors.Is(err, io.EOF) {
			w.t.Errorf("client %d: its handler returned %v", w.id, err)
		}
	}
}

// freeze brings handlers to their safe point.
func freeze(t *testing.T, wires ...*wire) {
	t.Helper()
	for _, w := range wires {
		w.set(func() { w.moving = true })
	}
	for _, w := range wires {
		if err := w.ended(); !errors.Is(err, handoff.ErrMoving) {
			t.Fatalf("client %d: its handler returned %v when it was to move", w.id, err)
		}
	}
}

// move takes the members of a room from one program to the next, as the SDK
// does: no input before all have arrived.
func move(t *testing.T, from, to *chat, room string, wires ...*wire) {
	t.Helper()
	blob, err := from.rooms.FreezeGroup(room)
	if err != nil {
		t.Fatal(err)
	}
	if err := to.rooms.AdoptGroup(room, blob); err != nil {
		t.Fatal(err)
	}
	held := make([][]byte, len(wires))
	for i, w := range wires {
		w.set(func() { held[i], w.in, w.moving = w.in, nil, false })
	}
	serve(t, to, wires...)
	for _, w := range wires {
		w.settled()
	}
	for i, w := range wires {
		w.set(func() { w.in = append(held[i], w.in...) })
	}
}

// enter starts clients that are in a room under names a, b, ...
func enter(t *testing.T, c *chat, n int) []*wire {
	t.Helper()
	wires := make([]*wire, n)
	for i := range wires {
		wires[i] = newWire(t, uint64(i+1))
		serve(t, c, wires[i])
		wires[i].types(fmt.Sprintf("/nick %c\n/join ops\n", 'a'+i))
		wires[i].sees("* you are in ops")
	}
	for _, w := range wires {
		w.settled()
		w.seen()
	}
	return wires
}
