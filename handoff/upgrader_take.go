package handoff

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// An upgrade as the new process sees it: the host passes the old process's messages on
// to its worker and the answers back, and keeps the books. See giving.

// workerReady is called when the worker takes sessions.
func (h *host) workerReady() {
	if h.role != roleJoining {
		return
	}
	if h.up != nil {
		h.role = roleTaking
		h.up.put(&wire.Message{Type: wire.TypeReady}, nil)
		return
	}
	h.lead()
}

// lead puts this process in charge.
func (h *host) lead() {
	h.role = roleLeading
	if err := h.flip.Ready(); err != nil {
		h.log.Warn("taking over", "error", err) // the pid file, or the old process has gone
	}
	h.front.start()
	h.log.Info("in charge", "sessions", len(h.residents))
	h.grantWaiting("")
}

// fromOld takes what the old process says.
func (h *host) fromOld(m *wire.Message) error {
	switch m.Type {
	case wire.TypeBegin:
		if h.role == roleTaking {
			h.front.start()
		}
	case wire.TypeSettled:
		if h.role == roleTaking {
			h.lead()
		}
	case wire.TypePing:
		h.up.put(&wire.Message{Type: wire.TypePong, Nonce: m.Nonce}, nil)
	case wire.TypeKeys:
		for i := range m.Items {
			h.vault.put(m.Items[i].ID, m.Items[i].Cargo.Record)
		}
	case wire.TypeAdopt:
		h.take(m)
	case wire.TypeAbort:
		h.pass(m)
		for _, ref := range m.Refs {
			if r := h.residents[ref.ID]; r != nil && r.taken && r.owner == ref.Epoch {
				h.forget(r)
				delete(h.complete, r.group) // the old process decides about a group as a whole
			}
		}
	case wire.TypeResume:
		h.pass(m)
		h.resumed(m)
	case wire.TypeGrouped:
		h.groupAnswered(m.Refs[0], m.Group, m.Text)
	default:
		return fmt.Errorf("%w: %s from the old process", wire.ErrProtocol, m.Type)
	}
	return nil
}

// pass gives a message on to the worker.
func (h *host) pass(m *wire.Message) { h.local.put(m, nil) }

// take offers sessions of the old process to the worker.
func (h *host) take(m *wire.Message) {
	var refused []wire.Refused
	for i := range m.Items {
		it := &m.Items[i]
		switch r := h.residents[it.ID]; {
		case r != nil && !r.taken || it.ID>>32 >= uint64(h.inc): // it would be mistaken for ours
			refused = append(refused, wire.Refused{Ref: it.Ref, Why: "this number is in use"})
		case h.role == roleStopping || h.role == roleOrphaned:
			refused = append(refused, wire.Refused{Ref: it.Ref, Why: "this process is ending"})
		}
	}
	if len(refused) > 0 {
		m.CloseSockets()
		all := make([]wire.Refused, len(m.Items))
		for i := range m.Items {
			all[i] = wire.Refused{Ref: m.Items[i].Ref, Why: refused[0].Why}
			h.vault.drop(m.Items[i].ID)
		}
		h.up.put(&wire.Message{Type: wire.TypeRefused, Refused: all}, nil)
		return
	}
	for i := range m.Items {
		it := &m.Items[i]
		h.residents[it.ID] = &resident{id: it.ID, owner: it.Epoch, taken: true, group: it.Group}
	}
	if m.Group != "" {
		h.complete[m.Group] = m.Last
	}
	h.pass(m)
}

// refuse answers for an ADOPT whose descriptors were lost on the way.
func (h *host) refuse(m *wire.Message, err error) {
	var list []wire.Refused
	for i := range m.Items {
		list = append(list, wire.Refused{Ref: m.Items[i].Ref, Why: wire.Clip(err.Error())})
		h.vault.drop(m.Items[i].ID)
	}
	if len(list) > 0 {
		h.up.put(&wire.Message{Type: wire.TypeRefused, Refused: list}, nil)
	}
}

// resumed makes sessions of the old process this one's. The members of a group come in
// parts, and none counts before the last.
func (h *host) resumed(m *wire.Message) {
	refs := m.Refs
	if m.Group != "" {
		refs = append(h.resuming[m.Group], refs...)
		if !m.Last {
			h.resuming[m.Group] = refs
			return
		}
		delete(h.resuming, m.Group)
		delete(h.complete, m.Group)
	}
	for _, ref := range refs {
		r := h.residents[ref.ID]
		if r == nil || !r.taken || r.owner != ref.Epoch {
			continue
		}
		r.taken, r.owned = false, true
		h.enterGroup(r, r.group)
	}
	h.grantWaiting(m.Group)
}

