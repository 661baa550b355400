package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
)

// plan is upgrade --dry-run.
func (a *app) plan(ctx context.Context, req admin.UpgradeRequest, command string, asJSON bool) error {
	c := a.client()
	st, err := c.Status(ctx)
	if err == nil {
		err = completeCommand(&req, command, st)
	}
	var coded *codedError
	if errors.As(err, &coded) {
		return err
	}
	var plan *admin.UpgradePlan
	if err == nil {
		plan, err = c.Plan(ctx, req)
	}
	if err != nil {
		return a.noReport(err, asJSON, admin.UpgradePlan{Outcome: exitFailed, Error: err.Error()}, exitFailed)
	}
	return answer(a, asJSON, plan, printPlan, plan.Outcome)
}

func printPlan(w io.Writer, plan *admin.UpgradePlan) {
	rows := [][]string{{"POOL", "GENERATION", "SESSIONS", "MOVABLE NOW", "AFTER DRAIN", "NEVER", "GROUPS", "ESTIMATE"}}
	for _, p := range plan.Pools {
		rows = append(rows, []string{p.Pool, fmt.Sprintf("%d -> %d", p.From, p.To), strconv.Itoa(p.Sessions), strconv.Itoa(p.Movable),
			strconv.Itoa(p.AfterDrain), strconv.Itoa(p.Never), strconv.Itoa(p.Groups), fmt.Sprintf("%.2f s", p.EstimateSecs)})
	}
	table(w, rows)
	probed := false
	for _, p := range plan.Pools {
		name := clean(p.Pool)
		for _, r := range p.Reasons {
			more := ""
			if r.Sessions > len(r.Examples) {
				more = " …"
			}
			fmt.Fprintf(w, "pool %s: %s %s: %s (%s%s)\n", name, plural(r.Sessions, "session"), strings.ReplaceAll(r.Class, "_", " "),
				clean(r.Why), clean(strings.Join(r.Examples, " ")), more)
		}
		fmt.Fprintf(w, "pool %s: program %s; estimate: %s\n", name, clean(strings.Join(p.Command, " ")), clean(p.EstimateFrom))
		if p.Probed {
			fmt.Fprintf(w, "pool %s: the new program was asked: %s\n", name, probeWord(&p))
		}
		probed = probed || p.Probed
		for _, n := range p.NotChecked {
			fmt.Fprintf(w, "pool %s: not checked: %s\n", name, clean(n))
		}
		if p.Error != "" {
			fmt.Fprintf(w, "pool %s: would be refused: %s\n", name, clean(p.Error))
		}
	}
	started := "Nothing was started. "
	if probed {
		started = "Nothing was moved. "
	}
	switch plan.Outcome {
	case admin.OutcomeMoved:
		fmt.Fprintln(w, started+"Every session could move now.")
	case admin.OutcomeStay:
		fmt.Fprintln(w, started+"Some sessions would stay with the old generation for now.")
	default:
		fmt.Fprintln(w, started+"The upgrade would be refused.")
	}
}

// probeWord says what came of the question.
func probeWord(p *admin.PoolPlan) string {
	switch {
	case p.OneWay != "":
		return clean(p.OneWay)
	case p.Error != "":
		return "it cannot take over"
	}
	return "it restores what the old one writes, and the old one what it writes"
}

// abort is upgrade --abort.
func (a *app) abort(ctx context.Context, pool string, asJSON bool) error {
	p := newProgress(a.err)
	rep, err := a.client().Abort(ctx, admin.AbortRequest{Pool: pool}, p.show)
	p.end()
	if err != nil {
		code := exitFailed
		if ctx.Err() != nil {
			code = exitSignal
			fmt.Fprintln(a.err, "It goes on going back in the supervisor.")
		}
		return a.upgradeFailed(err, asJSON, code)
	}
	return answer(a, asJSON, rep, printAbort, rep.Outcome)
}

func printAbort(w io.Writer, rep *admin.UpgradeReport) {
	printUpgradeTable(w, rep)
	text := map[admin.Outcome]string{
		admin.OutcomeMoved:   "Aborted: everything is back, nothing lost.",
		admin.OutcomeRefused: "Not aborted: it came to its end before that.",
		admin.OutcomeStay:    "Aborted: some sessions stay with the new generation for now, nothing lost.",
	}[rep.Outcome]
	if text == "" {
		text = outcomeText(rep.Outcome)
	}
	fmt.Fprintf(w, "%s (%.2f s)\n", text, rep.DurationSecs)
}
