package handoff

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/cloudflare/tableflip"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// Errors of Upgrader, for errors.Is.
var (
	// ErrUpgrading is an Upgrade during another one.
	ErrUpgrading = errors.New("an upgrade is in progress")
	// ErrPredecessor is an Upgrade while the process before this one still serves
	// sessions. There are never three generations.
	ErrPredecessor = errors.New("the process before this one still serves sessions; " +
		"wait for its end, or bound its time with WithDrainLimit")
	// ErrReplaced is an Upgrade in a process that has been replaced.
	ErrReplaced = errors.New("this process has been replaced by a new one")
	// ErrStopped is a call of an Upgrader that serves no more, or not yet.
	ErrStopped = errors.New("the program is not serving")
	// ErrRefusedState is a new program that cannot restore the state that this one
	// writes. Nothing was moved.
	ErrRefusedState = errors.New("the new program cannot restore the state of the sessions")
)

// Upgrader is for a program that is its own supervisor: it listens, makes sessions and
// serves them with a Handler, the same that Serve takes. Upgrade starts the program
// anew, from the file it was started from, and listeners and sessions go to the new
// process while clients go on as if nothing were.
//
//	u, err := handoff.NewUpgrader(handler, handoff.WithUpgradeOn(syscall.SIGHUP))
//	...
//	_, err = u.Listen("tcp", ":443", &ktls.Config{TLS: conf})
//	...
//	err = u.Serve(ctx)
//
// What holds: a session has one owner at any time, and every byte arrives once. Nothing
// is given away before the new process has said that it can restore what this one
// writes, and a session is kept here until the new process has it. A new process that
// fails to start, refuses, or dies in the middle leaves here all that it had not been
// given; this process goes on and can try again.
//
// What one process cannot give, and the supervisor does: the sessions of a process that
// is killed, or crashes, are lost with it, because nobody else holds them. A new process
// that dies takes along those that were its own by then. While an old process still
// serves sessions that reach no safe point there is no further upgrade.
//
// Keys of sessions in the kernel layer change without anybody else: this process has
// the traffic secrets of its own sessions, in memory, and hands them on with a session.
//
// There can be one Upgrader in a process. It uses tableflip, which keeps descriptors 3
// and 4 of a new process to itself until NewUpgrader was called.
type Upgrader struct{ h *host }

// Upgraded says what an upgrade did with the sessions.
type Upgraded struct {
	PID    int           // of the new process; 0 when it never said
	Moved  int           // to the new process
	Stayed int           // still here; they may move later, until Serve returns
	Lost   int           // the new process died with these, or may have
	Took   time.Duration // from the new process's start to its taking over
	Moving time.Duration // of it, from the new process's being ready to the last session's commit
}

// upgraderOptions are those of Upgrader alone; Serve ignores them.
type upgraderOptions struct {
	pidFile       string
	signals       []os.Signal
	drainLimit    time.Duration
	freezeTimeout time.Duration
	moveTime      time.Duration
	startTime     time.Duration
	answerTime    time.Duration // of the new process to an ADOPT; tests have less patience
}

// WithPIDFile has the pid of the process in charge written to a file, and changed when
// a new process has taken over. For Upgrader.
func WithPIDFile(path string) Option { return func(o *options) { o.embed.pidFile = path } }

// WithUpgradeOn makes Serve call Upgrade on a signal, SIGHUP for instance, and log what
// came of it. For Upgrader.
func WithUpgradeOn(sig ...os.Signal) Option { return func(o *options) { o.embed.signals = sig } }

// WithDrainLimit bounds how long an old process goes on with sessions that reach no
// safe point: then they are closed (close_notify), and it ends. Without a limit they
// may stay as long as they want, and no further upgrade is possible meanwhile. For
// Upgrader.
func WithDrainLimit(d time.Duration) Option { return func(o *options) { o.embed.drainLimit = d } }

// WithMoveTime says how long a new process waits, at most, for sessions to reach a safe
// point before it takes over; what has not moved by then moves when it can. Default
// 10 s. For Upgrader.
func WithMoveTime(d time.Duration) Option { return func(o *options) { o.embed.moveTime = d } }

