package admin

import (
	"context"
	"encoding/json"
	"net/http"
	"time"
)

// line is one line of an operation's answer (application/x-ndjson): any number of
// progress lines, then one result or error. Its error form is also the body of
// every answer that is not 200.
type line struct {
	Progress *Progress       `json:"progress,omitempty"`
	Result   json.RawMessage `json:"result,omitempty"`
	Error    *errorBody      `json:"error,omitempty"`
}

// progressQueue bounds the lines that wait for a client that reads slowly; more
// are dropped, for an operation never waits for its client.
const progressQueue = 64

type outcome struct {
	result any
	err    error
}

// operation runs fn and streams what it says. fn goes on when the client is gone.
func (s *server) operation(w http.ResponseWriter, r *http.Request, name string, fn func(context.Context, func(Progress)) (any, error)) {
	progress := make(chan Progress, progressQueue)
	done := make(chan outcome, 1)
	s.addOp()
	go func() {
		defer s.doneOp()
		res, err := fn(s.opCtx, func(p Progress) {
			select {
			case progress <- p:
			default:
			}
		})
		gone := r.Context().Err() != nil // before the answer: its end cancels the context, too
		done <- outcome{res, err}
		if gone {
			s.log.Info("admin socket: the client did not wait for the end of its operation", "operation", name, "result", res, "error", err)
		}
	}()

	st := stream{w: w, rc: http.NewResponseController(w)}
	for {
		select {
		case p := <-progress:
			st.send(line{Progress: &p})
		case o := <-done:
			for len(progress) > 0 {
				p := <-progress
				st.send(line{Progress: &p})
			}
			s.finish(w, &st, o)
			return
		case <-r.Context().Done():
			return
		}
	}
}

func (s *server) finish(w http.ResponseWriter, st *stream, o outcome) {
	if o.err != nil && !st.started {
		s.fail(w, o.err)
		return
	}
	var l line
	if o.err == nil {
		l.Result, o.err = json.Marshal(o.result)
	}
	if o.err != nil {
		body := bodyOf(o.err)
		l = line{Error: &body}
	}
	st.send(l)
}

// stream writes lines; a failed write ends it silently, since the client is gone.
type stream struct {
	w       http.ResponseWriter
	rc      *http.ResponseController
	started bool
	failed  bool
}

func (st *stream) send(l line) {
	if st.failed {
		return
	}
	if !st.started {
		st.started = true
		st.w.Header().Set("Content-Type", "application/x-ndjson")
		st.w.WriteHeader(http.StatusOK)
	}
	_ = st.rc.SetWriteDeadline(time.Now().Add(writeTimeout))
	if err := json.NewEncoder(st.w).Encode(l); err != nil {
		st.failed = true
		return
	}
	st.failed = st.rc.Flush() != nil
}

func (s *server) addOp() {
	s.mu.Lock()
	s.ops++
	s.mu.Unlock()
}

func (s *server) doneOp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ops--
	if s.ops == 0 && s.idle != nil {
		close(s.idle)
		s.idle = nil
	}
}

// waitOps waits until no operation runs or ctx ends.
func (s *server) waitOps(ctx context.Context) {
	s.mu.Lock()
	if s.ops == 0 {
		s.mu.Unlock()
		return
	}
	if s.idle == nil {
		s.idle = make(chan struct{})
	}
	idle := s.idle
	s.mu.Unlock()
	select {
	case <-idle:
	case <-ctx.Done():
	}
}
