package supervise

import (
	"errors"
	"testing"
)

// When the old generation cannot restore what the new one writes, sessions do not go back
// to it, also not those whose new worker has just died: they wait for another new one.
func TestNoWayBackForSessionsOfADeadWorker(t *testing.T) {
	u, old := serving(t, 6)
	young, ch := u.watched(upgradeOptions{probation: long, noReturn: true})
	young.play()
	u.awaitPhase(opProbation)
	u.s.call(func() { u.pool.op.oneWay = errors.New("the old program reads version 1 only") })
	young.kill()
	u.dead(young)
	wantLoads(t, u.loadOf(old), 0)
	third := u.worker(2)
	third.play()
	u.allOwned()
	wantLoads(t, u.loadOf(old, third), 0, 6)
	old.kill()
	if r, _ := u.report(ch); r.Returned != 0 || r.Lost != 0 {
		t.Errorf("report %+v", r)
	}
}
