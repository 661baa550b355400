package supervise

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/ownership"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

// What is under way of the states of groups is bounded, however often a worker makes
// checkpoints: of each group one is being written and one waits, the newest, and so many
// are being written in all. Who asked for one that a newer one has replaced is answered
// with that one.
const (
	maxStateWrites  = 16        // at once, of all groups
	maxStateWaiting = 128 << 20 // bytes of one worker's checkpoints that wait
	maxStateAsked   = 1 << 10   // unanswered checkpoints of one group
)

// What is kept of one worker's groups is bounded as well, or a worker that has lost its
// way, or lies, could fill the machine's memory and the keeper's descriptors, of which
// every other worker's sessions need theirs.
const (
	maxStatesKept = 16 << 10 // groups
	maxStateKept  = 1 << 30  // bytes, in whole pages
)

var (
	errStateBusy  = errors.New("more checkpoints are under way than the supervisor takes at once; try again")
	errStateQuota = fmt.Errorf("the states of this worker's groups are more than are kept for one worker (%d, %d MiB): this one is not, and an earlier one of the group stays", maxStatesKept, maxStateKept>>20)
)

// quota is what is kept of one worker's groups.
type quota struct{ states, bytes int }

// pages is what the keeper's copy of so many bytes takes.
func pages(n int) int { return (max(n, 1) + 4095) &^ 4095 }

// charge counts a state as kept for a worker, nil for nobody, and no more for another.
func (st *groupState) charge(w *worker, size int) {
	if st.charged != nil {
		st.charged.kept.states--
		st.charged.kept.bytes -= st.size
	}
	if st.charged, st.size = w, size; w != nil {
		w.kept.states++
		w.kept.bytes += size
	}
}

// mayKeep says whether a worker's quota has room for a state of n bytes in the place of st,
// which may be nil. What takes no more room than before can always be kept.
func (w *worker) mayKeep(st *groupState, n int) bool {
	q := quota{w.kept.states + 1, w.kept.bytes + pages(n)}
	if st != nil && st.charged == w {
		if pages(n) <= st.size {
			return true
		}
		q.states--
		q.bytes -= st.size
	}
	return q.states <= maxStatesKept && q.bytes <= maxStateKept
}

// stateWrite is a state of a group on its way to the keeper.
type stateWrite struct {
	blob []byte
	by   *worker // whose checkpoint it is; nil: nobody has the state any more but us
	then []func(error)
}

// putGroupState has the keeper hold a group's state; then is called when it does, or does
// a newer one.
func (s *Supervisor) putGroupState(k ownership.GroupKey, blob []byte, by *worker, then func(error)) {
	st := s.groupStates[k]
	var before *stateWrite
	if st != nil {
		before = st.next
	}
	if by != nil && !by.mayCheckpoint(before, len(blob)) {
		then(errStateBusy)
		return
	}
	if by != nil && !by.mayKeep(st, len(blob)) {
		then(errStateQuota)
		return
	}
	if st == nil {
		st = &groupState{}
		s.groupStates[k] = st
	}
	var answers []func(error)
	if before != nil {
		answers = s.takeWrite(st).then
	}
	st.checkpoint = st.checkpoint || by != nil
	st.charge(by, pages(len(blob)))
	st.next = &stateWrite{blob: blob, by: by, then: append(answers, then)}
	if by != nil {
		by.waitingStates += len(blob)
	}
	s.queueWrite(k, st)
	s.writeStates()
}

// mayCheckpoint says whether there is room for a checkpoint of n bytes, which takes the
// place of before.
func (w *worker) mayCheckpoint(before *stateWrite, n int) bool {
	waiting := w.waitingStates + n
	if before != nil {
		if before.by == w {
			waiting -= len(before.blob)
		}
		if len(before.then) >= maxStateAsked {
			return false
		}
	}
	return waiting <= maxStateWaiting
}

// takeWrite returns what waits to be written of a group.
func (s *Supervisor) takeWrite(st *groupState) *stateWrite {
	w := st.next
	st.next = nil
	if w != nil && w.by != nil {
		w.by.waitingStates -= len(w.blob)
	}
	return w
}

func (s *Supervisor) queueWrite(k ownership.GroupKey, st *groupState) {
	if st.next != nil && !st.writing && !st.queued {
		st.queued = true
		s.writeQueue = append(s.writeQueue, k)
	}
}

// writeStates begins what can be begun.
func (s *Supervisor) writeStates() {
	for s.writes < maxStateWrites && len(s.writeQueue) > 0 {
		k := s.writeQueue[0]
		s.writeQueue = s.writeQueue[1:]
		st := s.groupStates[k]
		if st == nil || !st.queued {
			continue // the group is no more
		}
		st.queued = false
		if w := s.takeWrite(st); w != nil {
			s.writeState(k, st, w)
		}
	}
}

func (s *Supervisor) writeState(k ownership.GroupKey, st *groupState, w *stateWrite) {
	s.writes++
	st.writing = true
	var meta []byte
	if st.checkpoint {
		meta = binary.LittleEndian.AppendUint64([]byte{1}, uint64(len(w.blob)))
	}
	done := func(err error) {
		s.writes--
		st.writing = false
		if w.by == nil {
			st.unkept = err != nil
		}
		for _, then := range w.then {
			then(err)
		}
		if s.groupStates[k] == st {
			s.queueWrite(k, st)
		}
		s.writeStates()
	}
	go func() { // megabytes, perhaps
		fd, err := sys.SealedMemfd("ktlsvisor-group", w.blob)
		s.post(func() {
			switch {
			case err != nil:
				done(err)
			case s.groupStates[k] != st:
				sys.CloseAll([]int{fd})
				done(nil) // the group is no more
			default:
				s.retain.put(keeper.Entry{Key: stateKey(k), Meta: meta, FDs: []int{fd}}, done)
			}
		})
	}()
}

// dropState forgets the state of a group that is no more.
func (s *Supervisor) dropState(k ownership.GroupKey, st *groupState) {
	delete(s.groupStates, k)
	st.charge(nil, 0)
	s.retain.delete(stateKey(k))
	if w := s.takeWrite(st); w != nil {
		for _, then := range w.then {
			then(nil)
		}
	}
}
