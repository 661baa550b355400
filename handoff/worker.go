package handoff

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// stopTime is how long sessions have when Serve's context ends.
const stopTime = 5 * time.Second

// flushTime bounds the sending of the last messages, and the wait for handlers that
// are on their way out.
const flushTime = 5 * time.Second

// worker is one process' side of the control channel. Its loop owns the table of
// sessions and everything in it; handlers, the receiver and whatever takes time run
// in goroutines that post to the loop.
type worker struct {
	*options
	handler Handler
	ch      *wire.Channel
	in      *inbox
	out     *outbox
	done    chan struct{} // closed when the loop has ended

	arenaFull atomic.Bool   // said once
	roomy     atomic.Uint32 // goes up when the arena has places for sessions without one
	exposed   uint64        // sessions without one, when they were last counted; for the loop
	private   lazyArena     // for commits without the supervisor's arena

	ticks atomic.Uint32 // of the clock by which sessions get a rest

	vault *vault // secrets of sessions in the kernel layer; nil: the supervisor has them

	base   context.Context // of all handlers
	cancel context.CancelFunc

	// What follows belongs to the loop.
	welcome       *wire.Welcome
	arena         *ktls.Arena // for journals; nil: none are kept
	checkpoints   uint64      // of groups, so far
	checkpointing map[uint64]*groupCheckpoint
	rest          *rest // nil: sessions get none
	sessions      map[uint64]*session
	tombs         map[uint64]wire.Closed
	batches       map[string]*batch
	resuming      map[string][]wire.Ref // RESUMEs of a group whose last part has not come
	going         gathering             // PARKEDs that wait for others
	handlers      int                   // that run
	bare          bool                  // nobody else has a duplicate of the sockets
	marks         *marks                // nil: nobody wants to know
	checking      time.Time             // since when the health check runs; zero: it does not
	gone          error                 // why there is no supervisor any more
	failed        error                 // why Serve ends early
	draining      bool
	stopping      bool
	forced        bool      // the time of stopping is over
	deadline      time.Time // of stopping
}

// Serve is a worker's main: it takes the control channel that the supervisor left in
// the environment, says hello and serves sessions with h until the supervisor
// retires the worker or ctx ends; both are a clean end, and nil. It returns
// ErrNoSupervisor outside of ktlsvisor, and ErrSupervisorGone when the supervisor
// was lost and the last session has ended: while a supervisor restarts the sessions
// are served on and Serve does not return.
//
// The supervisor manages its workers, so SIGINT (a terminal's Ctrl-C reaches every
// process) and SIGTERM are noted and ignored while Serve runs.
func Serve(ctx context.Context, h Handler, opts ...Option) error {
	o := newOptions(opts)
	fd, err := inheritedFD()
	if err != nil {
		return err
	}
	ch, err := wire.NewChannel(fd)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNoSupervisor, err)
	}
	sig := make(chan os.Signal, 4)
	signal.Notify(sig, syscall.SIGINT, syscall.SIGTERM)
	defer signal.Stop(sig)
	return newWorker(ctx, ch, h, o).serve(ctx, sig)
}

// inheritedFD takes the control channel's descriptor out of the environment, so that
// no child of this process takes it for its own.
func inheritedFD() (int, error) {
	v, ok := os.LookupEnv(wire.EnvFD)
	if !ok {
		return -1, ErrNoSupervisor
	}
	if err := os.Unsetenv(wire.EnvFD); err != nil {
		return -1, err
	}
	fd, err := strconv.Atoi(v)
	if err != nil || fd < 3 || !sys.IsSeqpacket(fd) {
		return -1, fmt.Errorf("%w (%s=%q is no control channel)", ErrNoSupervisor, wire.EnvFD, v)
	}
	return fd, nil
}

func newWorker(ctx context.Context, ch *wire.Channel, h Handler, o *options) *worker {
	w := &worker{options: o, handler: h, ch: ch, in: newInbox(), done: make(chan struct{}),
		sessions: map[uint64]*session{}, tombs: map[uint64]wire.Closed{},
		batches: map[string]*batch{}, resuming: map[string][]wire.Ref{}}
	w.base, w.cancel = context.WithCancel(context.WithoutCancel(ctx))
	w.out = newOutbox(ch, func(m *wire.Message, err error) { w.in.post(func() { w.notSent(m, err) }) })
	return w
}

// call runs f in the loop and waits until f, or something that f left it to, says
// done.
func (w *worker) call(ctx context.Context, f func(done func(error))) error {
	reply := make(chan error, 1)
	w.in.post(func() {
		f(func(err error) {
			select {
			case reply <- err:
			default:
			}
		})
	})
	select {
	case err := <-reply:
		return err
	case <-ctx.Done():
		return ctx.Err()
	case <-w.done:
		return ErrSupervisorGone
	}
}

