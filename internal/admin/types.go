// Package admin is the supervisor's admin API: HTTP with JSON over a Unix socket
// of mode 0600 that only the supervisor's own uid and root may use.
package admin

import (
	"context"
	"encoding/json"
	"time"
)

// Status is the answer of `ktlsvisor status --json`. Scripts depend on it: fields
// may be added, none renamed.
type Status struct {
	Supervisor SupervisorStatus  `json:"supervisor"`
	Kernel     KernelStatus      `json:"kernel"`
	Listeners  []ListenerStatus  `json:"listeners"`
	Pools      []PoolStatus      `json:"pools"`
	Sessions   SessionTotals     `json:"sessions"`
	Counters   Counters          `json:"counters"`
	Reasons    map[string]uint64 `json:"closed_reasons,omitempty"`
	Handshakes HandshakeCounters `json:"handshakes"`
}

// SupervisorStatus describes the running supervisor.
type SupervisorStatus struct {
	PID           int     `json:"pid"`
	Version       string  `json:"version"`
	Generation    uint32  `json:"generation"` // 1 for the first, one more for each successor
	UptimeSeconds float64 `json:"uptime_seconds"`
	KeeperPID     int     `json:"keeper_pid"`
	ReadyMillis   int64   `json:"ready_millis"` // how long this supervisor took from its start to serving
}

// KernelStatus says what the kernel can do.
type KernelStatus struct {
	Release string `json:"release"`
	KTLS    bool   `json:"ktls"`
	Rekey   bool   `json:"rekey"`
	Reason  string `json:"reason,omitempty"` // why not, with the remedy
}

// ListenerStatus is one listener.
type ListenerStatus struct {
	Address string `json:"address"` // as bound: with the real port
	Pool    string `json:"pool"`
}

// PoolStatus is one pool.
type PoolStatus struct {
	Name       string         `json:"name"`
	Generation uint32         `json:"generation"`
	Command    []string       `json:"command"`
	Upgrading  bool           `json:"upgrading,omitempty"`
	Operation  string         `json:"operation,omitempty"` // what is under way, for people
	Wanted     int            `json:"wanted_workers"`
	Workers    []WorkerStatus `json:"workers"`
	// Quarantine is the worker that has the sessions in whose handling workers died.
	Quarantine *WorkerStatus `json:"quarantine,omitempty"`
}

// WorkerStatus is one worker process.
type WorkerStatus struct {
	PID        int    `json:"pid"`
	Generation uint32 `json:"generation"`
	State      string `json:"state"` // starting, ready, retiring, dying
	Sessions   int    `json:"sessions"`
	Unhealthy  string `json:"unhealthy,omitempty"` // why it is not well: it says so, or it does not answer
	Behind     bool   `json:"behind,omitempty"`    // it has not answered since it was told to go on with a session
	CrashExact bool   `json:"crash_exact"`         // it keeps journals: its sessions in the software layer outlive it
	Exposed    uint64 `json:"exposed,omitempty"`   // sessions for which there was no room (crash_memory): its crash is their end, or of what they committed
}

// SessionTotals counts live sessions by record layer, and those without an owner.
type SessionTotals struct {
	Total    int `json:"total"`
	Kernel   int `json:"kernel"`
	Software int `json:"software"`
	Relay    int `json:"relay"`
	Parked   int `json:"parked"`
}

// Counters count since the unit started; they survive supervisor restarts.
type Counters struct {
	Accepted      uint64 `json:"accepted"`
	Moved         uint64 `json:"moved"`
	Returned      uint64 `json:"returned"`
	Interrupted   uint64 `json:"interrupted"`
	Lost          uint64 `json:"lost"`
	ClosedByPeer  uint64 `json:"closed_by_peer"`
	ClosedByOwner uint64 `json:"closed_by_owner"`
	// ClosedUnknown counts sessions that ended while no supervisor ran and whose
	// worker could not say how.
	ClosedUnknown uint64 `json:"closed_unknown"`
	// KeyUpdates counts keys changed in the kernel, either direction.
	KeyUpdates uint64 `json:"key_updates"`
	// Hangs counts workers that were killed because they did not answer.
	Hangs uint64 `json:"hangs"`
	// Quarantined counts sessions that were put into quarantine, because a worker died
	// while it was handling them.
	Quarantined uint64 `json:"quarantined"`
}

