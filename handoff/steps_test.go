package handoff

import (
	"context"
	"errors"
	"testing"
	"time"
)

// stepHandler reports what it is given and does what the test tells it.
type stepHandler struct {
	started chan *Conn
	do      chan func(context.Context, *Conn) error
}

func newStepHandler() *stepHandler {
	return &stepHandler{started: make(chan *Conn, 16), do: make(chan func(context.Context, *Conn) error)}
}

// serve runs one instruction after another until one returns an error other than
// errNext.
func (h *stepHandler) serve(ctx context.Context, c *Conn) error {
	h.started <- c
	for f := range h.do {
		if err := f(ctx, c); !errors.Is(err, errNext) {
			return err
		}
	}
	return nil
}

var errNext = errors.New("next instruction")

func (h *stepHandler) wait(t *testing.T) *Conn {
	t.Helper()
	select {
	case c := <-h.started:
		return c
	case <-time.After(patience):
		t.Fatal("the handler was not started")
		return nil
	}
}

// stepping is a worker with a stepHandler, which has been given a session.
func stepping(t *testing.T) (h *stepHandler, p *proc, s *sess, c *Conn) {
	t.Helper()
	h = newStepHandler()
	p = startProc(t, h.serve)
	s = software(t)
	p.give(s)
	return h, p, s, h.wait(t)
}

// readMoving reads until the move is wanted.
func readMoving(_ context.Context, c *Conn) error {
	_, err := c.Read(make([]byte, 1))
	return err
}
