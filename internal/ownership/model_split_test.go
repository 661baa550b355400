package ownership

import (
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"
)

// split lets a supervisor die when it has committed some members of a group's move and
// not all; often there is a worker then that says late what it has, or lies.
func (w *world) split(key GroupKey) {
	w.quiet = true
	for w.usable() < 3 {
		w.newWorker()
	}
	for range 4 - min(len(w.rows), 4) {
		w.admit()
	}
	inc := w.inc
	for range 300 {
		busy := w.proceed()
		w.check()
		if w.inc != inc {
			return
		}
		if busy || w.recovering {
			w.recovered()
			continue
		}
		for t := range w.m.Tries() { // an answer that never comes
			w.m.Undo(t.Session)
			w.run()
			break
		}
		in := 0
		for _, id := range sortedKeys(w.live) {
			s, g := w.live[id], w.m.Groups()[key]
			switch {
			case s.Group != nil && s.Group == g:
				in++
			case s.Group != nil || s.Phase() != PhaseOwned || s.Withheld || !s.Owner.Usable() || g != nil && w.m.Split(g):
			case g == nil || g.Home == s.Owner && g.Move == nil:
				w.m.Join(s, key)
			case g.Move == nil && g.Home != nil && g.Home.Usable():
				w.m.Freeze(s, &key)
			}
			w.run()
		}
		if in >= 2 && w.splitIn == 0 {
			w.note("the group of %d moves, and is split", in)
			if w.m.FreezeGroup(w.m.Groups()[key]) != nil {
				w.splitIn = 1 + w.choose(in-1)
			}
			w.run()
		}
	}
	w.quiet, w.splitIn = false, 0
}

// TestSplitGroups: supervisors die in the middle of the commits of groups, again and again,
// with workers that say late what they have, or say what is not so. A group comes together
// at one worker, with the record states that are good there.
func TestSplitGroups(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t)
		w.rng = rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		for range 3 {
			w.split(GroupKey{Name: "a"})
			for range w.rng.IntN(40) {
				w.step()
				w.check()
			}
		}
		w.settleDown()
	})
}