// HandshakeCounters count connections that never became sessions.
type HandshakeCounters struct {
	Failed   uint64 `json:"failed"`
	TimedOut uint64 `json:"timed_out"`
	Refused  uint64 `json:"refused"` // over max_sessions, or no worker
}

// Session is one line of `ktlsvisor sessions`.
type Session struct {
	ID         string  `json:"id"`
	Peer       string  `json:"peer"`
	Pool       string  `json:"pool"`
	WorkerPID  int     `json:"worker_pid"`
	Phase      string  `json:"phase"` // owned, moving, parked
	Layer      string  `json:"layer"`
	Version    string  `json:"version"`
	Suite      string  `json:"suite"`
	ServerName string  `json:"server_name,omitempty"`
	ALPN       string  `json:"alpn,omitempty"`
	Group      string  `json:"group,omitempty"`
	AgeSeconds float64 `json:"age_seconds"`
	Moves      uint32  `json:"moves"`
	Reason     string  `json:"reason,omitempty"` // why not in the kernel
	CrashExact bool    `json:"crash_exact"`      // a crash of its worker is not its end
}

// UpgradeRequest asks for an upgrade of one pool, or of all when Pool is empty.
type UpgradeRequest struct {
	Pool    string        `json:"pool,omitempty"`
	Command string        `json:"command,omitempty"` // new program for the pool, absolute path
	Wait    time.Duration `json:"wait,omitempty"`    // how long to ask sessions at no safe point again; 0: 30 s
	// Canary is the part of the sessions, in percent, that moves first and is watched
	// for Soak (0: 30 s). 0: everything moves at once. Up to 99.
	Canary float64       `json:"canary,omitempty"`
	Soak   time.Duration `json:"soak,omitempty"`
	// Probation is how long the old generation is kept after everything has moved; nil
	// is the pool's own.
	Probation *time.Duration `json:"probation,omitempty"`
	// NoReturn allows a canary or a probation although the old program cannot restore
	// what the new one writes.
	NoReturn bool `json:"no_return,omitempty"`
	// Rate is how many sessions may move in a second, at most; 0 is the pool's own
	// (move_rate).
	Rate int `json:"rate,omitempty"`
	// Queue waits for the operation that is under way, instead of being refused.
	Queue bool `json:"queue,omitempty"`
	// Probe has Plan start one worker of the new program, without a session, and ask it
	// which states it restores.
	Probe bool `json:"probe,omitempty"`
}

// Outcome is the result of an upgrade or of a change of keys; its value is the command's exit code.
type Outcome int

// Outcomes, by the command-line contract.
const (
	OutcomeMoved   Outcome = 0 // everything moved
	OutcomeRefused Outcome = 1 // refused or rolled back, nothing lost
	OutcomeLost    Outcome = 3 // something was lost
	OutcomeStay    Outcome = 4 // some sessions stay as they are, with the old generation or the old keys, for now
)

// UpgradeReport is what an upgrade did.
type UpgradeReport struct {
	Outcome      Outcome      `json:"exit_code"`
	Pools        []PoolReport `json:"pools"`
	Error        string       `json:"error,omitempty"`
	DurationSecs float64      `json:"duration_seconds"`
}

