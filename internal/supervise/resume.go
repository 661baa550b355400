package supervise

import (
	"fmt"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
)

// A supervisor that takes over in the middle of an upgrade goes by the generation that
// the keeper remembers as serving. Workers of any other are emptied and stopped: so a
// canary comes back to the old generation, and a move to the new one goes on, without
// anything else being remembered. Only a probation is more than that: while it lasts,
// and while sessions move that are to have one, there has to be a way back.

// probationRecord is what the keeper remembers of an upgrade with a probation, from
// when the new generation serves.
type probationRecord struct {
	From    uint32        `json:"from"`
	Command []string      `json:"command"` // of generation From
	Length  time.Duration `json:"length"`
	Until   time.Time     `json:"until,omitzero"` // zero: not everything has moved
}

// record is what the keeper is to remember of an operation besides the serving
// generation.
func (op *operation) record() *probationRecord {
	if op.kind != opUpgrade || op.opts.probation <= 0 || op.phase != opMoving && op.phase != opProbation {
		return nil
	}
	r := &probationRecord{From: op.from, Command: op.oldCommand, Length: op.opts.probation}
	if op.phase == opProbation {
		r.Until = op.deadline
	}
	return r
}

// resumeUpgrade goes on with an upgrade that has a probation. Nobody waits for its
// report any more; the log has it.
func (s *Supervisor) resumeUpgrade(p *pool) {
	r := p.resume
	p.resume = nil
	if r == nil || p.op != nil {
		return
	}
	now := s.now()
	op := &operation{kind: opUpgrade, pool: p, from: r.From, to: p.serving, command: p.command, oldCommand: r.Command,
		opts: upgradeOptions{probation: r.Length, noReturn: true, rate: p.restRate}, began: now, wait: defaultWait, phase: opMoving, deadline: now.Add(defaultWait)}
	op.report = admin.PoolReport{Pool: p.name, From: op.from, To: op.to}
	if !r.Until.IsZero() {
		// The clock may have been set meanwhile: no longer than it was to be.
		op.phase, op.deadline = opProbation, now.Add(min(r.Until.Sub(now), r.Length))
	}
	if !s.canGoBack(op) {
		return
	}
	p.op = op
	s.log.Info("upgrade goes on", "pool", p.name, "from", op.from, "to", op.to, "phase", op.phase.String())
	_ = s.compatible(op) // for the way back only: it was compatible when it began
	if p.count(op.to, workerReady) < p.cfg.Workers {
		s.failUpgrade(op, fmt.Errorf("a worker of generation %d died while there was no supervisor", op.to))
	}
}
