package handoff

import (
	"errors"
	"fmt"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
	"github.com/ktlsvisor/ktlsvisor/ktls"
)

// adopt imports sessions. Nothing is read from or written to them.
func (w *worker) adopt(m *wire.Message) {
	var adopted []wire.Ref
	var refused []wire.Refused
	for i := range m.Items {
		it := &m.Items[i]
		if err := w.adoptOne(it); err != nil {
			w.log.Warn("session refused", "session", it.ID, "error", err)
			refused = append(refused, wire.Refused{Ref: it.Ref, Why: wire.Clip(err.Error())})
			continue
		}
		adopted = append(adopted, it.Ref)
	}
	if len(m.Blobs) == 0 || len(refused) > 0 {
		w.answer(adopted, refused)
		return
	}
	if w.groups == nil {
		w.adoptedGroup(adopted, errors.New("this worker keeps no state of groups"))
		return
	}
	conns := make([]*Conn, 0, len(adopted))
	for _, r := range adopted {
		conns = append(conns, w.sessions[r.ID].conn)
	}
	called := calling(conns)
	go func() {
		var err error
		for i := range m.Blobs {
			b := &m.Blobs[i]
			if e := guard(func() error { return w.groups.AdoptGroup(b.Group, b.Data) }); e != nil && err == nil {
				err = fmt.Errorf("group %q: %w", b.Group, e)
			}
		}
		w.in.post(func() {
			called()
			w.adoptedGroup(adopted, err)
		})
	}()
}

// adoptedGroup answers for the sessions that came with a group's state.
func (w *worker) adoptedGroup(refs []wire.Ref, err error) {
	var adopted []wire.Ref
	var refused []wire.Refused
	for _, r := range refs {
		s := w.sessions[r.ID]
		if s == nil || s.owner != r.Epoch || s.phase != phaseAdopted {
			continue // aborted meanwhile
		}
		if err == nil {
			adopted = append(adopted, r)
			continue
		}
		w.forget(s)
		refused = append(refused, wire.Refused{Ref: r, Why: wire.Clip(err.Error())})
	}
	if err != nil {
		w.log.Warn("group refused", "error", err)
	}
	w.answer(adopted, refused)
}

func (w *worker) answer(adopted []wire.Ref, refused []wire.Refused) {
	if len(adopted) > 0 {
		w.send(&wire.Message{Type: wire.TypeAdopted, Refs: adopted})
	}
	if len(refused) > 0 {
		w.send(&wire.Message{Type: wire.TypeRefused, Refused: refused})
	}
}

func (w *worker) adoptOne(it *wire.Item) error {
	fd := it.Socket
	it.Socket = -1
	if s := w.sessions[it.ID]; s != nil {
		sys.CloseAll([]int{fd})
		if s.phase == phaseAdopted && s.owner == it.Epoch {
			return nil // asked twice
		}
		return fmt.Errorf("session %d is still here (%s, epoch %d): RELEASE or ABORT it first", s.id, s.phase, s.owner)
	}
	if e, ok := w.tombs[it.ID]; ok {
		sys.CloseAll([]int{fd})
		return fmt.Errorf("session %d ended here (%s)", it.ID, e.Reason)
	}
	if w.draining || w.stopping {
		sys.CloseAll([]int{fd})
		return errors.New("this worker is retiring")
	}
	if err := sys.SetNonblock(fd); err != nil {
		sys.CloseAll([]int{fd})
		return fmt.Errorf("session %d: %w", it.ID, err)
	}
	f := newSocket(fd)
	t, err := ktls.Import(f, it.Cargo.Facts, it.Cargo.Record)
	clear(it.Cargo.Record)
	if err != nil {
		_ = f.Close()
		return fmt.Errorf("session %d: %w", it.ID, err)
	}
	c := newConn(w, it.ID, t)
	c.commits, c.durable = w.takeCommits(it.ID, it.Epoch, t, it.Cargo.App)
	c.place = w.journal(c, it.Epoch, t)
	c.app = it.Cargo.App
	c.restored = it.Flags&(wire.FlagRestored|wire.FlagInterrupted) != 0
	c.interrupted = it.Flags&wire.FlagInterrupted != 0
	s := &session{id: it.ID, owner: it.Epoch, seen: it.Epoch, phase: phaseAdopted, conn: c, group: it.Group,
		resting: it.Flags&wire.FlagResting != 0 && w.rest != nil}
	c.s = s
	w.relayed(s, t)
	w.sessions[it.ID] = s
	w.marks.give(c)
	return nil
}

// descriptorsLost refuses what an ADOPT brought whose descriptors did not all fit
// into this process.
func (w *worker) descriptorsLost(m *wire.Message, err error) {
	w.log.Error("descriptors of a message were lost", "message", m.Type, "sessions", len(m.Items), "error", err)
	var refused []wire.Refused
	for i := range m.Items {
		refused = append(refused, wire.Refused{Ref: m.Items[i].Ref, Why: wire.Clip(err.Error())})
	}
	w.answer(nil, refused)
}