// WithFreezeTimeout says how long a handler may take to its safe point in one attempt
// to move its session, default 5 s. For Upgrader.
func WithFreezeTimeout(d time.Duration) Option {
	return func(o *options) { o.embed.freezeTimeout = d }
}

// WithStartTime bounds the start of a new process, up to its call of Serve and the
// return of WithReady's function; then it is killed. Default 1 min. For Upgrader.
func WithStartTime(d time.Duration) Option { return func(o *options) { o.embed.startTime = d } }

func (o *upgraderOptions) defaults() {
	for _, d := range []struct {
		v   *time.Duration
		def time.Duration
	}{{&o.freezeTimeout, 5 * time.Second}, {&o.moveTime, 10 * time.Second}, {&o.startTime, time.Minute}, {&o.answerTime, 20 * time.Second}} {
		if *d.v <= 0 {
			*d.v = d.def
		}
	}
}

// NewUpgrader makes the Upgrader of this process. In a process that an Upgrade started
// it speaks to the old one first: an error then says that the old one goes on, and the
// program should end. Serve must follow.
func NewUpgrader(h Handler, opts ...Option) (*Upgrader, error) {
	o := newOptions(opts)
	o.embed.defaults()
	f, err := tableflip.New(tableflip.Options{
		PIDFile: o.embed.pidFile,
		// How long a start may take is bounded here, see startLimit: tableflip would kill
		// a new process that is ready but still taking sessions over.
		UpgradeTimeout: 365 * 24 * time.Hour,
	})
	if err != nil {
		return nil, fmt.Errorf("start for an upgrade: %w", err)
	}
	// A child that uses tableflip itself would take its descriptors 3 and 4 for ours.
	_ = os.Unsetenv("TABLEFLIP_HAS_PARENT_7DIU3")
	return newUpgrader(h, o, realFlip{f})
}

func newUpgrader(h Handler, o *options, f flip) (*Upgrader, error) {
	up, inc, err := joinOld(o, f)
	if err != nil {
		return nil, err
	}
	host, err := newHost(h, o, f, up, inc)
	if err != nil {
		return nil, err
	}
	return &Upgrader{h: host}, nil
}

// Listen listens on a TCP address, or takes over the listener of the old process that
// has the same network and address, as they are written. Sessions are accepted once
// Serve runs and the old process has stopped to. cfg is used for all of them; its
// OnHandshakeError too. Session tickets that the old process gave out are good in the new
// one only if both set the same keys (tls.Config.SetSessionTicketKeys); otherwise such a
// client makes a full handshake.
func (u *Upgrader) Listen(network, addr string, cfg *ktls.Config) (net.Addr, error) {
	if cfg == nil || cfg.TLS == nil {
		return nil, fmt.Errorf("listen on %s: no TLS configuration", addr)
	}
	return u.h.front.listen(network, addr, cfg)
}

// Fds gives access to what tableflip passes on besides, for a program that has other
// listeners or files to keep. It must be used before Serve.
func (u *Upgrader) Fds() *tableflip.Fds { return u.h.flip.fds() }

type realFlip struct{ *tableflip.Upgrader }

func (f realFlip) fds() *tableflip.Fds { return f.Fds }

// Adopt serves an established session, of either role, with the Handler, and moves it
// in upgrades as any other. state is what Conn.State gives at first: by it a handler can
// tell sessions apart that this program began. conn is not the caller's any more, also
// on an error, which closes it. It fails when the program is not, or no more, serving.
func (u *Upgrader) Adopt(conn *ktls.Conn, state []byte) error {
	a, err := newArrival(conn, state)
	if err != nil {
		_ = conn.Close()
		return err
	}
	err = u.h.call(func(done func(error)) { u.h.admit(a, done) })
	if err != nil {
		a.drop()
	}
	return err
}

// Dial connects as a TLS client and serves that session with the Handler; see Adopt.
func (u *Upgrader) Dial(ctx context.Context, network, addr string, cfg *ktls.Config, state []byte) error {
	c, err := (&ktls.Dialer{Config: cfg}).DialContext(ctx, network, addr)
	if err != nil {
		return err
	}
	conn, ok := c.(*ktls.Conn)
	if !ok {
		_ = c.Close()
		return fmt.Errorf("dial %s: no session", addr)
	}
	return u.Adopt(conn, state)
}

