package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
)

// Limits of the server.
const (
	maxBody       = 16 << 10 // bytes of a request; a command's path fits
	maxHeader     = 8 << 10
	headerTimeout = 5 * time.Second
	bodyTimeout   = 5 * time.Second
	writeTimeout  = 30 * time.Second // one answer, or one line of a stream
	shutdownGrace = 5 * time.Second
)

// StopRequest asks for the end of the unit.
type StopRequest struct {
	Grace time.Duration `json:"grace,omitempty"` // for sessions to end; 0: the supervisor's default
}

// Serve answers requests on l, a Unix socket, from processes of uid and of root
// until ctx ends; then it stops accepting, lets requests in progress finish for up
// to 5 s, and returns nil. It closes l and leaves the socket's file.
//
// Operations (upgrade, stop) get a context that outlives their client: one that
// goes away changes nothing. They are cancelled only when they are still running
// 5 s after ctx ended.
func Serve(ctx context.Context, l net.Listener, uid uint32, b Backend, log hclog.Logger) error {
	opCtx, cancelOps := context.WithCancel(context.WithoutCancel(ctx))
	defer cancelOps()
	s := &server{backend: b, log: log, opCtx: opCtx}
	pl := newPeerListener(l, uid, log)
	hs := &http.Server{
		Handler:           s.handler(),
		ReadHeaderTimeout: headerTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          log.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Warn}),
	}
	// One request a connection: an idle connection would stay with a supervisor
	// that has handed over to its successor.
	hs.SetKeepAlivesEnabled(false)

	served := make(chan error, 1)
	go func() { served <- hs.Serve(pl) }()

	var err error
	select {
	case err = <-served:
		err = fmt.Errorf("admin socket: %w", err)
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownGrace)
	defer cancel()
	if hs.Shutdown(grace) != nil {
		_ = hs.Close()
	}
	s.waitOps(grace)
	cancelOps()
	last, cancelLast := context.WithTimeout(context.WithoutCancel(ctx), shutdownGrace)
	defer cancelLast()
	s.waitOps(last)
	if err == nil {
		<-served
	}
	pl.wg.Wait()
	return err
}

type server struct {
	backend Backend
	log     hclog.Logger
	opCtx   context.Context

	mu   sync.Mutex
	ops  int
	idle chan struct{} // closed when ops gets to 0; nil while nobody waits
}

func (s *server) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		st, err := s.backend.Status(r.Context())
		s.answer(w, st, err)
	})
	mux.HandleFunc("GET /v1/sessions", func(w http.ResponseWriter, r *http.Request) {
		list, err := s.backend.Sessions(r.Context())
		if list == nil {
			list = []Session{} // "[]", not "null"
		}
		s.answer(w, list, err)
	})
	mux.HandleFunc("POST /v1/upgrade", func(w http.ResponseWriter, r *http.Request) {
		var req UpgradeRequest
		if !s.decode(w, r, &req) {
			return
		}
		if err := req.check(); err != nil {
			s.fail(w, err)
			return
		}
		s.operation(w, r, "upgrade", func(ctx context.Context, progress func(Progress)) (any, error) {
			return s.backend.Upgrade(ctx, req, progress)
		})
	})
	s.handleOperations(mux)
	mux.HandleFunc("POST /v1/upgrade-supervisor", func(w http.ResponseWriter, r *http.Request) {
		if !s.decode(w, r, &struct{}{}) {
			return
		}
		s.operation(w, r, "upgrade of the supervisor", func(ctx context.Context, progress func(Progress)) (any, error) {
			return s.backend.UpgradeSupervisor(ctx, progress)
		})
	})
	mux.HandleFunc("POST /v1/rekey", func(w http.ResponseWriter, r *http.Request) {
		var req RekeyRequest
		if !s.decode(w, r, &req) {
			return
		}
		if err := req.check(); err != nil {
			s.fail(w, err)
			return
		}
		s.operation(w, r, "change of keys", func(ctx context.Context, progress func(Progress)) (any, error) {
			return s.backend.Rekey(ctx, req, progress)
		})
	})
	mux.HandleFunc("POST /v1/stop", func(w http.ResponseWriter, r *http.Request) {
		var req StopRequest
		if !s.decode(w, r, &req) {
			return
		}
		if req.Grace < 0 {
			s.fail(w, fmt.Errorf("grace %s is negative: %w", req.Grace, ErrBadRequest))
			return
		}
		s.operation(w, r, "stop", func(ctx context.Context, _ func(Progress)) (any, error) {
			return struct{}{}, s.backend.Stop(ctx, req.Grace)
		})
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		s.write(w, http.StatusNotFound, line{Error: &errorBody{codeNotFound, fmt.Sprintf("no such request: %.20q %.80q", r.Method, r.URL.Path)}})
	})
	return mux
}

// decode reads the request's body, JSON or nothing, and answers itself when it is
// not what it should be.
func (s *server) decode(w http.ResponseWriter, r *http.Request, v any) bool {
	// A deadline for the body alone: one that went on would end the wait for the
	// client's going away, and so the stream of a long operation.
	rc := http.NewResponseController(w)
	_ = rc.SetReadDeadline(time.Now().Add(bodyTimeout))
	defer func() { _ = rc.SetReadDeadline(time.Time{}) }()
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	d.DisallowUnknownFields()
	err := d.Decode(v)
	if errors.Is(err, io.EOF) {
		return true // no body: all defaults
	}
	if err == nil {
		if _, err = d.Token(); errors.Is(err, io.EOF) {
			return true
		} else if err == nil {
			err = errors.New("something follows the JSON object")
		}
	}
	s.log.Warn("admin socket: bad request", "path", r.URL.Path, "error", err)
	s.fail(w, fmt.Errorf("%w: %w", ErrBadRequest, err))
	return false
}

func (s *server) answer(w http.ResponseWriter, v any, err error) {
	if err != nil {
		s.fail(w, err)
		return
	}
	s.write(w, http.StatusOK, v)
}

func (s *server) fail(w http.ResponseWriter, err error) {
	body := bodyOf(err)
	s.write(w, httpStatus(body.Code), line{Error: &body})
}

func httpStatus(code string) int {
	switch code {
	case codeBusy:
		return http.StatusConflict
	case codeForbidden:
		return http.StatusForbidden
	case codeEnding:
		return http.StatusServiceUnavailable
	case codeBadRequest:
		return http.StatusBadRequest
	}
	return http.StatusInternalServerError
}

func (s *server) write(w http.ResponseWriter, status int, v any) {
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(writeTimeout))
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(v); err != nil {
		s.log.Debug("admin socket: answer not delivered", "error", err)
	}
}
