package ownership

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// row is what outlives the supervisor of one session.
type row struct {
	owner uint64
	epoch wire.Epoch
	group *GroupKey
	// What the Put before the last one said.
	ownerBefore uint64
	epochBefore wire.Epoch
	kept        int // record state; -1: void
}

type client struct {
	open  bool
	state int // of the record layer: rises whenever somebody begins to serve
	ended int // how often its end was counted
}

// world is a supervisor with its memory, workers and clients. Everything that happens
// is one random step.
type world struct {
	t       *rapid.T
	rng     *rand.Rand // nil: rapid draws, and makes failures shorter
	m       *Machine
	inc     uint32
	nextID  uint64
	nextW   uint64
	live    map[uint64]*Session // of the present supervisor
	rows    map[uint64]*row
	clients map[uint64]*client
	players map[uint64]*player
	nodes   map[uint64]*Worker
	cargo   map[uint64]int // record states in the supervisor's memory
	settle  []*Session
	ready   []*GroupMove
	// While a new supervisor waits for inventories.
	recovering bool
	said       map[*Worker][]wire.Held
	crashIn    int // effects until the supervisor dies; -1: it does not
	crashed    bool
	slow       uint64 // a worker that says what it has after the wait for it
	highest    map[uint64]wire.Epoch
	frozen     map[uint64]wire.Epoch
	log        []string
	quiet      bool // no more failures
	splitIn    int  // commits of group members until the supervisor dies; 0: it does not
}

func (w *world) fail(format string, args ...any) {
	for i, l := range w.log {
		if i < storyEnds || i >= len(w.log)-storyEnds {
			w.t.Log(l)
		}
	}
	w.t.Fatalf(format, args...)
}

func (w *world) note(format string, args ...any) { w.log = append(w.log, fmt.Sprintf(format, args...)) }

func (w *world) find(id uint64) *Session { return w.live[id] }

func (w *world) before(id uint64) (uint64, wire.Epoch) {
	r := w.rows[id]
	if r == nil {
		return 0, 0
	}
	return r.ownerBefore, r.epochBefore
}

func (w *world) chance(n int) bool {
	return !w.quiet && w.choose(n) == n-1
}

// choose draws from 0 to n-1.
func (w *world) choose(n int) int {
	if w.rng != nil {
		return w.rng.IntN(n)
	}
	return rapid.IntRange(0, n-1).Draw(w.t, "choice")
}

func (w *world) oneOwner(id uint64) {
	n := 0
	for _, p := range w.players {
		if p.serving(id) {
			n++
		}
	}
	if n > 1 {
		w.fail("session %d is served by %d workers", id, n)
	}
}

// check is what must hold after every step.
func (w *world) check() {
	for id, c := range w.clients {
		w.oneOwner(id)
		r := w.rows[id]
		switch {
		case c.ended > 1:
			w.fail("the end of session %d was counted %d times", id, c.ended)
		case c.ended == 1 && r != nil:
			w.fail("session %d ended and is still in the ledger", id)
		case c.ended == 0 && r == nil:
			w.fail("session %d is forgotten", id)
		}
		for pid, p := range w.players {
			if p.serving(id) && (r == nil || r.owner != pid) {
				w.fail("worker %d serves session %d; in the ledger: %+v", pid, id, r)
			}
		}
		if !w.crashed && c.ended == 0 && w.live[id] == nil {
			w.fail("the supervisor has forgotten session %d", id)
		}
	}
}

func (w *world) newWorker() {
	w.nextW++
	w.players[w.nextW] = &player{id: w.nextW, alive: true, have: map[uint64]*copyOf{}, batches: map[string]*batch{},
		tombs: map[uint64]wire.Held{}, world: w}
	w.nodes[w.nextW] = &Worker{ID: w.nextW}
	w.note("worker %d", w.nextW)
}

func (w *world) admit() {
	w.nextID++
	id := w.nextID
	w.clients[id], w.rows[id] = &client{open: true}, &row{}
	w.cargo[id] = 0
	w.live[id] = &Session{ID: id}
	w.m.Admit(w.live[id])
	w.note("session %d", id)
	w.run()
}

// run carries out effects.
func (w *world) run() {
	for !w.crashed {
		if w.crashIn == 0 {
			w.crash()
			return
		}
		e, ok := w.m.Next()
		if !ok {
			return
		}
		if w.crashIn > 0 {
			w.crashIn--
		}
		w.do(e)
		if e.Kind == Put && e.Session.Group != nil && w.crashIn < 0 && w.chance(12) {
			w.crashIn = 0 // in the middle of a group's commit
		}
		if t := e.Try; w.splitIn > 0 && e.Kind == Put && e.Session.Group != nil && t != nil && t.From != nil && t.Joins == nil {
			if w.splitIn--; w.splitIn == 0 {
				w.splitIn, w.crashIn = 1, 0
			}
		}
	}
}

func newWorld(t *rapid.T) *world {
	w := &world{t: t, inc: 1, live: map[uint64]*Session{}, rows: map[uint64]*row{}, clients: map[uint64]*client{}, players: map[uint64]*player{},
		nodes: map[uint64]*Worker{}, cargo: map[uint64]int{}, crashIn: -1, highest: map[uint64]wire.Epoch{},
		frozen: map[uint64]wire.Epoch{}}
	w.m = New(1, w.find, w.before)
	w.newWorker()
	w.newWorker()
	return w
}

// TestRandomSchedules: messages in any order that the channels allow, workers and
// supervisors that die at any step, channels that are cut, answers that never come.
// After every step each session is served by one worker at most, and by the one that
// the ledger names; no record state is used twice; no session is forgotten; epochs only
// rise; every end is counted once. When nothing fails any more, every session is served.
func TestRandomSchedules(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t)
		for range rapid.IntRange(20, 250).Draw(t, "steps") {
			w.step()
			w.check()
		}
		w.settleDown()
	})
}

// TestLongSchedules runs longer ones, evenly drawn, that rapid cannot make shorter.
func TestLongSchedules(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		seed := rapid.Uint64().Draw(t, "seed")
		for i := range uint64(longSchedules) {
			w := newWorld(t)
			w.rng = rand.New(rand.NewPCG(seed, i))
			for range w.rng.IntN(600) {
				w.step()
				w.check()
			}
			w.settleDown()
		}
	})
}

// longSchedules is how many long schedules one seed gives.
const longSchedules = 6

// storyEnds is how much of the beginning and of the end of the story a failure tells.
const storyEnds = 400
