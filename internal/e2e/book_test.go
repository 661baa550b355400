package e2e

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"

	"github.com/fxamacker/cbor/v2"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// by-the-book is an echo worker as handoff/PROTOCOL.md has it be written in another
// language: one thread, epoll, recvmsg and sendmsg, nothing of packages handoff and
// ktls. Its sessions are in the kernel layer.
func init() { roles["by-the-book"] = func() int { return exitOf(byTheBook()) } }

// bookWorker is the whole worker. Only incoming is used by another goroutine.
type bookWorker struct {
	ch       *wire.Channel
	epoll    int
	wake     int // a byte comes here for every message
	sessions map[uint64]*bookSession
	tombs    map[uint64]wire.Closed
	draining bool

	mu       sync.Mutex
	incoming []*wire.Message
	lost     error
}

type bookSession struct {
	wire.Ref      // epoch of the ownership
	fd       int  // the socket
	active   bool // after RESUME, and not parked
	parked   bool
	attempt  wire.Epoch // FREEZE in force
	record   map[uint64]any
	out      []byte      // to be echoed
	end      wire.Reason // it is to end, when that is possible
	text     string

	// Section 8.
	hand   []byte // part of a handshake message
	count  uint64 // KeyUpdates of the client's
	waits  bool   // KEY_UPDATE sent, REKEYED not come
	owes   bool   // a KeyUpdate before any more data
	paused bool
	sent   bool // in the pause
}

func byTheBook() error {
	ch, err := wire.NewChannel(wire.ChannelFD)
	if err != nil {
		return err
	}
	w := &bookWorker{ch: ch, sessions: map[uint64]*bookSession{}, tombs: map[uint64]wire.Closed{}}
	if w.epoll, err = syscall.EpollCreate1(syscall.EPOLL_CLOEXEC); err != nil {
		return err
	}
	var pipe [2]int
	if err := syscall.Pipe2(pipe[:], syscall.O_CLOEXEC); err != nil {
		return err
	}
	w.wake = pipe[0]
	if err := w.watch(syscall.EPOLL_CTL_ADD, w.wake, syscall.EPOLLIN); err != nil {
		return err
	}
	go w.receive(pipe[1])
	first := hello(wire.Version)
	first.Hello.Rekey = true
	if err := ch.Send(first); err != nil {
		return err
	}
	events := make([]syscall.EpollEvent, 64)
	for !w.draining || len(w.sessions) > 0 {
		n, err := syscall.EpollWait(w.epoll, events, -1)
		if err != nil && !errors.Is(err, syscall.EINTR) {
			return err
		}
		for i := range max(n, 0) {
			if int(events[i].Fd) == w.wake {
				if err := w.messages(); err != nil {
					return err
				}
				continue
			}
			for _, s := range w.sessions {
				if s.active && s.fd == int(events[i].Fd) {
					w.serve(s)
				}
			}
		}
	}
	return nil
}

func (w *bookWorker) watch(op, fd int, events uint32) error {
	return syscall.EpollCtl(w.epoll, op, fd, &syscall.EpollEvent{Events: events, Fd: int32(fd)})
}

func (w *bookWorker) receive(wake int) {
	for {
		m, err := w.ch.Recv()
		w.mu.Lock()
		if err != nil {
			w.lost = err
		} else {
			w.incoming = append(w.incoming, m)
		}
		w.mu.Unlock()
		_, _ = syscall.Write(wake, []byte{0})
		if err != nil {
			return
		}
	}
}

func (w *bookWorker) messages() error {
	var b [64]byte
	_, _ = syscall.Read(w.wake, b[:])
	w.mu.Lock()
	list, lost := w.incoming, w.lost
	w.incoming = nil
	w.mu.Unlock()
	for _, m := range list {
		if err := w.handle(m); err != nil {
			return fmt.Errorf("%s: %w", m.Type, err)
		}
	}
	if errors.Is(lost, io.EOF) {
		return errors.New("nobody will come")
	}
	return lost
}

func (w *bookWorker) handle(m *wire.Message) error {
	switch m.Type {
	case wire.TypeWelcome:
		if !m.Welcome.Rekey {
			return errors.New("this one is about section 8")
		}
		return w.ch.Send(&wire.Message{Type: wire.TypeReady})
	case wire.TypePing:
		return w.ch.Send(&wire.Message{Type: wire.TypePong, Nonce: m.Nonce})
	case wire.TypeAdopt:
		return w.adopt(m)
	case wire.TypeInventory:
		return w.inventory(m.Nonce)
	case wire.TypeStop:
		w.draining = true
		for _, s := range w.sessions {
			if !m.Drain {
				w.finish(s, wire.ReasonOperator, "")
			}
		}
	case wire.TypeClosedAck:
		for _, r := range m.Refs {
			delete(w.tombs, r.ID)
		}
	}
	for _, r := range m.Refs {
		if s := w.sessions[r.ID]; s != nil {
			if err := w.order(m.Type, s, r.Epoch); err != nil {
				return err
			}
		}
	}
	for i := range m.Rekeys {
		r := &m.Rekeys[i]
		if s := w.sessions[r.ID]; s != nil && s.Ref == r.Ref && s.active {
			w.rekey(m.Type, s, r)
		}
	}
	return nil
}

