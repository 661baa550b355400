package handoff

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/state"
)

// giving is an upgrade as the old process sees it.
//
//	old process                      new process, started by tableflip
//	     | <--- HELLO ---------------------- |  NewUpgrader
//	     | ---- WELCOME, or STOP ----------> |  STOP: its state is of no use to it
//	     | <--- READY ---------------------- |  Serve
//	     |  stops accepting                  |
//	     | ---- BEGIN ---------------------> |  accepts
//	     | ---- KEYS, ADOPT ---------------> |  per session, in batches
//	     | <--- ADOPTED -------------------- |
//	     | ---- RESUME, PING --------------> |  the session is the new one's: commit
//	     | <--- PONG ----------------------- |  the old one closes its copy
//	     |  …                                |
//	     | ---- SETTLED -------------------> |  tableflip's Ready: no way back from here
//	     |  drains                           |
//
// Until SETTLED the new process may die and this one goes on, with upgrades too. tableflip
// tells of its death after it was waited for: then this process reads from its own
// duplicate of the channel's far end what the dead one had not read. A RESUME found there
// was never carried out, and the session goes on here.
type giving struct {
	h       *host
	reply   chan upgradeReply
	started time.Time
	pid     int
	down    *line
	far     *wire.Channel // duplicate of the new process's end, until it has taken over
	revoke  *os.File      // pipe to the new process; see revokeOffers
	inode   uint64        // of that end, by which the new process is found
	why     error         // the reason of a refusal of ours

	began      bool // READY came
	moving     time.Duration
	paused     chan struct{}
	begun      time.Time
	killAt     time.Time
	queue      []uint64
	later      map[uint64]time.Time // sessions without a safe point, and when they are asked again
	units      map[*unit]struct{}
	inFlight   int // sessions
	unread     map[uint64]*unconfirmed
	settled    bool
	wasQuiet   bool
	over       bool // this process was told to end with its last session
	broken     bool // nothing more can be given
	drainUntil time.Time
	moved      int
	lost       int
}

// unconfirmed are sessions whose RESUME was sent and is not known to have been read.
type unconfirmed struct {
	units  []*unit
	ids    []wire.Ref
	unsent atomic.Bool
}

const (
	giveWindow  = 128         // sessions on their way at a time
	retryMove   = time.Second // until a session without a safe point is asked again
	maxRefusals = 3
)

// startUpgrade begins an upgrade, or answers why not. asked is when it was asked for.
func (h *host) startUpgrade(reply chan upgradeReply, asked time.Time) {
	var err error
	switch {
	case h.ended:
		reply <- upgradeReply{err: ErrStopped}
		return
	case h.role == roleLeading && !h.parentGone && time.Since(asked) < h.parentPatience():
		time.AfterFunc(hostTick, func() { h.in.post(func() { h.startUpgrade(reply, asked) }) })
		return
	case h.role == roleUpgrading:
		err = ErrUpgrading
	case h.role == roleRetiring:
		err = ErrReplaced
	case h.role != roleLeading:
		err = ErrStopped
	case !h.parentGone:
		err = ErrPredecessor
	}
	g := &giving{h: h, reply: reply, started: time.Now(), paused: make(chan struct{}), later: map[uint64]time.Time{},
		units: map[*unit]struct{}{}, unread: map[uint64]*unconfirmed{}}
	if err == nil {
		err = g.open()
	}
	if err != nil {
		reply <- upgradeReply{err: err}
		return
	}
	h.role, h.giving = roleUpgrading, g
	g.killAt = g.started.Add(h.embed.startTime)
	h.log.Info("starting a new process", "sessions", len(h.residents))
	go h.down.receive(h.news, h.done)
	go func() {
		err := h.flip.Upgrade()
		h.in.post(func() { g.flipped(err) })
	}()
}

// parentPatience is how long an Upgrade waits for the old process's end. Once it has
// closed its channel it is about to end.
func (h *host) parentPatience() time.Duration {
	if h.up == nil {
		return parentTime
	}
	return parentTime / 4
}

