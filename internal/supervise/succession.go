package supervise

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// A planned replacement of the supervisor:
//
//	old                                      new
//	 | begin nothing new; wait until nothing is under way
//	 | stop accepting, stop reading the workers' channels
//	 | keeper: Successor, Yield
//	 | ---- tableflip starts it -------------> |
//	 |                                         | keeper: Lead; ledger, listeners, workers
//	 |                                         | INVENTORY; accept; ready
//	 | <--- tableflip: ready ------------------ |
//	 | handshakes still under way end here and are handed over
//	 | exit
//
// After a crash the keeper starts the new one, and the middle part is the same.
// When the successor does not get ready, the old one takes the lead back and goes
// on.

// quiesceTimeout is how long to wait until nothing is under way.
const quiesceTimeout = 15 * time.Second

var errNotIdle = errors.New("sessions, workers or an upgrade are under way and do not come to an end")

var errPredecessor = errors.New("the supervisor before this one is still finishing handshakes (for at most handshake_timeout); try again when it has ended")

// predecessorGone says whether tableflip can start another: never while the process
// that started this one lives.
func (p *process) predecessorGone(ctx context.Context) bool {
	if !p.upg.HasParent() {
		return true
	}
	ctx, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	return !errors.Is(p.upg.WaitForParent(ctx), context.DeadlineExceeded)
}

// lateGate routes sessions whose handshake has ended: to this process's ledger
// while it leads, to the successor afterwards.
type lateGate struct {
	mu     sync.Mutex
	closed bool // the ledger takes nothing more
	held   []*admission
	to     *sys.PacketConn
}

// admit is called by the goroutine of a finished handshake.
func (s *Supervisor) admit(a *admission) {
	g := &s.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case !g.closed:
		s.post(func() { s.admitSession(a) })
	case g.to != nil:
		s.sendLate(g.to, a)
	default:
		g.held = append(g.held, a)
	}
}

// lateMessage is an admission on its way to the successor, in a sealed memory
// file beside the socket: its record state is secret.
type lateMessage struct {
	Facts    facts  `cbor:"1,keyasint"`
	Record   []byte `cbor:"2,keyasint"`
	Software bool   `cbor:"3,keyasint"`
	Secrets  []byte `cbor:"4,keyasint,omitempty"`
}

func (s *Supervisor) sendLate(pc *sys.PacketConn, a *admission) {
	defer sys.CloseAll([]int{a.fd})
	b, err := cbor.Marshal(lateMessage{Facts: a.facts, Record: a.record, Software: a.software, Secrets: a.secrets})
	if err == nil {
		var fd int
		if fd, err = sys.SealedMemfd("ktlsvisor-late", b); err == nil {
			err = pc.Send([]byte{1}, []int{a.fd, fd})
			sys.CloseAll([]int{fd})
		}
	}
	wipe(b)
	if err != nil {
		s.log.Error("session lost between two supervisors", "peer", a.facts.Peer, "error", err)
		_ = sys.ShutdownBoth(a.fd)
	}
}

// takeLate receives what the predecessor finished late, until that has ended.
func (s *Supervisor) takeLate(pc *sys.PacketConn) {
	defer func() { _ = pc.Close() }()
	buf := make([]byte, 16)
	for {
		_, fds, err := pc.Recv(buf)
		if err != nil {
			return
		}
		a, err := readLate(fds)
		if err != nil {
			s.log.Error("a session of the predecessor cannot be taken over", "error", err)
			continue
		}
		s.admit(a)
	}
}

// readLate owns fds.
func readLate(fds []int) (*admission, error) {
	if len(fds) != 2 || !sys.IsTCP(fds[0]) {
		sys.CloseAll(fds)
		return nil, errors.New("malformed message")
	}
	defer sys.CloseAll(fds[1:])
	b, err := sys.ReadSealedMemfd(fds[1], 1<<20)
	var m lateMessage
	if err == nil {
		err = cbor.Unmarshal(b, &m)
		wipe(b)
	}
	if err != nil {
		sys.CloseAll(fds[:1])
		return nil, err
	}
	return &admission{fd: fds[0], facts: m.Facts, record: m.Record, software: m.Software, secrets: m.Secrets}, nil
}

// replaceSelf starts a successor and returns when it leads, or with the error
// after which this supervisor goes on as before.
func (s *Supervisor) replaceSelf(ctx context.Context, p *process, say func(string)) (err error) {
	if !p.predecessorGone(ctx) {
		return errPredecessor
	}
	if err := s.quiesce(ctx); err != nil {
		s.call(s.goOn)
		return err
	}
	say("accepting is paused, nothing is under way; starting the successor")
	s.front.pause()
	resume := make(chan bool, 1)
	paused, err := s.holdLedger(ctx, resume)
	back := func() {
		resume <- false
		s.reopenGate()
		s.call(func() {
			for _, w := range paused {
				select {
				case <-w.out.done:
					s.unpause(w)
				default:
					s.detach(w, errWorkerStuck)
				}
			}
			s.goOn()
		})
		s.front.start()
	}
	if err != nil {
		back()
		return err
	}
	if err := s.startSuccessor(ctx, p); err != nil {
		rctx, cancel := context.WithTimeout(context.Background(), keeperTimeout)
		defer cancel()
		if rerr := p.client.Reclaim(rctx); rerr != nil {
			s.log.Error("the lead cannot be taken back", "error", rerr)
			os.Exit(1) // the keeper starts another supervisor, which takes everything over
		}
		s.retain = newRetainer(s.keeper, s.post)
		back()
		return err
	}
	resume <- true
	return nil
}

