package handoff

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// host is the supervisor's part in a program that is its own supervisor. The worker of
// its process speaks to it over a control channel as it would to a supervisor, so that a
// session is the same thing here and there. Everything below line belongs to its loop.
//
//	          no old process, or SETTLED,
//	          or the old one has died              Upgrade
//	joining --------------------------> leading <----------> upgrading --> retiring
//	   |  BEGIN                            ^        failed         new one is ready
//	   +-------> taking -------------------+
//	   |            |  the old one gave up on us
//	   +------------+------------------------------> orphaned
//
// Any of them ends with Serve's context; retiring and orphaned with the last session.
type host struct {
	*options
	flip   flip
	in     *inbox
	news   chan news
	done   chan struct{} // closed when the loop has ended
	front  *front
	vault  *vault
	worker *worker
	inc    uint32 // this process's number in the row of processes, from 1

	local *line // to this process's worker
	up    *line // to the old process, nil when there is none
	down  *line // to the new process, nil when there is none

	role       hostRole
	ended      bool     // the loop has ended; what was posted is only cleaned up
	ready      bool     // the worker takes sessions
	early      []func() // what waits for that
	revoked    *os.File // pipe from the old process; nil when it gave none
	inheriting bool     // the old process died, and what it had offered is ours
	retired    bool     // the worker was told to end with its last session
	parentGone bool
	count      uint32
	residents  map[uint64]*resident
	groups     map[string]*hostGroup
	resuming   map[string][]wire.Ref // RESUMEs from up of a group whose last part has not come
	complete   map[string]bool       // groups whose state the old process has offered
	giving     *giving               // upgrading, retiring
	stop       context.CancelFunc
}

type hostRole uint8

const (
	roleJoining   hostRole = iota // before the worker is ready
	roleTaking                    // sessions come from the old process
	roleLeading                   // no other process
	roleUpgrading                 // sessions go to a new process, which may still fail
	roleRetiring                  // the new process has taken over
	roleOrphaned                  // the old process goes on without us; we serve what is ours
	roleStopping
)

// resident is a session in this process.
type resident struct {
	id    uint64
	owner wire.Epoch // of the adoption by our worker
	owned bool       // RESUME was sent to our worker
	taken bool       // from the old process, which decides: not owned yet
	able  bool       // our worker has said ADOPTED to that
	group string
	unit  *unit // the attempt to move it
	// refusals of the new process; it is not asked for ever
	refusals int
}

func newHost(hd Handler, o *options, f flip, up *line, inc uint32) (*host, error) {
	mine, theirs, err := wire.Pair()
	if err != nil {
		return nil, err
	}
	h := &host{options: o, flip: f, in: newInbox(), news: make(chan news), done: make(chan struct{}),
		vault: newVault(), inc: inc, up: up, parentGone: !f.HasParent(),
		residents: map[uint64]*resident{}, groups: map[string]*hostGroup{}, resuming: map[string][]wire.Ref{}, complete: map[string]bool{}}
	if up != nil {
		if h.revoked, err = f.File(revokeName); err != nil {
			h.log.Warn("what the old process offers is lost if it is killed", "error", err)
		}
	}
	h.local = newLine(mine)
	h.front = newFront(h)
	h.worker = newWorker(context.Background(), theirs, hd, o)
	h.worker.vault = h.vault
	return h, nil
}

// call runs f in the loop and waits until f, or what it left it to, says done. Before
// Serve it waits for that.
func (h *host) call(f func(done func(error))) error {
	reply := make(chan error, 1)
	h.in.post(func() {
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
	case <-h.done:
		select {
		case err := <-reply:
			return err
		default:
			return ErrStopped
		}
	}
}

// hostTick is how often the time limits of an upgrade are looked at.
const hostTick = 50 * time.Millisecond

func (h *host) serve(ctx context.Context) error {
	if !h.front.begin() {
		return errors.New("Serve was called before")
	}
	wctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	h.stop = stop
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- h.worker.serve(wctx, nil) }()
	for _, l := range []*line{h.local, h.up} {
		if l != nil {
			go l.receive(h.news, h.done)
		}
	}
	if !h.parentGone {
		pctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		go func() {
			if err := h.flip.WaitForParent(pctx); !errors.Is(err, context.Canceled) {
				h.in.post(h.parentEnded)
			}
		}()
	}
	sig := make(chan os.Signal, 1)
	if len(h.embed.signals) > 0 {
		signal.Notify(sig, h.embed.signals...)
		defer signal.Stop(sig)
	}
	err := h.loop(ctx, sig, ended)
	h.cleanUp()
	return err
}