// open makes the channel that the new process inherits.
func (g *giving) open() error {
	a, b, err := sys.PacketPair()
	if err != nil {
		return err
	}
	near, err := wire.NewChannel(a)
	if err != nil {
		sys.CloseAll([]int{b})
		return err
	}
	dup, err := sys.Dup(b)
	end := os.NewFile(uintptr(b), channelName)
	defer func() { _ = end.Close() }()
	if err == nil {
		g.far, err = wire.NewChannel(dup)
	}
	if err == nil {
		g.inode, err = sys.Inode(b)
	}
	if err == nil {
		err = g.h.flip.AddFile(channelName, end)
	}
	if err == nil {
		err = g.openRevoke()
	}
	if err != nil {
		_ = near.Close()
		g.closeFar()
		return fmt.Errorf("channel with a new process: %w", err)
	}
	g.down = newLine(near)
	g.h.down = g.down
	return nil
}

// closeFar closes what is only for the time before the new process has taken over.
func (g *giving) closeFar() {
	if g.far != nil {
		_ = g.far.Close()
		g.far = nil
	}
}

// revokeName is what a new process finds the pipe of revokeOffers by.
const revokeName = "ktlsvisor-revoked"

func (g *giving) openRevoke() error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }()
	if err := g.h.flip.AddFile(revokeName, r); err != nil {
		_ = w.Close()
		return err
	}
	g.revoke = w
	return nil
}

// revokeOffers comes before anything is done with a session that was offered and stays
// here after all. When this process is killed, the new one goes on with what it was
// offered, because nobody else can; but not if there is a byte in this pipe: a record
// state that has been used again would repeat record numbers (I5). A pipe takes it at
// once, and it is there when this process is dead.
func (g *giving) revokeOffers() {
	if g.revoke != nil {
		if _, err := g.revoke.Write([]byte{1}); err != nil { // the new process is gone
			g.h.log.Debug("offers revoked", "error", err)
		}
		_ = g.revoke.Close()
		g.revoke = nil
	}
}

// fromNew takes what the new process says.
func (h *host) fromNew(m *wire.Message) error {
	g := h.giving
	switch m.Type {
	case wire.TypeHello:
		g.hello(m.Hello)
	case wire.TypeReady:
		return g.newReady()
	case wire.TypeAdopted:
		g.offered(m.Refs)
	case wire.TypeRefused:
		g.refused(m.Refused)
	case wire.TypePong:
		g.confirmed(m.Nonce)
	case wire.TypeGroup:
		g.asksForGroup(m.Refs[0], m.Group)
	default:
		return fmt.Errorf("%w: %s from a new process", wire.ErrProtocol, m.Type)
	}
	return nil
}

func (g *giving) hello(m *wire.Hello) {
	h := g.h
	g.pid = m.PID
	mine := h.hello()
	var older, newer []state.Info
	for _, s := range mine.Schemas {
		older = append(older, state.Info{Name: s.Name, Writes: s.Writes, Restores: s.Restores})
	}
	for _, s := range m.Schemas {
		newer = append(newer, state.Info{Name: s.Name, Writes: s.Writes, Restores: s.Restores})
	}
	var err error
	if wire.Version < m.Min || wire.Version > m.Max {
		err = fmt.Errorf("it speaks versions %d to %d of the protocol, this process %d", m.Min, m.Max, wire.Version)
	} else if err = state.Compatible(older, newer); err != nil {
		err = fmt.Errorf("%w: %w", ErrRefusedState, err)
	}
	if err != nil {
		g.why = err
		g.down.put(&wire.Message{Type: wire.TypeStop, Text: wire.Clip(err.Error())}, nil)
		return
	}
	g.down.put(&wire.Message{Type: wire.TypeWelcome, Welcome: &wire.Welcome{Version: wire.Version, Worker: 1,
		Pool: wire.Clip(h.name), Generation: h.inc + 1, FreezeTimeout: h.embed.freezeTimeout.Milliseconds()}}, nil)
}