// quiesce lets what is under way come to its end and begins nothing new.
func (s *Supervisor) quiesce(ctx context.Context) error {
	idle := make(chan struct{})
	if !s.call(func() {
		s.quiescing = true
		s.idle = append(s.idle, func() { close(idle) })
	}) {
		return errors.New("this supervisor has ended")
	}
	t := time.NewTimer(quiesceTimeout)
	defer t.Stop()
	select {
	case <-idle:
		return nil
	case <-t.C:
		return errNotIdle
	case <-ctx.Done():
		return ctx.Err()
	}
}

// holdLedger stops everything that reads or writes what a successor takes over:
// the workers' channels, the orders to the keeper, and last the ledger's own
// goroutine, until resume says whether this supervisor has ended.
func (s *Supervisor) holdLedger(ctx context.Context, resume <-chan bool) (paused []*worker, err error) {
	s.gate.mu.Lock()
	s.gate.closed = true
	s.gate.mu.Unlock()
	type reading struct {
		w      *worker
		reader chan struct{}
	}
	var readers []reading
	s.call(func() {
		for _, w := range s.workers {
			if w.ch == nil {
				continue
			}
			_ = w.ch.Conn().SetReadDeadline(time.Unix(1, 0))
			readers = append(readers, reading{w, w.reader})
			paused = append(paused, w)
		}
	})
	for _, r := range readers {
		<-r.reader
	}
	// What they posted before they stopped has run before what is posted here. Of that,
	// keys may still be changing: a successor must not come across this process in that,
	// since a key that both of them set would be used with the same nonces again (I5). And
	// states of groups may be on their way to the keeper, from where it takes them.
	held, late := make(chan struct{}), make(chan struct{})
	var outs []*outbox
	outboxes := func() {
		for _, w := range paused {
			if w.ch != nil {
				outs = append(outs, w.out)
			}
		}
	}
	s.post(func() {
		s.hold = func() {
			outboxes()
			close(held)
			if <-resume {
				s.replaced = true
			}
		}
	})
	t := time.AfterFunc(quiesceTimeout, func() {
		s.post(func() {
			if s.hold != nil {
				s.hold = nil
				outboxes()
				close(late)
			}
		})
	})
	defer t.Stop()
	select {
	case <-held:
	case <-late:
		err = errNotIdle
	}
	octx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for _, o := range outs {
		if err := o.drain(octx); err != nil {
			return paused, err
		}
	}
	return paused, err
}

func (s *Supervisor) startSuccessor(ctx context.Context, p *process) (err error) {
	s.retain.close()
	fd, err := p.client.Successor(ctx)
	if err != nil {
		return err
	}
	keeperEnd := os.NewFile(uintptr(fd), "keeper")
	defer func() {
		if err != nil {
			// tableflip keeps a duplicate, which would keep the channel open at the keeper.
			_ = sys.ShutdownBoth(fd)
		}
		_ = keeperEnd.Close()
	}()
	a, b, err := sys.PacketPair()
	if err != nil {
		return err
	}
	lateEnd := os.NewFile(uintptr(b), "late")
	defer func() { _ = lateEnd.Close() }()
	late, err := sys.NewPacketConn(a)
	if err != nil {
		return err
	}
	if err := errors.Join(p.upg.AddFile("keeper", keeperEnd), p.upg.AddFile("late", lateEnd)); err != nil {
		_ = late.Close()
		return err
	}
	if err := p.client.Yield(ctx); err != nil {
		_ = late.Close()
		return err
	}
	if err := p.upg.Upgrade(); err != nil {
		_ = late.Close()
		return fmt.Errorf("the successor did not get ready: %w", err)
	}
	_ = late.SetReadDeadline(time.Now().Add(2 * time.Second))
	buf := make([]byte, 16)
	if n, fds, err := late.Recv(buf); err == nil {
		sys.CloseAll(fds)
		if n == 8 {
			s.successor = int(binary.LittleEndian.Uint64(buf[:8]))
		}
	}
	g := &s.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	g.to = late
	for _, x := range g.held {
		s.sendLate(late, x)
	}
	g.held = nil
	return nil
}

func (s *Supervisor) reopenGate() {
	g := &s.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = false
	for _, a := range g.held {
		s.post(func() { s.admitSession(a) })
	}
	g.held = nil
}

// finishHandshakes lets the handshakes of this process come to their end, which
// handshake_timeout bounds, and hands them over.
func (s *Supervisor) finishHandshakes() {
	s.front.wait()
	s.gate.mu.Lock()
	defer s.gate.mu.Unlock()
	if s.gate.to != nil {
		_ = s.gate.to.Close()
	}
}
