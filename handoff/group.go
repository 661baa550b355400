package handoff

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// join is a JoinGroup or LeaveGroup that waits for the supervisor.
type join struct {
	name string
	done func(error)
}

func (c *Conn) join(ctx context.Context, name string) error {
	err := c.w.call(ctx, func(done func(error)) { c.w.joinGroup(c.s, name, done) })
	switch {
	case errors.Is(err, ErrMoving):
		c.mu.Lock()
		c.told = true
		c.mu.Unlock()
	case err != nil && ctx.Err() != nil:
		c.w.in.post(func() { c.w.cancelJoin(c.s) })
	}
	return err
}

func (w *worker) joinGroup(s *session, name string, done func(error)) {
	switch {
	case s.group == name && s.join == nil:
		done(nil) // the usual case after a move: the restored handler joins its group again
	case s.attempt != 0:
		done(ErrMoving)
	case s.phase != phaseRunning:
		done(net.ErrClosed)
	case s.join != nil:
		done(errors.New("another JoinGroup or LeaveGroup of this session is waiting"))
	case w.gone != nil:
		done(ErrSupervisorGone)
	default:
		s.join = &join{name: name, done: done}
		s.conn.leaveBarrier() // it leaves the group that the barrier is for
		w.sendGroup(s, name)
	}
}

// cancelJoin takes back a JoinGroup whose context ended. The supervisor may have
// granted it already; the last GROUP counts.
func (w *worker) cancelJoin(s *session) {
	if s.join != nil {
		s.join = nil
		w.sendGroup(s, s.group)
	}
}

func (w *worker) sendGroup(s *session, name string) {
	w.send(&wire.Message{Type: wire.TypeGroup, Refs: []wire.Ref{{ID: s.id, Epoch: s.owner}}, Group: name})
}

// grouped takes the supervisor's answer to GROUP. Answers come in the order of the
// questions, so each is true when it comes, also when nobody waits for it any more.
func (w *worker) grouped(ref wire.Ref, name, refused string) {
	s := w.sessions[ref.ID]
	if s == nil || s.owner != ref.Epoch || s.phase == phaseAdopted {
		w.stale("GROUPED", ref)
		return
	}
	if refused == "" {
		s.group = name
	}
	j := s.join
	if j == nil || j.name != name {
		return
	}
	s.join = nil
	if refused != "" {
		j.done(fmt.Errorf("session %d cannot join group %q: %s", s.id, name, refused))
		return
	}
	j.done(nil)
}

// batch is one attempt to move a group. No PARKED of it leaves before every member's
// handler has returned, so that what one member's handler writes to another member
// is still taken.
type batch struct {
	group    string
	members  map[uint64]*session
	last     bool // FREEZE with Last has come
	stage    batchStage
	complete bool   // all handlers have returned
	busy     bool   // FreezeGroup or AdoptGroup runs
	called   bool   // FreezeGroup gave blob; AdoptGroup has to take it back
	blob     []byte // the group's state
	thawed   map[uint64]bool
	deferred []*wire.Message // what came for the next attempt while this one is undone
}

// gathering --all handlers returned--> freezing --FreezeGroup--> exporting --all off their Conns--> parked --RELEASE of all--> (none)
//
//	|                                   |                          |                                |
//	+---------------THAW of any member, or a failure of ours ------+            THAW of all members +
//	                                    v                                                           |
//	                                unwinding <-----------------------------------------------------+
//	                                    | AdoptGroup, handlers start behind a barrier
//	                                    v
//	                                  (none)
type batchStage uint8

const (
	batchGathering batchStage = iota
	batchFreezing
	batchExporting
	batchParked
	batchUnwinding
)

// advance does what the batch's stage allows by now.
func (w *worker) advance(b *batch) {
	if b.busy || w.batches[b.group] != b {
		return
	}
	switch b.stage {
	case batchGathering:
		if !b.last || !b.all(phaseIdle, phaseParked) {
			return
		}
		if len(b.members) == 0 {
			w.dropBatch(b)
			return
		}
		b.stage, b.complete = batchFreezing, true
		w.freezeGroup(b)
	case batchExporting:
		switch {
		case len(b.members) == 0: // all ended: the group stays here
			b.stage = batchUnwinding
			w.advance(b)
		case b.all(phaseParked):
			b.stage = batchParked
			w.sendBatch(b)
		}
	case batchParked:
		switch {
		case len(b.members) == 0:
			w.dropBatch(b)
		case len(b.thawed) == len(b.members):
			b.stage = batchUnwinding
			for _, s := range b.members {
				s.attempt = 0
			}
			w.advance(b)
		}
	case batchUnwinding:
		if !b.settled() {
			return
		}
		if b.called {
			b.called = false
			w.adoptBack(b)
			return
		}
		w.release(b)
	}
}

func (b *batch) all(phases ...phase) bool {
	for _, s := range b.members {
		ok := false
		for _, p := range phases {
			ok = ok || s.phase == p
		}
		if !ok {
			return false
		}
	}
	return true
}

func (b *batch) settled() bool { return b.all(phaseIdle, phaseParked, phaseRunning) }

