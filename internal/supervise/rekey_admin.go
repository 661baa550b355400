package supervise

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// The operator's word: KeyUpdates for one session, many, or all.

const (
	// rekeyWindow is how many sessions of one request are under way at once.
	rekeyWindow = 64
	// rekeySlow is when a session no longer counts in the window: its client does not
	// read, perhaps, and others should not wait for that.
	rekeySlow = time.Second
	// rekeyWait is how long a request may take that does not say.
	rekeyWait = 30 * time.Second
)

// Why a session's keys do not change.
var (
	errSessionEnded  = errors.New("the session has ended")
	errNoKeyUpdate   = errors.New("TLS 1.2 has no KeyUpdate")
	errKernelCannot  = errors.New("its record layer is the kernel's, and this kernel cannot change keys (6.14 or newer can)")
	errOnTheMove     = errors.New("the session is on its way to another worker; ask again")
	errUnreachable   = errors.New("its worker cannot be reached; ask again")
	errNotTheWorker  = errors.New("its worker was built before keys could be changed; upgrade the pool")
	errBeingReplaced = errors.New("the supervisor is being replaced; ask again")
)

// updateKeys has a KeyUpdate sent in one session. then is told, in the goroutine that
// owns the ledger, how it went; it must not wait.
func (s *Supervisor) updateKeys(ss *session, request bool, then func(error)) {
	f, err := ss.allFacts(s.led)
	switch {
	case err != nil:
	case f.Version != tls.VersionTLS13:
		err = errNoKeyUpdate
	case !ss.software && !s.kernel.Rekey:
		err = errKernelCannot
	case s.quiescing:
		err = errBeingReplaced
	case ss.owner() == nil, ss.Try != nil, ss.Withheld:
		err = errOnTheMove
	case !ss.owner().usable():
		err = errUnreachable
	case !ss.owner().rekeys:
		err = errNotTheWorker
	}
	if err != nil {
		then(err)
		return
	}
	r := ss.change()
	r.waiters = append(r.waiters, then)
	r.retryAt = time.Time{}
	o := owesUpdate
	if request {
		o |= owesRequest
	}
	switch {
	case !ss.software:
		s.startUpdate(ss, o)
	case r.stage == stageNone:
		r.stage = stageSelf
		s.sayRekey(ss, wire.TypeUpdate, wire.Rekey{Request: request})
	}
}

// Rekey has KeyUpdates sent. One for a session that does not answer in time stays
// under way.
func (b *backend) Rekey(ctx context.Context, r admin.RekeyRequest, progress func(admin.Progress)) (*admin.RekeyReport, error) {
	if err := b.busyError(); err != nil {
		return nil, err
	}
	s := b.s
	var ids []uint64
	var err error
	if !s.call(func() { ids, err = s.rekeyTargets(r) }) {
		return nil, errEnding
	}
	if err != nil {
		return nil, err
	}
	if r.Wait <= 0 {
		r.Wait = rekeyWait
	}
	run := &rekeyRun{s: s, ids: ids, request: r.RequestPeer, wait: r.Wait, began: time.Now(), progress: progress,
		results: make(chan rekeyResult, len(ids)), pending: map[uint64]time.Time{}}
	return run.do(ctx), nil
}

