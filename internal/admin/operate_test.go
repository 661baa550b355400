package admin

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// operations is the part of a Backend that answers what it was asked.
type operations struct{ asked any }

func (o *operations) Plan(_ context.Context, r UpgradeRequest) (*UpgradePlan, error) {
	o.asked = r
	return &UpgradePlan{Outcome: OutcomeStay, Pools: []PoolPlan{{Pool: "p", Movable: 3, AfterDrain: 1,
		Reasons: []PlanReason{{Class: "after_drain", Why: "x", Sessions: 1, Examples: []string{"s1"}}}, NotChecked: []string{"y"}}}}, nil
}

func (o *operations) Abort(_ context.Context, r AbortRequest, _ func(Progress)) (*UpgradeReport, error) {
	o.asked = r
	return nil, errors.New("nothing is under way")
}

func (o *operations) task(name string, p func(Progress)) (*TaskReport, error) {
	p(Progress{Text: name})
	return &TaskReport{Operation: name, Pool: "p", Workers: 3, Moved: 7, StoppedPIDs: []int{1}, StartedPIDs: []int{2}, Spread: []WorkerStatus{{PID: 2}}}, nil
}

func (o *operations) Scale(_ context.Context, r ScaleRequest, p func(Progress)) (*TaskReport, error) {
	o.asked = r
	return o.task("scale", p)
}

func (o *operations) Drain(_ context.Context, r DrainRequest, p func(Progress)) (*TaskReport, error) {
	o.asked = r
	return o.task("drain", p)
}

func (o *operations) Rebalance(_ context.Context, r RebalanceRequest, p func(Progress)) (*TaskReport, error) {
	o.asked = r
	return o.task("rebalance", p)
}

// What a client asks arrives as it was asked, and the answer comes back whole.
func TestOperationsRoundTrip(t *testing.T) {
	b := &fakeBackend{}
	path, _, _ := serve(t, b)
	c, ctx := Dial(path), context.Background()
	var said []string
	say := func(p Progress) { said = append(said, p.Text) }
	same := func(got, want any) {
		t.Helper()
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("-want +got\n%s", d)
		}
	}
	probation := time.Duration(0)
	ur := UpgradeRequest{Pool: "p", Command: "/bin/true", Canary: 2.5, Soak: time.Minute, Probation: &probation, NoReturn: true, Rate: 7, Queue: true}
	plan, err := c.Plan(ctx, ur)
	want, _ := (&operations{}).Plan(ctx, ur)
	if err != nil {
		t.Fatal(err)
	}
	same(plan, want)
	same(b.asked, ur)
	for name, f := range map[string]func() (*TaskReport, any, error){
		"scale": func() (*TaskReport, any, error) {
			r := ScaleRequest{Pool: "p", Workers: 3, Wait: time.Second, Queue: true}
			a, err := c.Scale(ctx, r, say)
			return a, r, err
		},
		"drain": func() (*TaskReport, any, error) {
			r := DrainRequest{PID: 17, Wait: time.Second}
			a, err := c.Drain(ctx, r, say)
			return a, r, err
		},
		"rebalance": func() (*TaskReport, any, error) {
			r := RebalanceRequest{Pool: "p"}
			a, err := c.Rebalance(ctx, r, say)
			return a, r, err
		},
	} {
		said = nil
		got, asked, err := f()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		same(b.asked, asked)
		want, _ := b.task(name, func(Progress) {})
		same(got, want)
		same(said, []string{name})
	}
	if _, err := c.Abort(ctx, AbortRequest{Pool: "p"}, nil); err == nil || !strings.Contains(err.Error(), "nothing is under way") {
		t.Errorf("abort: %v", err)
	}
	same(b.asked, AbortRequest{Pool: "p"})
}

// What makes no sense is refused on both sides of the socket.
func TestOperationsThatMakeNoSense(t *testing.T) {
	b := &fakeBackend{}
	path, _, _ := serve(t, b)
	c, ctx := Dial(path), context.Background()
	long, negative := 25*time.Hour, -time.Second
	for path, reqs := range map[string][]interface{ check() error }{
		"/v1/upgrade-plan": {&UpgradeRequest{Command: "relative"}, &UpgradeRequest{Canary: 100}, &UpgradeRequest{Canary: -1}, &UpgradeRequest{Rate: -1},
			&UpgradeRequest{Soak: time.Second}, &UpgradeRequest{Canary: 5, Soak: negative}, &UpgradeRequest{Probation: &long}, &UpgradeRequest{Probation: &negative}},
		"/v1/scale":     {&ScaleRequest{}, &ScaleRequest{Workers: MaxWorkers + 1}, &ScaleRequest{Workers: 1, Wait: -1}},
		"/v1/drain":     {&DrainRequest{}, &DrainRequest{PID: 1, Wait: -1}},
		"/v1/rebalance": {&RebalanceRequest{Wait: -1}},
	} {
		for _, r := range reqs {
			b.asked = nil
			if err := c.operate(ctx, path, r, &struct{}{}, nil); !errors.Is(err, ErrBadRequest) || b.asked != nil {
				t.Errorf("%s %+v: %v, and %+v was asked", path, r, err, b.asked)
			}
			if err := r.check(); !errors.Is(err, ErrBadRequest) {
				t.Errorf("%s %+v: the client lets it pass: %v", path, r, err)
			}
		}
	}
	if err := (&UpgradeRequest{Canary: math.NaN()}).check(); err == nil {
		t.Error("NaN percent are taken")
	}
}

// Scripts count what is in lists.
func TestEmptyListsAreLists(t *testing.T) {
	for _, v := range []any{TaskReport{}, UpgradePlan{Pools: []PoolPlan{{Command: []string{"x"}}}}, UpgradePlan{}} {
		b, err := json.Marshal(v)
		if err != nil || strings.Contains(string(b), "null") {
			t.Errorf("%s (%v)", b, err)
		}
	}
}
