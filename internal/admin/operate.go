package admin

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"path/filepath"
	"time"
)

// MaxWorkers is how many workers a pool can be scaled to.
const MaxWorkers = 1024

// maxWatch bounds soak and probation.
const maxWatch = 24 * time.Hour

// ScaleRequest asks for another number of workers; sessions are spread over them.
type ScaleRequest struct {
	Pool    string        `json:"pool,omitempty"` // may be left out when there is one
	Workers int           `json:"workers"`
	Wait    time.Duration `json:"wait,omitempty"` // how long sessions are asked to move; 0: 30 s
	Queue   bool          `json:"queue,omitempty"`
}

// DrainRequest asks for a worker to be emptied, ended and replaced.
type DrainRequest struct {
	PID   int           `json:"pid"`
	Wait  time.Duration `json:"wait,omitempty"`
	Queue bool          `json:"queue,omitempty"`
}

// RebalanceRequest asks for the sessions of a pool to be spread over its workers.
type RebalanceRequest struct {
	Pool  string        `json:"pool,omitempty"` // may be left out when there is one
	Wait  time.Duration `json:"wait,omitempty"`
	Queue bool          `json:"queue,omitempty"`
}

// AbortRequest asks for what is under way in a pool, or in all, to be taken back.
type AbortRequest struct {
	Pool string `json:"pool,omitempty"`
}

// TaskReport is what a scale, a drain or a rebalance did.
type TaskReport struct {
	Outcome       Outcome        `json:"exit_code"`
	Operation     string         `json:"operation"` // scale, drain, rebalance
	Pool          string         `json:"pool"`
	WorkersBefore int            `json:"workers_before"` // that the pool is to have
	Workers       int            `json:"workers"`
	Moved         int            `json:"moved"`
	Stayed        int            `json:"stayed"` // still with a worker that is to go
	Drained       int            `json:"drained"`
	Interrupted   int            `json:"interrupted"`
	Lost          int            `json:"lost"`
	Closed        int            `json:"closed"`
	Reasons       map[string]int `json:"reasons,omitempty"`
	StallP50      float64        `json:"stall_p50_ms"`
	StallP99      float64        `json:"stall_p99_ms"`
	StallMax      float64        `json:"stall_max_ms"`
	StartedPIDs   []int          `json:"started_pids"`
	StoppedPIDs   []int          `json:"stopped_pids"`
	Spread        []WorkerStatus `json:"spread"` // the pool's workers, afterwards
	Aborted       bool           `json:"aborted,omitempty"`
	Error         string         `json:"error,omitempty"`
	DurationSecs  float64        `json:"duration_seconds"`
}

// MarshalJSON writes lists without an element as [], which scripts can count.
func (r TaskReport) MarshalJSON() ([]byte, error) {
	type plain TaskReport
	if r.StartedPIDs == nil {
		r.StartedPIDs = []int{}
	}
	if r.StoppedPIDs == nil {
		r.StoppedPIDs = []int{}
	}
	if r.Spread == nil {
		r.Spread = []WorkerStatus{}
	}
	return json.Marshal(plain(r))
}

// UpgradePlan is what an upgrade would do. Outcome is OutcomeMoved when every session
// could move now, OutcomeStay when some could not, OutcomeRefused when it would be
// refused.
type UpgradePlan struct {
	Outcome Outcome    `json:"exit_code"`
	Pools   []PoolPlan `json:"pools"`
	Error   string     `json:"error,omitempty"` // why it would be refused
}

// PoolPlan is one pool's part of an UpgradePlan.
type PoolPlan struct {
	Pool       string       `json:"pool"`
	From       uint32       `json:"from_generation"`
	To         uint32       `json:"to_generation"`
	Command    []string     `json:"command"`
	Workers    int          `json:"workers"`
	Sessions   int          `json:"sessions"`
	Groups     int          `json:"groups"`
	Movable    int          `json:"movable_now"`
	AfterDrain int          `json:"after_drain"` // when they reach a safe point, or end
	Never      int          `json:"never"`
	Reasons    []PlanReason `json:"reasons"`
	// EstimateSecs is how long it would take to start the workers and move what is
	// movable now; EstimateFrom says where the number comes from.
	EstimateSecs float64  `json:"estimate_seconds"`
	EstimateFrom string   `json:"estimate_from"`
	NotChecked   []string `json:"not_checked"` // what only the upgrade itself finds out
	// Probed: a worker of the new program was asked. OneWay: it said that the old one
	// could not restore what it writes.
	Probed bool   `json:"probed,omitempty"`
	OneWay string `json:"one_way,omitempty"`
	Error  string `json:"error,omitempty"`
}

// PlanReason says why sessions would not move now.
type PlanReason struct {
	Class    string   `json:"class"` // after_drain, never
	Why      string   `json:"why"`
	Sessions int      `json:"sessions"`
	Examples []string `json:"examples"` // at most 5 of them
}

// MarshalJSON writes lists without an element as [].
func (r UpgradePlan) MarshalJSON() ([]byte, error) {
	type plain UpgradePlan
	if r.Pools == nil {
		r.Pools = []PoolPlan{}
	}
	return json.Marshal(plain(r))
}