// Serve serves sessions until ctx ends, or until a new process has taken over and the
// last session of this one has moved or ended; both are nil. When ctx ends, handlers are
// told (ErrStopping) and have some seconds; in the middle of an upgrade the new process
// lives on. Afterwards the program should end: only its end lets the new process be
// upgraded in turn.
func (u *Upgrader) Serve(ctx context.Context) error { return u.h.serve(ctx) }

// Upgrade starts the program anew and moves everything to the new process. It returns
// when that has taken over, or with an error when this process goes on, which it then
// does with all sessions but the Lost ones. Of sessions that reach no safe point in
// time, see WithMoveTime, the report tells; it says nothing of those in handshakes.
func (u *Upgrader) Upgrade() (Upgraded, error) {
	reply := make(chan upgradeReply, 1)
	if err := u.h.call(func(done func(error)) { u.h.startUpgrade(reply, time.Now()); done(nil) }); err != nil {
		return Upgraded{}, err
	}
	select {
	case r := <-reply:
		return r.Upgraded, r.err
	case <-u.h.done:
		select {
		case r := <-reply:
			return r.Upgraded, r.err
		default:
			return Upgraded{}, ErrStopped
		}
	}
}

type upgradeReply struct {
	Upgraded
	err error
}

// flip is what is needed of a *tableflip.Upgrader; tests have two of them in a process.
type flip interface {
	ListenWithCallback(network, addr string, f func(network, addr string) (net.Listener, error)) (net.Listener, error)
	AddFile(name string, f *os.File) error
	File(name string) (*os.File, error)
	Upgrade() error
	Ready() error
	Stop()
	HasParent() bool
	WaitForParent(ctx context.Context) error
	fds() *tableflip.Fds
}

// channelName is what a new process finds its channel with the old one by.
const channelName = "ktlsvisor"

// joinOld says hello to the old process, if there is one, and waits for its word: a new
// program that cannot go on with the old one's sessions must not touch anything.
func joinOld(o *options, f flip) (up *line, inc uint32, err error) {
	if !f.HasParent() {
		return nil, 1, nil
	}
	file, err := f.File(channelName)
	if err != nil {
		return nil, 0, fmt.Errorf("channel with the old process: %w", err)
	}
	if file == nil { // it moves no sessions; listeners are inherited all the same
		o.log.Warn("the process before this one moves no sessions: they end with it")
		return nil, 1, nil
	}
	fd, err := dupFile(file)
	_ = file.Close()
	if err != nil {
		return nil, 0, fmt.Errorf("channel with the old process: %w", err)
	}
	ch, err := wire.NewChannel(fd)
	if err != nil {
		return nil, 0, err
	}
	m, err := func() (*wire.Message, error) {
		limit := time.Now().Add(joinTime)
		if err := errors.Join(ch.Conn().SetReadDeadline(limit), ch.Conn().SetWriteDeadline(limit)); err != nil {
			return nil, err
		}
		if err := ch.Send(&wire.Message{Type: wire.TypeHello, Hello: o.hello()}); err != nil {
			return nil, err
		}
		return ch.Recv()
	}()
	switch {
	case err != nil:
	case m.Type == wire.TypeStop:
		err = errors.New(m.Text)
	case m.Type != wire.TypeWelcome || m.Welcome.Version != wire.Version || m.Welcome.Generation < 2:
		m.CloseSockets()
		err = fmt.Errorf("%w: %s instead of a welcome", wire.ErrProtocol, m.Type)
	default:
		err = errors.Join(ch.Conn().SetReadDeadline(time.Time{}), ch.Conn().SetWriteDeadline(time.Time{}))
	}
	if err != nil {
		_ = ch.Close()
		return nil, 0, fmt.Errorf("the old process goes on, it did not accept this one: %w", err)
	}
	return newLine(ch), m.Welcome.Generation, nil
}

// joinTime bounds the old process's answer to HELLO.
const joinTime = 30 * time.Second
