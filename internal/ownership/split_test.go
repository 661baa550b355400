package ownership

import (
	"slices"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// taken is a new machine over a group of two, of which session 1 was committed to worker 3
// and had been worker 1's, and session 2 is worker 1's, or another's.
func taken(owner2 uint64) (m *Machine, ws map[uint64]*Worker, s1, s2 *Session) {
	key := GroupKey{Name: "g"}
	s1, s2 = &Session{ID: 1, Epoch: 50}, &Session{ID: 2, Epoch: 20}
	live := map[uint64]*Session{1: s1, 2: s2}
	m = New(9, func(id uint64) *Session { return live[id] }, func(id uint64) (uint64, wire.Epoch) {
		if id == 1 {
			return 1, 30
		}
		return 0, 0
	})
	ws = map[uint64]*Worker{}
	for id := uint64(1); id <= 3; id++ {
		ws[id] = &Worker{ID: id, Awaited: true}
	}
	m.Restore(s1, ws[3], &key)
	m.Restore(s2, ws[owner2], &key)
	return m, ws, s1, s2
}

func held(id uint64, e wire.Epoch, p wire.Phase, attempt wire.Epoch) wire.Held {
	return wire.Held{Ref: wire.Ref{ID: id, Epoch: e}, Phase: p, Attempt: attempt, Group: "g"}
}

// messages drains a machine and says what goes to whom.
func messages(m *Machine) (out []string) {
	for {
		e, ok := m.Next()
		if !ok {
			slices.Sort(out)
			return out
		}
		if e.Worker != nil && e.Session != nil {
			out = append(out, e.Kind.String()+" "+string(rune('0'+e.Session.ID))+" to "+string(rune('0'+e.Worker.ID)))
		}
	}
}

// A group's move that was committed in part is undone by the word of the worker that had
// the session before, by the ledger, about that attempt; by no other word.
func TestWhoseWordUndoesASplit(t *testing.T) {
	for name, c := range map[string]struct {
		who    uint64
		x      wire.Held
		new    wire.Phase
		undone bool
	}{
		"true":                        {1, held(1, 30, wire.PhaseParked, 50), wire.PhaseAdopted, true},
		"of an earlier attempt":       {1, held(1, 30, wire.PhaseParked, 40), wire.PhaseAdopted, false},
		"of an earlier ownership":     {1, held(1, 10, wire.PhaseParked, 50), wire.PhaseAdopted, false},
		"of another worker":           {2, held(1, 30, wire.PhaseParked, 50), wire.PhaseAdopted, false},
		"of a session that is served": {1, held(1, 30, wire.PhaseParked, 50), wire.PhaseActive, false},
	} {
		t.Run(name, func(t *testing.T) {
			m, ws, s1, _ := taken(c.who)
			said := map[*Worker][]wire.Held{
				ws[c.who]: {c.x, held(2, 20, wire.PhaseParked, 51)},
				ws[3]:     {held(1, 50, c.new, 0)},
			}
			m.Reconcile(said)
			got := messages(m)
			want, owner := []string{"RELEASE 1 to " + string(rune('0'+c.who)), "RESUME 1 to 3"}, ws[3]
			if c.undone {
				want, owner = []string{"ABORT 1 to 3", "THAW 1 to 1"}, ws[1]
			} else if c.new == wire.PhaseActive {
				want = want[:1]
			}
			for _, s := range want {
				if !slices.Contains(got, s) {
					t.Errorf("%v, want %s", got, s)
				}
			}
			if s1.Owner != owner {
				t.Errorf("worker %d owns it, want %d", s1.Owner.ID, owner.ID)
			}
		})
	}
}

// While the old home has not said what it has, the new one does not go on with what it has
// of the group; it does when the old one says that it has it no more, has come to its end,
// or when nobody wants to wait any longer.
func TestSplitWithALateOldHome(t *testing.T) {
	for name, c := range map[string]struct {
		then func(m *Machine, old *Worker)
		want string
	}{
		"it has it": {func(m *Machine, old *Worker) {
			m.Reconcile(map[*Worker][]wire.Held{old: {held(1, 30, wire.PhaseParked, 50), held(2, 20, wire.PhaseParked, 51)}})
		}, "THAW 1 to 1"},
		"it has it no more": {func(m *Machine, old *Worker) {
			m.Reconcile(map[*Worker][]wire.Held{old: {held(2, 20, wire.PhaseActive, 0)}})
		}, "RESUME 1 to 3"},
		"it is dead": {func(m *Machine, old *Worker) { m.Dead(old) }, "RESUME 1 to 3"},
		"it is cut":  {func(m *Machine, old *Worker) { m.Cut(old, false) }, "RESUME 1 to 3"},
		"time is up": {func(m *Machine, old *Worker) { m.ResumeWithheld() }, "RESUME 1 to 3"},
	} {
		t.Run(name, func(t *testing.T) {
			m, ws, s1, _ := taken(1)
			m.Reconcile(map[*Worker][]wire.Held{ws[3]: {held(1, 50, wire.PhaseAdopted, 0)}})
			if got := messages(m); len(got) != 0 || m.Waiting() != 1 || !m.Split(s1.Group) {
				t.Fatalf("%v before the old home was heard, %d wait", got, m.Waiting())
			}
			c.then(m, ws[1])
			if got := messages(m); !slices.Contains(got, c.want) || m.Waiting() != 0 {
				t.Errorf("%v, %d wait, want %s", got, m.Waiting(), c.want)
			}
		})
	}
	t.Run("the new one is cut", func(t *testing.T) { // it has forgotten it, and must not keep it
		m, ws, _, _ := taken(1)
		m.Reconcile(map[*Worker][]wire.Held{ws[3]: {held(1, 50, wire.PhaseAdopted, 0)}})
		m.Cut(ws[3], true)
		killed := false
		for e, ok := m.Next(); ok; e, ok = m.Next() {
			killed = killed || e.Kind == Kill && e.Worker == ws[3]
		}
		if !killed {
			t.Error("a worker that has forgotten what it owns lives on")
		}
	})
}