func (h *host) loop(ctx context.Context, sig <-chan os.Signal, ended <-chan error) error {
	ticker := time.NewTicker(hostTick)
	defer ticker.Stop()
	cancelled := ctx.Done()
	for {
		var tick <-chan time.Time
		if h.giving != nil {
			tick = ticker.C
		}
		select {
		case err := <-ended:
			return err
		case <-h.in.signal:
			for _, f := range h.in.take() {
				f()
			}
		case n := <-h.news:
			h.heard(n)
		case <-sig:
			h.upgradeBySignal()
		case now := <-tick:
			h.giving.ticked(now)
		case <-cancelled:
			cancelled = nil
			h.shutDown()
		}
	}
}

// cleanUp leaves nothing behind: no goroutine, no descriptor.
func (h *host) cleanUp() {
	h.ended = true
	close(h.done)
	h.front.close()
	if h.revoked != nil {
		_ = h.revoked.Close()
	}
	if h.giving != nil {
		h.giving.abandonAll()
	}
	for _, l := range []*line{h.local, h.up, h.down} {
		if l != nil {
			l.finish(flushTime)
		}
	}
	if h.giving == nil || !h.giving.settled {
		h.flip.Stop() // would kill a new process that has not yet taken over
	}
	for _, f := range h.in.take() {
		f()
	}
	h.endEarly()
}

// endEarly goes on with what waited for the worker, or for the end.
func (h *host) endEarly() {
	l := h.early
	h.early = nil
	for _, f := range l {
		f()
	}
}

// heard takes a message, or the end of a channel.
func (h *host) heard(n news) {
	var lost *wire.DescriptorsLostError
	var err error
	switch {
	case errors.As(n.err, &lost) && n.from == h.up:
		h.log.Error("sessions of the old process did not fit into this one", "error", n.err)
		h.refuse(lost.Message, n.err)
	case n.err != nil:
		err = n.err
	case n.from == h.local:
		err = h.fromWorker(n.m)
	case n.from == h.up:
		err = h.fromOld(n.m)
	case n.from == h.down:
		err = h.fromNew(n.m)
	default: // of a line that was closed meanwhile
		n.m.Dispose()
	}
	if err == nil {
		return
	}
	if n.m != nil {
		n.m.CloseSockets()
	}
	switch n.from {
	case h.up:
		h.oldLost(err)
	case h.down:
		h.newLost(err)
	case h.local:
		if h.role == roleStopping || h.retired {
			return // the worker ends
		}
		h.log.Error("the control channel inside of this process broke", "error", err) // Serve ends with the worker
	}
}

// fromWorker takes what the worker of this process says.
func (h *host) fromWorker(m *wire.Message) error {
	switch m.Type {
	case wire.TypeHello:
		h.local.put(&wire.Message{Type: wire.TypeWelcome, Welcome: &wire.Welcome{Version: wire.Version, Worker: 1,
			Pool: wire.Clip(h.name), Generation: h.inc, FreezeTimeout: h.embed.freezeTimeout.Milliseconds()}}, nil)
	case wire.TypeReady:
		h.ready = true
		h.workerReady()
		h.endEarly()
	case wire.TypeAdopted:
		h.adopted(m.Refs)
	case wire.TypeRefused:
		h.refusedHere(m.Refused)
	case wire.TypeParked:
		if h.giving == nil {
			m.Dispose()
			break
		}
		h.giving.parked(m)
	case wire.TypeClosed:
		h.closed(m.Closed)
	case wire.TypeGroup:
		h.joinsGroup(m.Refs[0], m.Group)
	default: // what only a supervisor can use
	}
	return nil
}

func (h *host) nextEpoch() wire.Epoch {
	h.count++
	return wire.NewEpoch(h.inc, h.count)
}

// shutDown ends the program's work, as its caller wants.
func (h *host) shutDown() {
	if h.role == roleStopping {
		return
	}
	g := h.giving
	switch {
	case g == nil:
	case h.role == roleUpgrading && g.began: // the new process has sessions: it takes over
		g.settle()
		g.thawAll()
	case h.role == roleUpgrading:
		g.fail(errors.New("this process was told to stop"))
	default:
		g.thawAll()
	}
	h.log.Info("stopping", "sessions", len(h.residents))
	h.role = roleStopping
	h.front.end()
	h.stop() // the worker's context: its sessions are told and have some seconds
}

// retire ends this process when its last session has gone.
func (h *host) retire() {
	h.retired = true
	h.local.put(&wire.Message{Type: wire.TypeStop, Drain: true}, nil)
}

func (h *host) upgradeBySignal() {
	reply := make(chan upgradeReply, 1)
	h.startUpgrade(reply, time.Now())
	go func() {
		select {
		case r := <-reply:
			if r.err != nil {
				h.log.Error("no upgrade: this process goes on", "lost", r.Lost, "error", r.err)
				return
			}
			h.log.Info("a new process has taken over", "pid", r.PID, "moved", r.Moved, "stayed", r.Stayed, "lost", r.Lost, "took", r.Took.Round(time.Millisecond))
		case <-h.done:
		}
	}()
}