// oldLost is the end of the channel with the old process.
func (h *host) oldLost(err error) {
	if h.up == nil {
		return
	}
	h.up.sever()
	h.up = nil
	if h.role == roleLeading && !errors.Is(err, io.EOF) {
		h.log.Error("no further session comes from the old process", "error", err)
	}
	h.grantWaiting("")
	// Either it has died, and then what it had offered has nobody else; or it gave up on
	// this process, and goes on with that itself.
	if h.parentGone {
		h.parentEnded()
		return
	}
	t := time.AfterFunc(parentTime, func() { h.in.post(h.givenUp) })
	context.AfterFunc(h.worker.base, func() { t.Stop() })
}

// parentTime is how long after the end of its channel the old process's death may be
// noticed.
const parentTime = 2 * time.Second

// parentEnded is called when the old process is dead.
func (h *host) parentEnded() {
	h.parentGone = true
	if h.ended || h.up != nil {
		return // what it has said is still to be heard
	}
	if h.revoked == nil {
		h.bequeathed(false)
		return
	}
	f := h.revoked
	h.revoked = nil
	go func() {
		var b [1]byte
		n, err := f.Read(b[:]) // does not wait: the other end is closed
		_ = f.Close()
		h.in.post(func() { h.bequeathed(n == 0 && errors.Is(err, io.EOF)) })
	}()
}

// bequeathed goes on alone. ours says that the old process died without having used again
// anything that it had offered.
func (h *host) bequeathed(ours bool) {
	h.inheriting = ours
	if ours {
		h.inherit()
	} else {
		h.dropTaken()
	}
	if h.role == roleTaking || h.role == roleOrphaned && !h.retired {
		h.log.Error("the old process died in the middle of the upgrade; taking over", "sessions", len(h.residents))
		h.lead()
	}
}

// inherit makes sessions that the old process had offered this one's: those that our
// worker can serve, groups only as a whole.
func (h *host) inherit() {
	groups := map[string][]wire.Ref{}
	for _, r := range h.residents {
		if r.taken && (r.able || r.group != "") {
			groups[r.group] = append(groups[r.group], wire.Ref{ID: r.id, Epoch: r.owner})
		}
	}
	for name, refs := range groups {
		if name != "" && !h.whole(name, refs) {
			continue
		}
		parts := wire.BatchRefs(refs)
		for i, part := range parts {
			m := &wire.Message{Type: wire.TypeResume, Group: name, Refs: part, Last: name != "" && i == len(parts)-1}
			h.pass(m)
			h.resumed(m)
		}
	}
}

// whole reports that all of a group has been offered, its state included, and can be
// served.
func (h *host) whole(name string, refs []wire.Ref) bool {
	for _, ref := range refs {
		if !h.residents[ref.ID].able {
			return false
		}
	}
	return h.complete[name]
}

// dropTaken closes this process's copies of what it was only offered.
func (h *host) dropTaken() {
	var refs []wire.Ref
	for _, r := range h.residents {
		if r.taken {
			refs = append(refs, wire.Ref{ID: r.id, Epoch: r.owner})
			h.forget(r)
		}
	}
	for _, part := range wire.BatchRefs(refs) {
		h.local.put(&wire.Message{Type: wire.TypeAbort, Refs: part}, nil)
	}
}

// givenUp is called when the old process has closed the channel and lives.
func (h *host) givenUp() {
	if h.parentGone {
		return
	}
	h.dropTaken()
	h.orphaned()
}

// orphaned ends a process that the old one has given up, with the last of the sessions
// that it has.
func (h *host) orphaned() {
	if h.role != roleTaking {
		return
	}
	h.role = roleOrphaned
	h.log.Error("the old process goes on without this one, which ends with its last session", "sessions", len(h.residents))
	go func() {
		h.front.pause()
		h.in.post(func() {
			if h.role == roleOrphaned {
				h.retire()
			}
		})
	}()
}

// killHolder kills the child process that holds the socket with this inode.
func killHolder(inode uint64, log interface{ Warn(string, ...any) }) {
	pid, err := sys.KillChildWithSocket(inode)
	if err != nil {
		log.Warn("the new process could not be killed", "error", err)
		return
	}
	log.Warn("the new process was killed", "pid", pid)
}