func (w *worker) serve(ctx context.Context, sig <-chan os.Signal) error {
	defer w.cancel()
	msgs := make(chan *wire.Message)
	recvDone := make(chan struct{})
	go func() {
		defer close(recvDone)
		w.receive(msgs)
	}()
	go w.out.run()
	w.send(&wire.Message{Type: wire.TypeHello, Hello: w.hello()})

	w.loop(ctx, msgs, sig)

	close(w.done)
	w.cancel()
	// The last messages, CLOSED above all, go out even if the supervisor is just
	// restarting: the channel holds them.
	w.out.close()
	_ = w.ch.SetWriteDeadline(time.Now().Add(flushTime))
	if w.gone != nil {
		_ = w.ch.Close()
	}
	<-w.out.sent
	_ = w.ch.Close()
	<-recvDone
	w.awaitHandlers()
	switch {
	case w.failed != nil:
		return w.failed
	case w.gone != nil && !w.draining && !w.stopping:
		return w.gone
	}
	return nil
}

// receive passes messages on until the channel ends.
func (w *worker) receive(msgs chan<- *wire.Message) {
	for {
		m, err := w.ch.Recv()
		var lost *wire.DescriptorsLostError
		if errors.As(err, &lost) {
			w.in.post(func() { w.descriptorsLost(lost.Message, err) })
			continue
		}
		if errors.Is(err, os.ErrClosed) {
			return // our own doing
		}
		if err != nil {
			w.in.post(func() { w.lost(err) })
			return
		}
		select {
		case msgs <- m:
		case <-w.done:
			m.Dispose()
			return
		}
	}
}

func (w *worker) loop(ctx context.Context, msgs <-chan *wire.Message, sig <-chan os.Signal) {
	ended := ctx.Done()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	timer.Stop()
	restTick, endRest := w.startRest()
	defer endRest()
	trim := time.NewTicker(arenaTrim)
	defer trim.Stop()
	for !w.finished() {
		select {
		case <-w.in.signal:
			for _, f := range w.in.take() {
				f()
			}
		case m := <-msgs:
			if err := w.handle(m); err != nil {
				m.CloseSockets()
				w.lost(err)
			}
			m.Handled()
		case s := <-sig:
			w.log.Info("signal ignored: the supervisor manages its workers; use ktlsvisor stop", "signal", s)
		case <-ended:
			ended = nil
			w.stop(stopTime)
		case <-trim.C:
			w.trimArena()
			w.countExposed()
		case <-restTick:
			w.restIdle()
		case <-timer.C:
			w.stopNow()
		case <-w.going.due():
			w.going.set = false
			w.sendParked()
		}
		if w.stopping && !w.deadline.IsZero() {
			timer.Reset(time.Until(w.deadline))
		}
	}
	for _, s := range w.sessions {
		if s.kept != nil {
			s.kept.drop()
		}
	}
}

// finished reports that Serve is to return.
func (w *worker) finished() bool {
	if w.failed != nil {
		return true
	}
	return len(w.sessions) == 0 && (w.gone != nil || w.draining || w.stopping)
}

// awaitHandlers waits for handlers whose session has ended, within limits: one that
// ignores its context must not keep the process.
func (w *worker) awaitHandlers() {
	limit := time.NewTimer(flushTime)
	defer limit.Stop()
	for {
		for _, f := range w.in.take() {
			f()
		}
		if w.handlers == 0 {
			return
		}
		select {
		case <-w.in.signal:
		case <-limit.C:
			w.log.Warn("handlers did not return although their sessions have ended", "handlers", w.handlers)
			return
		}
	}
}

func (w *worker) send(m *wire.Message) {
	if w.gone != nil {
		m.CloseSockets()
		return
	}
	if len(w.going.items) > 0 {
		w.sendParked()
	}
	if err := w.out.put(m); err != nil {
		m.CloseSockets()
		w.keep(m)
		w.lost(fmt.Errorf("%w: %w", wire.ErrProtocol, err))
	}
}

// lost notes the end of the control channel: nothing can move any more. What this
// process owns it serves on; what it does not, it lets go.
func (w *worker) lost(err error) {
	if w.gone != nil {
		return
	}
	if errors.Is(err, io.EOF) {
		w.log.Info("the supervisor closed the control channel; serving the sessions that are left", "sessions", len(w.sessions))
	} else {
		w.log.Error("control channel closed; serving the sessions that are left", "sessions", len(w.sessions), "error", err)
	}
	w.gone = fmt.Errorf("%w: %w", ErrSupervisorGone, err)
	_ = w.ch.Close()
	w.tombs = map[uint64]wire.Closed{}
	for _, m := range w.out.abandon() {
		w.keep(m)
	}
	w.keepParked()
	w.dropCheckpoints()
	w.orphan()
}

// keep notes that a PARKED did not leave: nobody else has its sessions.
func (w *worker) keep(m *wire.Message) {
	for i := range m.Items {
		if s := w.sessions[m.Items[i].ID]; s != nil && s.sent == m.Items[i].Epoch {
			s.sent = 0
		}
	}
}

// notSent deals with a message that could not be sent. Only PARKED can fail without
// the channel being at its end: for want of a memory file.
func (w *worker) notSent(m *wire.Message, err error) {
	if m.Type != wire.TypeParked || errors.Is(err, sys.EPIPE) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, os.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
		w.lost(err)
		return
	}
	w.out.heard(m)
	w.log.Error("sessions stay here: their state could not be sent", "sessions", len(m.Items), "error", err)
	for i := range m.Items {
		if s := w.sessions[m.Items[i].ID]; s != nil && s.attempt == m.Items[i].Epoch {
			w.giveUp(s)
		}
	}
}