func (w *bookWorker) adopt(m *wire.Message) error {
	answer := &wire.Message{Type: wire.TypeAdopted}
	for i := range m.Items {
		it := &m.Items[i]
		s := &bookSession{Ref: it.Ref, fd: it.Socket, record: map[uint64]any{}}
		if err := cbor.Unmarshal(it.Cargo.Record, &s.record); err != nil {
			return err
		}
		queued, _ := s.record[12].([]byte)
		unread, _ := s.record[11].([]byte)
		s.out = append(queued, unread...)
		it.Socket = -1
		w.sessions[it.ID] = s
		answer.Refs = append(answer.Refs, it.Ref)
	}
	return w.ch.Send(answer)
}

// order is one of FREEZE, THAW, RESUME, RELEASE, ABORT, CLOSE for one session.
func (w *bookWorker) order(t wire.Type, s *bookSession, e wire.Epoch) error {
	switch {
	case t == wire.TypeResume && s.Epoch == e && !s.active && !s.parked, t == wire.TypeThaw && s.attempt == e && s.parked:
		s.active, s.parked, s.attempt = true, false, 0
		if err := w.watch(syscall.EPOLL_CTL_ADD, s.fd, 0); err != nil {
			return err
		}
		w.serve(s)
	case t == wire.TypeThaw && s.attempt == e:
		s.attempt = 0
	case t == wire.TypeFreeze && (s.active || s.parked) && e > s.attempt:
		s.attempt = e
		if s.parked { // anew
			return w.sayParked(s)
		}
		w.serve(s)
	case t == wire.TypeRelease && s.parked && s.attempt == e, t == wire.TypeAbort && s.Epoch == e && !s.active && !s.parked:
		delete(w.sessions, s.ID)
		return syscall.Close(s.fd)
	case t == wire.TypeClose && s.active:
		w.finish(s, wire.ReasonOperator, "")
	}
	return nil
}

func (w *bookWorker) inventory(nonce uint64) error {
	reply := &wire.Message{Type: wire.TypeInventoryReply, Nonce: nonce, Last: true}
	for _, s := range w.sessions {
		h := wire.Held{Ref: s.Ref, Phase: wire.PhaseAdopted, Attempt: s.attempt}
		switch {
		case s.parked:
			h.Phase = wire.PhaseParked
		case s.active && s.attempt != 0:
			h.Phase = wire.PhaseFreezing
		case s.active:
			h.Phase = wire.PhaseActive
		}
		reply.Held = append(reply.Held, h)
	}
	for _, c := range w.tombs {
		reply.Held = append(reply.Held, wire.Held{Ref: c.Ref, Phase: wire.PhaseClosed, Reason: c.Reason})
	}
	if err := w.ch.Send(reply); err != nil {
		return err
	}
	for _, s := range w.sessions {
		if s.waits {
			w.say(wire.TypeKeyUpdate, s, wire.Rekey{Count: s.count, Request: s.owes})
		}
		if s.owes && !s.sent {
			w.say(wire.TypeWantUpdate, s, wire.Rekey{})
		}
		switch {
		case s.sent:
			w.say(wire.TypeSent, s, wire.Rekey{})
		case s.paused:
			w.say(wire.TypePaused, s, wire.Rekey{})
		}
	}
	return nil
}

func (w *bookWorker) say(t wire.Type, s *bookSession, r wire.Rekey) {
	r.Ref = s.Ref
	_ = w.ch.Send(&wire.Message{Type: t, Rekeys: []wire.Rekey{r}})
}

func (w *bookWorker) rekey(t wire.Type, s *bookSession, r *wire.Rekey) {
	switch t {
	case wire.TypePause:
		if !s.paused {
			s.paused = true
			w.say(wire.TypePaused, s, wire.Rekey{})
		}
	case wire.TypeSend:
		n, err := sys.TLSSendRecord(s.fd, 22, r.Record)
		if err == nil && n == len(r.Record) {
			s.sent = true
			w.say(wire.TypeSent, s, wire.Rekey{})
		} else {
			w.say(wire.TypeSent, s, wire.Rekey{Failed: fmt.Sprint("no room: ", err)})
		}
	case wire.TypeContinue:
		if s.sent {
			s.owes = false
			s.bring(19, 21)
			delete(s.record, 25)
			delete(s.record, 26)
		}
		s.paused, s.sent = false, false
	case wire.TypeRekeyed:
		if r.Count == s.count {
			s.waits = false
			s.bring(18, 20)
		}
	}
	if r.Failed != "" {
		s.paused = false
		w.finish(s, wire.ReasonLayer, r.Failed)
		return
	}
	w.serve(s)
}

// bring is what a change of keys does to the record: the use begins anew, and one more
// KeyUpdate.
func (s *bookSession) bring(use, count uint64) {
	delete(s.record, use)
	n, _ := s.record[count].(uint64)
	s.record[count] = n + 1
}