func (w *worker) freezeGroup(b *batch) {
	if w.groups == nil {
		w.frozenGroup(b, nil, nil)
		return
	}
	b.busy = true
	called := calling(b.conns())
	go func() {
		blob, err := guard2(func() ([]byte, error) { return w.groups.FreezeGroup(b.group) })
		w.in.post(func() {
			called()
			b.busy = false
			b.called = err == nil
			w.frozenGroup(b, blob, err)
		})
	}()
}

func (w *worker) frozenGroup(b *batch, blob []byte, err error) {
	b.blob = blob
	if err == nil && len(blob) > wire.MaxCargo {
		err = fmt.Errorf("its state has %d bytes, the limit is %d", len(blob), wire.MaxCargo)
	}
	if err != nil {
		w.log.Error("group stays here: it could not be frozen", "group", b.group, "error", err)
		if b.stage == batchFreezing {
			w.cancelBatch(b)
			return
		}
	}
	if b.stage == batchUnwinding { // called off while FreezeGroup ran
		w.advance(b)
		return
	}
	b.stage = batchExporting
	for _, s := range b.members {
		if s.phase == phaseIdle && b.stage == batchExporting {
			w.park(s)
		}
	}
	w.advance(b)
}

// sendBatch reports a parked group: PARKED in parts, the group's state in the last.
func (w *worker) sendBatch(b *batch) {
	items := make([]wire.Item, 0, len(b.members))
	for _, s := range b.members {
		it := s.parkedItem()
		it.Group = b.group
		items = append(items, it)
	}
	for _, s := range b.members {
		s.sent = 0
	}
	parts := wire.BatchItems(items)
	for i, part := range parts {
		if w.gone != nil {
			(&wire.Message{Items: items}).CloseSockets()
			return
		}
		for j := range part {
			if s := b.members[part[j].ID]; s != nil {
				s.sent = part[j].Epoch
			}
		}
		m := &wire.Message{Type: wire.TypeParked, Group: b.group, Items: part}
		if i == len(parts)-1 {
			m.Last = true
			if b.called {
				m.Blobs = []wire.Blob{{Group: b.group, Data: b.blob}}
			}
		}
		w.send(m)
	}
}

// cancelBatch calls off an attempt of which no PARKED has left.
func (w *worker) cancelBatch(b *batch) {
	if b.stage == batchParked || b.stage == batchUnwinding {
		return
	}
	b.stage = batchUnwinding
	for _, s := range b.members {
		s.attempt = 0
		if s.phase == phaseRunning {
			s.conn.thaw()
		}
	}
	w.advance(b)
}

func (w *worker) adoptBack(b *batch) {
	b.busy = true
	called := calling(b.conns())
	blob := slices.Clone(b.blob) // PARKED has these very bytes, and may still be on its way
	go func() {
		err := guard(func() error { return w.groups.AdoptGroup(b.group, blob) })
		w.in.post(func() {
			called()
			if err != nil {
				w.log.Error("group continues without its state", "group", b.group, "error", err)
			}
			b.busy = false
			w.advance(b)
		})
	}()
}

// release lets the members of an undone attempt go on. When all of their handlers
// had returned, they start behind a barrier of their own. Otherwise the group's state
// was not touched, and the barrier of the last move, if it has not opened, still
// tells who has come back to the group and who has not.
func (w *worker) release(b *batch) {
	delete(w.batches, b.group)
	var bar *barrier
	if b.complete {
		bar = w.newBarrier(b.group, b.conns())
	}
	members := b.members
	b.members = nil
	for _, s := range members {
		s.batch, s.attempt = nil, 0
		if s.phase == phaseRunning {
			s.conn.thaw()
			continue
		}
		if bar != nil {
			if s.barrier != nil {
				s.barrier.leave(s.conn)
			}
			s.barrier = bar
		}
		w.step(s)
	}
	w.replay(b)
}

func (w *worker) dropBatch(b *batch) {
	delete(w.batches, b.group)
	w.replay(b)
}

// replay handles the FREEZEs that came while the attempt was undone. One of them may
// have to wait for another group's attempt as well.
func (w *worker) replay(b *batch) {
	list := b.deferred
	b.deferred = nil
	for _, m := range list {
		rest := *m
		rest.Refs = nil
		for _, r := range m.Refs {
			if s := w.sessions[r.ID]; s != nil && s.next == r.Epoch { // not called off, not overtaken
				s.next = 0
				rest.Refs = append(rest.Refs, r)
			}
		}
		if w.gone == nil {
			w.freeze(&rest)
		}
	}
}

func (w *worker) newBarrier(group string, conns []*Conn) *barrier {
	limit := flushTime
	if w.welcome != nil && w.welcome.FreezeTimeout > 0 {
		limit = millis(w.welcome.FreezeTimeout)
	}
	return newBarrier(conns, limit, func(missing int) {
		w.log.Warn("members of a moved group did not ask for input in time; the others go on", "group", group, "missing", missing)
	})
}

// guard2 calls code of the application and turns a panic into an error.
func guard2(f func() ([]byte, error)) (b []byte, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("panic: %v", v)
		}
	}()
	return f()
}

func guard(f func() error) error {
	_, err := guard2(func() ([]byte, error) { return nil, f() })
	return err
}