// MarshalJSON writes lists without an element as [].
func (r PoolPlan) MarshalJSON() ([]byte, error) {
	type plain PoolPlan
	if r.Reasons == nil {
		r.Reasons = []PlanReason{}
	}
	if r.NotChecked == nil {
		r.NotChecked = []string{}
	}
	return json.Marshal(plain(r))
}

func (r *UpgradeRequest) check() error {
	switch {
	case r.Command != "" && !filepath.IsAbs(r.Command):
		return fmt.Errorf("command %q is not an absolute path: %w", r.Command, ErrBadRequest)
	case !(r.Canary >= 0 && r.Canary < 100):
		return fmt.Errorf("a canary of %v percent is not possible: more than 0, less than 100: %w", r.Canary, ErrBadRequest)
	case r.Soak < 0 || r.Soak > maxWatch:
		return fmt.Errorf("soak %s is not possible, up to %s are: %w", r.Soak, maxWatch, ErrBadRequest)
	case r.Rate < 0:
		return fmt.Errorf("a rate of %d sessions a second is not possible: %w", r.Rate, ErrBadRequest)
	case r.Soak > 0 && r.Canary == 0:
		return fmt.Errorf("a soak needs a canary: %w", ErrBadRequest)
	case r.Probation != nil && (*r.Probation < 0 || *r.Probation > maxWatch):
		return fmt.Errorf("probation %s is not possible, up to %s are: %w", *r.Probation, maxWatch, ErrBadRequest)
	}
	return checkWait(r.Wait)
}

func checkWait(wait time.Duration) error {
	if wait < 0 {
		return fmt.Errorf("wait %s is negative: %w", wait, ErrBadRequest)
	}
	return nil
}

func (r *ScaleRequest) check() error {
	if r.Workers < 1 || r.Workers > MaxWorkers {
		return fmt.Errorf("%d workers are not possible, 1 to %d are: %w", r.Workers, MaxWorkers, ErrBadRequest)
	}
	return checkWait(r.Wait)
}

func (r *DrainRequest) check() error {
	if r.PID < 1 {
		return fmt.Errorf("%d is no pid: %w", r.PID, ErrBadRequest)
	}
	return checkWait(r.Wait)
}

func (r *RebalanceRequest) check() error { return checkWait(r.Wait) }
func (r *AbortRequest) check() error     { return nil }

// request is a pointer to a request of type R that can be checked.
type request[R any] interface {
	*R
	check() error
}

// handle serves an operation with requests of one type.
func handle[R any, P request[R], A any](s *server, mux *http.ServeMux, path, name string, f func(context.Context, R, func(Progress)) (A, error)) {
	mux.HandleFunc("POST /v1/"+path, func(w http.ResponseWriter, r *http.Request) {
		var req R
		if !s.decode(w, r, &req) {
			return
		}
		if err := P(&req).check(); err != nil {
			s.fail(w, err)
			return
		}
		s.operation(w, r, name, func(ctx context.Context, progress func(Progress)) (any, error) {
			return f(ctx, req, progress)
		})
	})
}

func (s *server) handleOperations(mux *http.ServeMux) {
	handle(s, mux, "upgrade-plan", "plan of an upgrade", func(ctx context.Context, r UpgradeRequest, _ func(Progress)) (*UpgradePlan, error) {
		return s.backend.Plan(ctx, r)
	})
	handle(s, mux, "abort", "abort", s.backend.Abort)
	handle(s, mux, "scale", "scale", s.backend.Scale)
	handle(s, mux, "drain", "drain", s.backend.Drain)
	handle(s, mux, "rebalance", "rebalance", s.backend.Rebalance)
}

// Plan asks what an upgrade would do.
func (c *Client) Plan(ctx context.Context, r UpgradeRequest) (*UpgradePlan, error) {
	return ask[UpgradePlan](ctx, c, "/v1/upgrade-plan", &r, r, nil)
}

// Abort takes back what is under way in a pool, or in all; otherwise as Upgrade.
func (c *Client) Abort(ctx context.Context, r AbortRequest, progress func(Progress)) (*UpgradeReport, error) {
	return ask[UpgradeReport](ctx, c, "/v1/abort", &r, r, progress)
}

// Scale changes how many workers a pool has; otherwise as Upgrade.
func (c *Client) Scale(ctx context.Context, r ScaleRequest, progress func(Progress)) (*TaskReport, error) {
	return ask[TaskReport](ctx, c, "/v1/scale", &r, r, progress)
}

// Drain empties, ends and replaces a worker; otherwise as Upgrade.
func (c *Client) Drain(ctx context.Context, r DrainRequest, progress func(Progress)) (*TaskReport, error) {
	return ask[TaskReport](ctx, c, "/v1/drain", &r, r, progress)
}

// Rebalance spreads the sessions of a pool over its workers; otherwise as Upgrade.
func (c *Client) Rebalance(ctx context.Context, r RebalanceRequest, progress func(Progress)) (*TaskReport, error) {
	return ask[TaskReport](ctx, c, "/v1/rebalance", &r, r, progress)
}

func ask[A any](ctx context.Context, c *Client, path string, check interface{ check() error }, req any, progress func(Progress)) (*A, error) {
	if err := check.check(); err != nil {
		return nil, err
	}
	var a A
	if err := c.operate(ctx, path, req, &a, progress); err != nil {
		return nil, err
	}
	return &a, nil
}