// serve does what can be done with a session now.
func (w *bookWorker) serve(s *bookSession) {
	w.write(s)
	w.read(s)
	w.write(s)
	switch {
	case !s.active:
	case s.end != 0 && !s.paused && (len(s.out) == 0 || s.end != wire.ReasonPeer):
		w.close(s)
	case s.attempt != 0 && s.end == 0 && !s.waits && !s.paused:
		w.park(s)
	default:
		var events uint32
		if s.reads() {
			events |= syscall.EPOLLIN
		}
		if len(s.out) > 0 && s.writes() {
			events |= syscall.EPOLLOUT
		}
		_ = w.watch(syscall.EPOLL_CTL_MOD, s.fd, events)
	}
}

func (s *bookSession) reads() bool {
	return s.active && !s.waits && s.end == 0 && s.attempt == 0 && len(s.out) < 1<<18
}

func (s *bookSession) writes() bool { return s.active && !s.paused && !s.owes }

func (w *bookWorker) write(s *bookSession) {
	for len(s.out) > 0 && s.writes() {
		n, err := sys.TLSSendData(s.fd, s.out)
		switch {
		case errors.Is(err, syscall.EAGAIN):
			return
		case err != nil:
			s.out = nil
			w.finish(s, wire.ReasonPeerAbrupt, err.Error())
			return
		}
		s.out = s.out[n:]
	}
}

// read reads until there is nothing more: poll cannot be believed.
func (w *bookWorker) read(s *bookSession) {
	buf := make([]byte, 16<<10)
	for s.reads() {
		n, typ, _, err := sys.TLSRecv(s.fd, buf)
		switch {
		case errors.Is(err, syscall.EAGAIN):
			return
		case errors.Is(err, syscall.EKEYEXPIRED): // of an owner that died
			w.keyUpdate(s, true)
		case err != nil:
			w.finish(s, wire.ReasonPeerAbrupt, err.Error())
		case typ == sys.NoRecordType && n == 0:
			w.finish(s, wire.ReasonPeerAbrupt, "")
		case typ == 23:
			s.out = append(s.out, buf[:n]...)
			w.write(s)
		case typ == 21 && n == 2 && buf[0] == 1 && buf[1] == 0:
			w.finish(s, wire.ReasonPeer, "")
		case typ == 22:
			s.hand = append(s.hand, buf[:n]...)
			if len(s.hand) != 5 || s.hand[0] != 24 || s.hand[4] > 1 {
				w.finish(s, wire.ReasonProtocol, "a handshake message that clients of this test do not send")
				return
			}
			request := s.hand[4] == 1
			s.hand = nil
			w.keyUpdate(s, request)
		default:
			w.finish(s, wire.ReasonProtocol, fmt.Sprint("record of type ", typ))
		}
	}
}

func (w *bookWorker) keyUpdate(s *bookSession, request bool) {
	s.count++
	s.waits, s.owes = true, s.owes || request
	w.say(wire.TypeKeyUpdate, s, wire.Rekey{Count: s.count, Request: request})
}

// finish ends a session as soon as that is possible.
func (w *bookWorker) finish(s *bookSession, reason wire.Reason, text string) {
	if s.end == 0 {
		s.end, s.text = reason, text
	}
	if s.end != wire.ReasonPeer {
		s.out = nil
	}
	if s.active && !s.paused && len(s.out) == 0 {
		w.close(s)
	}
}

func (w *bookWorker) close(s *bookSession) {
	_ = w.watch(syscall.EPOLL_CTL_DEL, s.fd, 0)
	if s.end != wire.ReasonLayer {
		_, _ = sys.TLSSendRecord(s.fd, 21, []byte{1, 0})
	}
	_ = syscall.Shutdown(s.fd, syscall.SHUT_RDWR)
	_ = syscall.Close(s.fd)
	s.active = false
	delete(w.sessions, s.ID)
	c := wire.Closed{Ref: s.Ref, Reason: s.end, Text: s.text}
	w.tombs[s.ID] = c
	_ = w.ch.Send(&wire.Message{Type: wire.TypeClosed, Closed: []wire.Closed{c}})
}

func (w *bookWorker) park(s *bookSession) {
	_ = w.watch(syscall.EPOLL_CTL_DEL, s.fd, 0)
	s.active, s.parked = false, true
	if err := w.sayParked(s); err != nil {
		fmt.Fprintln(os.Stderr, "PARKED:", err)
	}
}

func (w *bookWorker) sayParked(s *bookSession) error {
	for _, k := range []uint64{11, 12, 25, 26} {
		delete(s.record, k)
	}
	if len(s.out) > 0 {
		s.record[12] = s.out
	}
	record, err := cbor.Marshal(s.record)
	if err != nil {
		return err
	}
	return w.ch.Send(&wire.Message{Type: wire.TypeParked, Items: []wire.Item{{
		Ref: wire.Ref{ID: s.ID, Epoch: s.attempt}, Cargo: wire.Cargo{Record: record}, Large: false}}})
}
