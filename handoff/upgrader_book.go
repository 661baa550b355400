package handoff

import (
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// The host's book of sessions, and what its own worker says of them.

// admit gives a new session to the worker.
func (h *host) admit(a *arrival, done func(error)) {
	if h.ended || h.role == roleStopping || h.role == roleOrphaned {
		a.drop()
		done(ErrStopped)
		return
	}
	if h.role == roleRetiring && h.giving.over {
		a.drop()
		done(ErrReplaced)
		return
	}
	if !h.ready { // the worker would take an ADOPT for a breach of the protocol
		h.early = append(h.early, func() { h.admit(a, done) })
		return
	}
	fd := a.leave()
	if fd < 0 {
		done(ErrStopped)
		return
	}
	e := h.nextEpoch()
	id := uint64(e) // no other process of the row counts with this number
	h.residents[id] = &resident{id: id, owner: e}
	h.vault.put(id, a.secrets)
	it := wire.Item{Ref: wire.Ref{ID: id, Epoch: e}, Socket: fd,
		Cargo: wire.Cargo{Facts: a.facts, Record: a.record, App: a.state}}
	h.local.put(&wire.Message{Type: wire.TypeAdopt, Items: []wire.Item{it}}, done)
}

// adopted is the worker's word that it can serve these: they are its own, or the old
// process is told.
func (h *host) adopted(refs []wire.Ref) {
	var own, theirs []wire.Ref
	for _, ref := range refs {
		r := h.residents[ref.ID]
		switch {
		case r == nil || r.owner != ref.Epoch || r.owned:
		case r.taken:
			r.able = true
			theirs = append(theirs, ref)
		default:
			r.owned = true
			own = append(own, ref)
		}
	}
	if len(own) > 0 {
		h.local.put(&wire.Message{Type: wire.TypeResume, Refs: own}, nil)
		if h.giving != nil {
			h.giving.add(own)
		}
	}
	switch {
	case len(theirs) == 0:
	case h.up != nil:
		h.up.put(&wire.Message{Type: wire.TypeAdopted, Refs: theirs}, nil)
	case h.inheriting:
		h.inherit()
	}
}

// refusedHere is the worker's word that it cannot serve these.
func (h *host) refusedHere(list []wire.Refused) {
	var theirs []wire.Refused
	for _, f := range list {
		r := h.residents[f.ID]
		if r == nil || r.owner != f.Epoch || r.owned {
			continue
		}
		h.forget(r)
		if r.taken {
			theirs = append(theirs, f)
			continue
		}
		h.log.Error("no session: it could not be begun", "session", f.ID, "error", f.Why)
	}
	if len(theirs) > 0 && h.up != nil {
		h.up.put(&wire.Message{Type: wire.TypeRefused, Refused: theirs}, nil)
	}
}

// closed notes ends of sessions.
func (h *host) closed(list []wire.Closed) {
	var acks []wire.Ref
	for _, c := range list {
		acks = append(acks, c.Ref)
		r := h.residents[c.ID]
		if r == nil || r.owner != c.Epoch {
			continue
		}
		h.forget(r)
		if r.unit != nil {
			r.unit.ended(r)
		}
	}
	h.local.put(&wire.Message{Type: wire.TypeClosedAck, Refs: acks}, nil)
}

// forget takes a session off the books.
func (h *host) forget(r *resident) {
	delete(h.residents, r.id)
	h.vault.drop(r.id)
	h.leaveGroup(r)
}
