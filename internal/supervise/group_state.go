package supervise

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"strings"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/ownership"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// groupState is a group's shared state with the keeper, in a sealed memory file: its last
// checkpoint, or what its last home parked it with. Checkpoints are kept as long as the
// group has members. When its home dies, the group is offered to the next one with the
// last of them:
//
//	home dies -> members held -> state read from the keeper -> HoldGroup, OfferGroup
type groupState struct {
	checkpoint bool // the application makes checkpoints
	busy       bool // somebody reads it
	read       bool // it was read since the group lost its home
	offers     int  // with it
	unkept     bool // what the last home parked it with could not be written

	charged *worker // in whose quota it is; see group_write.go
	size    int     // there

	// On its way to the keeper; see group_write.go.
	next    *stateWrite // the newest, which waits
	queued  bool        // for the number of those that are written at once
	writing bool        // the one before next
}

// maxStateOffers is how often a group is offered with a state that nobody takes, and how
// many workers in a row may die over the group, before it goes on without.
const maxStateOffers = 3

func stateKey(k ownership.GroupKey) keeper.Key {
	h := fnv.New64a()
	_, _ = h.Write([]byte(k.Pool + "/" + k.Name))
	return keeper.Key{Kind: keeper.KindGroup, ID: h.Sum64(), Name: k.Pool + "/" + k.Name}
}

// onCheckpoint keeps the state of a group.
func (s *Supervisor) onCheckpoint(w *worker, m *wire.Message) error {
	ref := m.Refs[0]
	answer := func(err error) {
		text := ""
		if err != nil {
			text = wire.Clip(err.Error())
		}
		s.send(w, &wire.Message{Type: wire.TypeCheckpointed, Nonce: m.Nonce, Text: text})
	}
	ss := s.sessions[ref.ID]
	if ss == nil || ss.Owner != &w.Worker || ss.Epoch != ref.Epoch || ss.groupName() != m.Group {
		answer(errors.New("the session is not a member of the group here"))
		return nil
	}
	s.putGroupState(w.pool.groupKey(m.Group), m.Blobs[0].Data, w, answer)
	return nil
}

// keepGroup has the keeper hold the state that a group was parked with, where there is
// no worker any more that has it, and where it is newer than the last checkpoint.
func (s *Supervisor) keepGroup(k ownership.GroupKey, blob []byte) {
	s.putGroupState(k, blob, nil, func(err error) {
		if err != nil {
			s.log.Error("the state of a group is not kept", "group", k.Name, "pool", k.Pool, "error", err)
		}
	})
}

// groupDone notes that a group has come somewhere, or is no more.
func (s *Supervisor) groupDone(k ownership.GroupKey) {
	st := s.groupStates[k]
	if st == nil {
		return
	}
	switch g := s.m.Groups()[k]; {
	case g == nil, g.Home != nil && !st.checkpoint:
		s.dropState(k, st)
	case g.Home != nil:
		st.read, st.offers, st.unkept = false, 0, false
		st.charge(workerOf(g.Home), st.size)
	}
}

// homelessKept says whether the keeper has the states of all groups without a home: no
// worker has them any more, and a successor would begin from an older one.
func (s *Supervisor) homelessKept() bool {
	for k, st := range s.groupStates {
		g := s.m.Groups()[k]
		if g != nil && g.Home == nil && (st.writing || st.next != nil || st.unkept) {
			return false
		}
	}
	return true
}

// stateReady says whether a group without a home can be offered: with its state, if
// there is one.
func (s *Supervisor) stateReady(g *ownership.Group) bool {
	st := s.groupStates[g.Key]
	switch {
	case st == nil:
		return true
	case g.Blob == nil && !st.read && (st.writing || st.next != nil):
		return false // what the last home sent is not with the keeper yet
	case g.Blob == nil && !st.read:
		if !st.busy {
			st.busy = true
			go s.readGroupState(g.Key, st)
		}
		return false
	case g.Blob != nil && (st.offers >= maxStateOffers || crashesOf(g) >= maxStateOffers):
		s.log.Error("group goes on without its state, which nobody takes, or over which worker after worker dies", "group", g.Key.Name, "pool", g.Key.Pool)
		g.Blob, st.read = nil, true
	}
	return true
}

// stateOffered counts that a group is offered with its state.
func (s *Supervisor) stateOffered(g *ownership.Group) {
	if st := s.groupStates[g.Key]; st != nil && g.Blob != nil {
		st.offers++
	}
}

func (s *Supervisor) readGroupState(k ownership.GroupKey, st *groupState) {
	ctx, cancel := context.WithTimeout(s.ctx, keeperTimeout)
	defer cancel()
	key := stateKey(k)
	entries, err := s.keeper.Get(ctx, key.Kind, key.ID)
	var blob []byte
	if err == nil {
		err = errors.New("the keeper does not have it")
	}
	for i := range entries {
		if entries[i].Key == key && len(entries[i].FDs) == 1 {
			if blob, err = sys.ReadSealedMemfd(entries[i].FDs[0], wire.MaxCargo); blob == nil {
				blob = []byte{}
			}
		}
		sys.CloseAll(entries[i].FDs)
	}
	s.post(func() {
		st.busy = false
		g := s.m.Groups()[k]
		if s.groupStates[k] != st || g == nil || g.Home != nil {
			return
		}
		st.read = true
		if err != nil {
			s.log.Error("group goes on without its state", "group", k.Name, "pool", k.Pool, "error", err)
			return
		}
		if g.Blob == nil {
			g.Blob = blob
		}
	})
}

// recoverGroupStates takes over which groups have a state.
func (s *Supervisor) recoverGroupStates(ctx context.Context) error {
	list, err := s.keeper.List(ctx, keeper.KindGroup)
	if err != nil {
		return fmt.Errorf("states of groups: %w", err)
	}
	for i := range list {
		pool, name, _ := strings.Cut(list[i].Key.Name, "/")
		k := ownership.GroupKey{Pool: pool, Name: name}
		if s.pools[pool] == nil || stateKey(k) != list[i].Key {
			s.retain.delete(list[i].Key)
			continue
		}
		st := &groupState{checkpoint: len(list[i].Meta) > 0}
		if m := list[i].Meta; len(m) == 9 {
			st.size = pages(int(binary.LittleEndian.Uint64(m[1:])))
		}
		s.groupStates[k] = st
	}
	return nil
}

// dropLostStates forgets the states of groups that have ended meanwhile.
func (s *Supervisor) dropLostStates() {
	for k := range s.groupStates {
		if g := s.m.Groups()[k]; g == nil || g.Home != nil {
			s.groupDone(k)
		}
	}
}
