package handoff

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// groupCheckpoint is one that waits for CHECKPOINTED. m is kept for a supervisor that
// takes over meanwhile.
type groupCheckpoint struct {
	m    *wire.Message
	done func(error)
}

// CheckpointGroup has the supervisor keep state, at most MaxState bytes, as the state of
// the group that c is a member of: after a crash of this process, Groups.AdoptGroup is
// called with the last one that was kept, before the handler of any member starts. It
// returns nil when it is kept; the newest counts, whichever member it came by. What
// FreezeGroup returns in a move takes its place. It is kept as long as the group has
// members. CheckpointGroup keeps state until it returns.
//
// A group's checkpoint and the commits of its members are steps of their own: after a
// crash any of them may be the last. A program that needs them to fit numbers them.
func (c *Conn) CheckpointGroup(ctx context.Context, state []byte) error {
	if len(state) > MaxState {
		return fmt.Errorf("group state of %d bytes, the limit is %d", len(state), MaxState)
	}
	return c.w.call(ctx, func(done func(error)) { c.w.checkpointGroup(c.s, state, done) })
}

func (w *worker) checkpointGroup(s *session, state []byte, done func(error)) {
	switch {
	case w.gone != nil:
		done(ErrSupervisorGone)
	case w.sessions[s.id] != s || s.group == "":
		done(errors.New("the session is in no group"))
	case w.welcome == nil || !w.welcome.Groups:
		done(errors.New("whoever gave this process its sessions keeps no state of groups"))
	default:
		w.checkpoints++
		p := &groupCheckpoint{done: done, m: &wire.Message{Type: wire.TypeCheckpoint, Nonce: w.checkpoints, Group: s.group,
			Refs: []wire.Ref{{ID: s.id, Epoch: s.owner}}, Blobs: []wire.Blob{{Group: s.group, Data: slices.Clone(state)}}}}
		if w.checkpointing == nil {
			w.checkpointing = map[uint64]*groupCheckpoint{}
		}
		w.checkpointing[w.checkpoints] = p
		w.send(p.m)
	}
}

// checkpointed takes the supervisor's word that a group's state is kept, or is not.
func (w *worker) checkpointed(nonce uint64, failed string) {
	p := w.checkpointing[nonce]
	if p == nil {
		return
	}
	delete(w.checkpointing, nonce)
	if failed != "" {
		p.done(fmt.Errorf("the state of group %q is not kept: %s", p.m.Group, failed))
		return
	}
	p.done(nil)
}

// askCheckpoints says again what an earlier supervisor may not have done.
func (w *worker) askCheckpoints() {
	nonces := make([]uint64, 0, len(w.checkpointing))
	for n := range w.checkpointing {
		nonces = append(nonces, n)
	}
	slices.Sort(nonces)
	for _, n := range nonces {
		w.send(w.checkpointing[n].m)
	}
}

// dropCheckpoints ends what waits for a supervisor that will not come.
func (w *worker) dropCheckpoints() {
	for n, p := range w.checkpointing {
		delete(w.checkpointing, n)
		p.done(ErrSupervisorGone)
	}
}