// rekeyTargets are the sessions that a request means.
func (s *Supervisor) rekeyTargets(r admin.RekeyRequest) (ids []uint64, err error) {
	switch {
	case s.quiescing:
		return nil, &admin.BusyError{Since: s.now()}
	case s.recovery != nil || s.stopping:
		return nil, errors.New("the supervisor is starting or stopping; try again in a moment")
	case r.Pool != "" && s.pools[r.Pool] == nil:
		return nil, fmt.Errorf("%w: there is no pool %q", admin.ErrBadRequest, r.Pool)
	}
	for _, name := range r.Sessions {
		id, err := admin.ParseSessionID(name)
		if err != nil {
			return nil, err
		}
		if s.sessions[id] == nil {
			return nil, fmt.Errorf("%w: there is no session %s; it may have ended", admin.ErrBadRequest, sid(id))
		}
		ids = append(ids, id)
	}
	if len(r.Sessions) == 0 {
		for id, ss := range s.sessions {
			if r.Pool == "" || ss.pool.name == r.Pool {
				ids = append(ids, id)
			}
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

type rekeyResult struct {
	id  uint64
	err error
}

// rekeyRun is one request under way; it belongs to the goroutine of that request.
type rekeyRun struct {
	s        *Supervisor
	ids      []uint64 // not started yet
	request  bool
	wait     time.Duration
	began    time.Time
	progress func(admin.Progress)
	results  chan rekeyResult // has room for all, so that the ledger's goroutine never waits
	pending  map[uint64]time.Time
	done     int
	rep      admin.RekeyReport
}

func (r *rekeyRun) do(ctx context.Context) *admin.RekeyReport {
	ctx, cancel := context.WithTimeout(ctx, r.wait)
	defer cancel()
	total := len(r.ids)
	tick := time.NewTicker(rekeySlow / 4) // for what became slow
	defer tick.Stop()
	for len(r.ids) > 0 || len(r.pending) > 0 {
		if !r.start() {
			r.giveUp(errBeingReplaced, errBeingReplaced)
			break
		}
		select {
		case res := <-r.results:
			r.count(res)
			for n := len(r.results); n > 0; n-- {
				r.count(<-r.results)
			}
		case <-tick.C:
			r.progress(admin.Progress{Text: "changing keys:", Done: r.done, Total: total})
		case <-r.s.done:
			r.giveUp(errBeingReplaced, errBeingReplaced)
		case <-ctx.Done():
			r.giveUp(fmt.Errorf("no answer within %s, because its client does not read, perhaps; the change stays under way", r.wait),
				fmt.Errorf("its turn did not come within %s; ask again", r.wait))
		}
	}
	if r.rep.FailedCount > 0 {
		r.rep.Outcome = admin.OutcomeStay
	}
	r.rep.DurationSecs = time.Since(r.began).Seconds()
	return &r.rep
}

// start begins with as many sessions as the window has room for; false when the
// supervisor is no longer in charge.
func (r *rekeyRun) start() bool {
	room, now := rekeyWindow, time.Now()
	for _, at := range r.pending {
		if now.Sub(at) < rekeySlow {
			room--
		}
	}
	batch := r.ids[:min(max(room, 0), len(r.ids))]
	if len(batch) == 0 {
		return true
	}
	r.ids = r.ids[len(batch):]
	for _, id := range batch {
		r.pending[id] = now
	}
	return r.s.call(func() {
		for _, id := range batch {
			then := func(err error) { r.results <- rekeyResult{id, err} }
			if ss := r.s.sessions[id]; ss != nil {
				r.s.updateKeys(ss, r.request, then)
			} else {
				then(errSessionEnded)
			}
		}
	})
}

// giveUp counts what has not come to its end: for sessions that were started, and for
// the rest.
func (r *rekeyRun) giveUp(started, rest error) {
	for n := len(r.results); n > 0; n-- {
		r.count(<-r.results)
	}
	late := make([]uint64, 0, len(r.pending))
	for id := range r.pending {
		late = append(late, id)
	}
	slices.Sort(late)
	for _, id := range late {
		r.count(rekeyResult{id, started})
	}
	for _, id := range r.ids {
		r.count(rekeyResult{id, rest})
	}
	r.ids = nil
}

func (r *rekeyRun) count(res rekeyResult) {
	delete(r.pending, res.id)
	r.done++
	note := func(list *[]admin.SessionNote, n *int) {
		if *n++; *n <= admin.MaxRekeyListed {
			*list = append(*list, admin.SessionNote{Session: sid(res.id), Why: res.err.Error()})
		}
	}
	switch {
	case res.err == nil:
		r.rep.Updated++
	case errors.Is(res.err, errSessionEnded):
		r.rep.Ended++
	case errors.Is(res.err, errNoKeyUpdate), errors.Is(res.err, errKernelCannot):
		note(&r.rep.Unsupported, &r.rep.UnsupportedCount)
	default:
		note(&r.rep.Failed, &r.rep.FailedCount)
	}
}