// PoolReport is one pool's part of an UpgradeReport.
type PoolReport struct {
	Pool        string         `json:"pool"`
	From        uint32         `json:"from_generation"`
	To          uint32         `json:"to_generation"`
	Moved       int            `json:"moved"`
	Stayed      int            `json:"stayed"`
	Returned    int            `json:"returned"`
	Interrupted int            `json:"interrupted"`
	Lost        int            `json:"lost"`
	Closed      int            `json:"closed"`  // ended by their peer or owner while they moved
	Drained     int            `json:"drained"` // could not move, and ended by themselves where they were
	Reasons     map[string]int `json:"reasons,omitempty"`
	StallP50    float64        `json:"stall_p50_ms"` // FREEZE sent to RESUME sent, per session
	StallP99    float64        `json:"stall_p99_ms"`
	StallMax    float64        `json:"stall_max_ms"`
	OldPIDs     []int          `json:"old_pids"`
	NewPIDs     []int          `json:"new_pids"`
	Aborted     bool           `json:"aborted,omitempty"`
	OneWay      string         `json:"one_way,omitempty"` // why there is no way back to the old generation
	Error       string         `json:"error,omitempty"`
}

// MarshalJSON writes lists without an element as [], which scripts can count.
func (r UpgradeReport) MarshalJSON() ([]byte, error) {
	type plain UpgradeReport
	if r.Pools == nil {
		r.Pools = []PoolReport{}
	}
	return json.Marshal(plain(r))
}

// MarshalJSON writes lists without an element as [].
func (r PoolReport) MarshalJSON() ([]byte, error) {
	type plain PoolReport
	if r.OldPIDs == nil {
		r.OldPIDs = []int{}
	}
	if r.NewPIDs == nil {
		r.NewPIDs = []int{}
	}
	return json.Marshal(plain(r))
}

// SupervisorReport is what `upgrade --supervisor` did.
type SupervisorReport struct {
	Outcome       Outcome `json:"exit_code"`
	OldPID        int     `json:"old_pid"`
	NewPID        int     `json:"new_pid"`
	OldGeneration uint32  `json:"old_generation"`
	Error         string  `json:"error,omitempty"`
	DurationSecs  float64 `json:"duration_seconds"`
}

// Progress is a line about a running operation.
type Progress struct {
	Text  string `json:"text"`
	Done  int    `json:"done,omitempty"`
	Total int    `json:"total,omitempty"`
}

// Backend is what the API drives; the supervisor implements it. All methods may be
// called concurrently.
type Backend interface {
	Status(ctx context.Context) (*Status, error)
	Sessions(ctx context.Context) ([]Session, error)
	// Upgrade blocks until done. It reports a refusal in the report, not as an
	// error; an error means that nothing was started (for example ErrBusy).
	Upgrade(ctx context.Context, r UpgradeRequest, progress func(Progress)) (*UpgradeReport, error)
	// Plan says what an upgrade would do, and starts nothing, but for a worker to ask
	// where that is wanted.
	Plan(ctx context.Context, r UpgradeRequest) (*UpgradePlan, error)
	// Abort takes back what is under way in a pool, or in all, and blocks until that is
	// done. An error means that nothing was under way.
	Abort(ctx context.Context, r AbortRequest, progress func(Progress)) (*UpgradeReport, error)
	// Scale, Drain and Rebalance block until done, as Upgrade.
	Scale(ctx context.Context, r ScaleRequest, progress func(Progress)) (*TaskReport, error)
	Drain(ctx context.Context, r DrainRequest, progress func(Progress)) (*TaskReport, error)
	Rebalance(ctx context.Context, r RebalanceRequest, progress func(Progress)) (*TaskReport, error)
	// UpgradeSupervisor replaces the supervisor itself; this process exits soon
	// after the answer has been sent.
	UpgradeSupervisor(ctx context.Context, progress func(Progress)) (*SupervisorReport, error)
	// Rekey has KeyUpdates sent, and blocks until that is done or its time is over. An
	// error means that nothing was started.
	Rekey(ctx context.Context, r RekeyRequest, progress func(Progress)) (*RekeyReport, error)
	// Stop ends the unit: no new connections, sessions closed with close_notify
	// within grace.
	Stop(ctx context.Context, grace time.Duration) error
}
