package supervise

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"sort"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/ownership"
)

// What an upgrade would do, by what the supervisor knows: nothing is started, and no
// worker is asked, but for one of the new program where that is wanted (probe.go).

const (
	// rateSample is how many moves make a rate that is worth remembering.
	rateSample = 20
	// assumedRate is what is assumed of moves in a second before any was measured.
	assumedRate = 2000
	// assumedStart is what is assumed of a worker's start before any was measured.
	assumedStart = time.Second
	planExamples = 5
)

const (
	classDrain = "after_drain"
	classNever = "never"
)

// Plan says what an upgrade would do.
func (b *backend) Plan(ctx context.Context, r admin.UpgradeRequest) (*admin.UpgradePlan, error) {
	s := b.s
	plan := &admin.UpgradePlan{}
	var err error
	if !s.call(func() {
		for _, c := range s.cfg.Pools {
			if r.Pool == "" || r.Pool == c.Name {
				plan.Pools = append(plan.Pools, s.planPool(s.pools[c.Name], &r))
			}
		}
		switch {
		case len(plan.Pools) == 0:
			err = fmt.Errorf("%w: there is no pool %q", admin.ErrBadRequest, r.Pool)
		case r.Command != "" && len(plan.Pools) != 1:
			err = fmt.Errorf("%w: a new command is for one pool; name it", admin.ErrBadRequest)
		}
	}) {
		return nil, errEnding
	}
	if err != nil {
		return nil, err
	}
	busy := b.busyError()
	for i := range plan.Pools {
		p := &plan.Pools[i]
		if busy != nil && p.Error == "" {
			p.Error = busy.Error()
		}
		if r.Probe && p.Error == "" {
			if err := b.probePlan(ctx, &r, p); err != nil {
				return nil, err
			}
		}
		switch {
		case p.Error != "":
			plan.Outcome = admin.OutcomeRefused
			if plan.Error == "" {
				plan.Error = p.Error
			}
		case p.AfterDrain+p.Never > 0 && plan.Outcome == admin.OutcomeMoved:
			plan.Outcome = admin.OutcomeStay
		}
	}
	return plan, nil
}

func (s *Supervisor) planPool(p *pool, r *admin.UpgradeRequest) admin.PoolPlan {
	out := admin.PoolPlan{Pool: p.name, From: p.serving, To: p.newest + 1, Workers: p.cfg.Workers,
		Command: slices.Clone(p.command)}
	if r.Command != "" {
		out.Command[0] = r.Command
	}
	if _, err := resolve(out.Command[0]); err != nil {
		out.Error = err.Error()
	}
	if p.op != nil && !r.Queue {
		out.Error = p.op.busy().Error()
	}
	c := classifier{s: s, now: s.now(), groups: map[*ownership.Group]verdict{}}
	type key struct{ class, why string }
	found := map[key]*admin.PlanReason{}
	for _, id := range slices.Sorted(maps.Keys(s.sessions)) {
		ss := s.sessions[id]
		if ss.pool != p {
			continue
		}
		out.Sessions++
		v := c.classify(ss)
		switch v.class {
		case classDrain:
			out.AfterDrain++
		case classNever:
			out.Never++
		default:
			out.Movable++
			continue
		}
		f := found[key(v)]
		if f == nil {
			f = &admin.PlanReason{Class: v.class, Why: v.why}
			found[key(v)] = f
		}
		f.Sessions++
		if len(f.Examples) < planExamples {
			f.Examples = append(f.Examples, sid(id))
		}
	}
	for k := range s.m.Groups() {
		if k.Pool == p.name {
			out.Groups++
		}
	}
	for _, f := range found {
		out.Reasons = append(out.Reasons, *f)
	}
	sort.Slice(out.Reasons, func(i, j int) bool {
		a, b := out.Reasons[i], out.Reasons[j]
		if a.Sessions != b.Sessions {
			return a.Sessions > b.Sessions
		}
		return a.Why < b.Why
	})
	s.estimate(p, cmp.Or(r.Rate, p.cfg.MoveRate), &out)
	out.NotChecked = p.notChecked(false)
	return out
}

// estimate says how long the start of the workers and the moves would take, and how
// that is known. limit is how many may move in a second, 0 for no limit.
func (s *Supervisor) estimate(p *pool, limit int, out *admin.PoolPlan) {
	start, rate, from := p.startTook, p.rate, ""
	if start > 0 {
		from = fmt.Sprintf("the last worker took %s to get ready", start.Round(10*time.Millisecond))
	} else {
		start, from = assumedStart, fmt.Sprintf("assumed: %s for a worker to get ready", assumedStart)
	}
	if rate > 0 {
		from += fmt.Sprintf("; the last operation moved %.0f sessions in a second", rate)
	} else {
		rate = assumedRate
		from += fmt.Sprintf("; assumed: %d moves in a second", assumedRate)
	}
	if limit > 0 && rate > float64(limit) {
		rate = float64(limit)
		from += fmt.Sprintf("; limited to %d in a second", limit)
	}
	out.EstimateSecs, out.EstimateFrom = start.Seconds()+float64(out.Movable)/rate, from
}

// verdict is what would become of a session; class is empty when it could move now.
type verdict struct{ class, why string }

type classifier struct {
	s      *Supervisor
	now    time.Time
	groups map[*ownership.Group]verdict
}

// classify says whether a session could move now. A group is as movable as the least
// movable of its members.
func (c *classifier) classify(ss *session) verdict {
	g := ss.Group
	if g == nil {
		return c.alone(ss)
	}
	v, ok := c.groups[g]
	if !ok {
		for _, m := range g.Members {
			w := c.alone(sessionOf(m))
			if w.class == classNever || w.class != "" && v.class == "" {
				v = w
			}
			if v.class == classNever {
				break
			}
		}
		if v.class != "" {
			v.why = fmt.Sprintf("its group of %d moves whole, and of one member: %s", len(g.Members), v.why)
		}
		c.groups[g] = v
	}
	return v
}

func (c *classifier) alone(ss *session) verdict {
	w := ss.owner()
	if w == nil {
		return verdict{} // between two workers; it goes to whoever serves then
	}
	switch {
	case w.state == workerDetached:
		return verdict{classNever, fmt.Sprintf("its worker (pid %d) broke the protocol and cannot be reached; it ends there", w.pid)}
	case w.ch == nil:
		return verdict{classDrain, fmt.Sprintf("its worker (pid %d) is ending", w.pid)}
	case w.inventory != nil:
		return verdict{classDrain, fmt.Sprintf("its worker (pid %d) has not yet said what it has, since the supervisor was restarted", w.pid)}
	case w.deaf:
		return verdict{classDrain, fmt.Sprintf("its worker (pid %d) does not answer at the moment", w.pid)}
	}
	if _, err := ss.allFacts(c.s.led); err != nil {
		return verdict{classNever, "its facts cannot be read"}
	}
	if st, ok := ss.pool.stays[ss.ID]; ok {
		return verdict{classDrain, "when it was last asked: " + st.why}
	}
	return verdict{}
}