// newReady stops accepting and begins to move.
func (g *giving) newReady() error {
	if g.began || g.why != nil || g.pid == 0 {
		return fmt.Errorf("%w: READY out of turn", wire.ErrProtocol)
	}
	g.began, g.killAt, g.begun = true, time.Time{}, time.Now()
	go func() {
		g.h.front.pause()
		close(g.paused)
		g.h.in.post(func() {
			g.down.put(&wire.Message{Type: wire.TypeBegin}, nil)
		})
	}()
	for id, r := range g.h.residents {
		if r.owned {
			g.queue = append(g.queue, id)
		}
	}
	g.pump()
	return nil
}

var errNoAnswer = errors.New("the new process does not answer")

// flipped is tableflip's word on the new process: nil when it has taken over, else it is
// dead.
func (g *giving) flipped(err error) {
	h := g.h
	if h.ended || h.giving != g {
		return
	}
	if err != nil {
		g.fail(err)
		return
	}
	g.closeFar()
	stayed := 0
	for _, r := range h.residents {
		if r.owned {
			stayed++
		}
	}
	g.answer(upgradeReply{Upgraded: Upgraded{PID: g.pid, Moved: g.moved, Stayed: stayed, Lost: g.lost, Took: time.Since(g.started), Moving: g.moving}})
	if !g.began { // a program without an Upgrader took the listeners over
		h.log.Warn("the new process takes no sessions; they are served here until they end", "sessions", len(h.residents))
		g.began, g.broken, g.settled = true, true, true
		go func() {
			h.front.pause()
			close(g.paused)
		}()
	}
	go func() {
		<-g.paused
		h.front.closeListeners()
	}()
	if h.role == roleStopping {
		return
	}
	h.role = roleRetiring
	if d := h.embed.drainLimit; d > 0 {
		g.drainUntil = time.Now().Add(d)
	}
	g.pump()
}

func (g *giving) answer(r upgradeReply) {
	select {
	case g.reply <- r:
	default: // answered before
	}
}

// fail ends an upgrade whose new process is dead: everything that it had not been given
// goes on here.
func (g *giving) fail(err error) {
	h := g.h
	if g.why != nil {
		err = fmt.Errorf("%w (%w)", g.why, err)
	}
	g.resolve()
	g.thawAll()
	g.closeFar()
	g.down.sever()
	g.revokeOffers()
	h.down, h.giving = nil, nil
	h.forgetHomes()
	// What it had been given died with it.
	g.answer(upgradeReply{Upgraded: Upgraded{PID: g.pid, Stayed: len(h.residents), Lost: g.moved + g.lost, Took: time.Since(g.started)},
		err: fmt.Errorf("the new process failed, this one goes on: %w", err)})
	if h.role != roleUpgrading {
		return
	}
	h.role = roleLeading
	g.reopen()
	go runtime.GC() // to which tableflip leaves the closing of what it had opened for a process that failed
}

// newLost is the end of the channel with the new process, or of trust in it. Whether it
// lives is another question, to which only tableflip has the answer.
func (h *host) newLost(err error) {
	g := h.giving
	if g == nil || g.broken {
		return
	}
	g.broken = true
	if h.role == roleRetiring {
		h.log.Info("no further session moves: the new process closed the channel", "sessions", len(h.residents), "error", err)
	} else {
		h.log.Error("the new process cannot be trusted; what it was not given stays here", "error", err)
		if g.why == nil {
			g.why = err
		}
		if g.moved == 0 && len(g.unread) == 0 { // nothing can be lost with it
			killHolder(g.inode, h.log)
		}
	}
	g.thawAll()
	if h.role == roleRetiring {
		for n := range g.unread {
			g.loseUnconfirmed(n)
		}
	} else {
		g.down.sever() // and with that ends what it was only offered
		h.forgetHomes()
		g.answer(upgradeReply{Upgraded: Upgraded{PID: g.pid, Moved: g.moved, Stayed: len(h.residents), Took: time.Since(g.started)},
			err: fmt.Errorf("this process goes on, beside the new one for as long as that has sessions: %w", err)})
		g.reopen()
	}
	g.pump()
}

// reopen accepts again.
func (g *giving) reopen() {
	if g.began {
		go func() {
			<-g.paused
			g.h.front.start()
		}()
	}
}

// abandonAll closes what the host's loop leaves behind.
func (g *giving) abandonAll() {
	g.closeFar()
	g.revokeOffers()
}
