// Package handoff is the worker's side of ktlsvisor: a program that calls Serve
// gets established TLS sessions from a supervisor, serves each of them with a
// Handler, and gives them away, connection and all, when the supervisor wants to
// move them to another process. PROTOCOL.md describes the messages, for workers in
// other languages.
//
// A handler has to know one thing: when a Read returns ErrMoving, the session is
// about to move. It puts what it wants to keep into SetState and returns the error.
// In the new process the handler is started again, and State gives it back. Bytes
// that were received and not read, and bytes that were written and not sent, travel
// by themselves.
//
//	func echo(ctx context.Context, c *handoff.Conn) error {
//		_, err := io.Copy(c, c)
//		return err
//	}
//
//	func main() {
//		if err := handoff.Serve(context.Background(), handoff.HandlerFunc(echo)); err != nil {
//			log.Fatal(err)
//		}
//	}
package handoff

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/state"
)

// ErrMoving is returned by Read, JoinGroup and LeaveGroup, and by a Write that can
// take no more, when the session is to move. The handler calls SetState and returns
// it, wrapped or not.
var ErrMoving = errors.New("the session is moving to another process")

// ErrStopping is returned by Read when the worker was told to stop. Write still
// works, for a last word. errors.Is(err, context.Canceled) holds too.
var ErrStopping = fmt.Errorf("the worker is stopping: %w", context.Canceled)

// ErrNoSupervisor is returned by Serve in a process that no supervisor started.
var ErrNoSupervisor = errors.New("this program is a worker and no supervisor started it; " +
	"run it with: ktlsvisor run --listen ADDRESS -- PROGRAM")

// ErrSupervisorGone is returned by Serve when the supervisor's end of the control
// channel was closed, or could not be trusted any further, and the sessions that
// were left have ended.
var ErrSupervisorGone = errors.New("the supervisor is gone")

// MaxState is the largest application state that can travel with a session, in
// bytes: the protocol's limit of 16 MiB less room for buffers of the record layer.
const MaxState = wire.MaxCargo - 4<<20

// Handler serves one session until it ends or moves. Serve runs in its own
// goroutine; ctx ends when it returns, when the operator closes the session, and
// when the worker stops. When Serve returns
//   - an error that Is ErrMoving, the session moves, or, when the move was called
//     off meanwhile, Serve is called again in this process;
//   - anything else, the session is closed: close_notify, then shutdown.
//
// A panic closes the session and is logged; the process goes on.
type Handler interface {
	Serve(ctx context.Context, c *Conn) error
}

// HandlerFunc is a function as a Handler.
type HandlerFunc func(ctx context.Context, c *Conn) error

// Serve calls f.
func (f HandlerFunc) Serve(ctx context.Context, c *Conn) error { return f(ctx, c) }

// Groups keeps the state that the sessions of a group share. Its methods run while
// no handler of the group's members does, in goroutines of their own, one call for a
// group at a time. They should be quick: the members stand still.
type Groups interface {
	// FreezeGroup returns the state of a group that is about to move, at most
	// MaxState bytes, and forgets it: from now on the group does not live here,
	// unless AdoptGroup is called.
	FreezeGroup(name string) ([]byte, error)
	// AdoptGroup takes the state of a group that comes to live here, or that comes
	// back because its move failed. It replaces what there is of the group. It may
	// be called for a group whose members then do not come.
	AdoptGroup(name string, blob []byte) error
}

type options struct {
	schemas []state.Info
	groups  Groups
	log     hclog.Logger
	name    string
	ready   func(context.Context) error
	health  func(context.Context) error

	restAfter time.Duration
	commit    commitMode

	embed upgraderOptions
}

// Option changes how Serve works.
type Option func(*options)

// WithSchemas announces the state schemas that this program writes and restores. An
// upgrade to a program that cannot restore what this one writes is refused before
// any session is touched.
func WithSchemas(s ...state.Info) Option {
	return func(o *options) { o.schemas = append(o.schemas, s...) }
}

// WithGroups makes groups of sessions move with a state of their own.
func WithGroups(g Groups) Option { return func(o *options) { o.groups = g } }

// WithLogger sets the logger; without it hclog.Default is used.
func WithLogger(l hclog.Logger) Option { return func(o *options) { o.log = l } }

// WithName sets the name and version that the supervisor shows, at most 512 bytes.
// Without it that is the file name of the program.
func WithName(name string) Option { return func(o *options) { o.name = name } }

// WithReady runs f before the worker says that it takes sessions. An error of f ends
// Serve.
func WithReady(f func(context.Context) error) Option { return func(o *options) { o.ready = f } }

// WithRest saves memory where most sessions are idle most of the time. When a handler
// has waited for input in Read for d, Read returns ErrMoving, as if the session were to
// move, and the handler returns that. It is started again, in this process, as soon as
// there is input or the connection ended; State and Restored are as after a move. A
// session at rest has neither a goroutine nor a buffer.
//
// Sessions of a group, sessions with a read deadline and handlers that hold (Hold) get
// no rest. It is not for handlers that do other things than to answer input, because
// nothing runs while a session rests. Other goroutines of the program may Write to a
// Conn at rest. They should not count on more: JoinGroup gives net.ErrClosed, a read
// deadline lasts until the handler is started again only, and a Close in the moment in
// which the handler returns for its rest may count for that return (see Close).
func WithRest(d time.Duration) Option { return func(o *options) { o.restAfter = d } }

func newOptions(opts []Option) *options {
	o := &options{name: filepath.Base(os.Args[0])}
	for _, f := range opts {
		f(o)
	}
	if o.log == nil {
		o.log = hclog.Default().Named("handoff")
	}
	return o
}

// hello is what the worker says about itself.
func (o *options) hello() *wire.Hello {
	h := &wire.Hello{Min: wire.Version, Max: wire.Version, PID: os.Getpid(), Name: wire.Clip(o.name), Rekey: true, Able: wire.AbleMarks | wire.AbleSockets | wire.AbleArena}
	for _, s := range o.schemas {
		h.Schemas = append(h.Schemas, wire.Schema{Name: s.Name, Writes: s.Writes, Restores: s.Restores})
	}
	return h
}
