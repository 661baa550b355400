package faults

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/admin"
	"github.com/ktlsvisor/ktlsvisor/internal/e2e/visor"
)

// Seen is what the clients saw.
type Seen struct {
	Lost, Interrupted, Unclean int
	WrongBytes, Frames         int64
	Examples                   []string
}

// Result is how a case ended.
type Result struct {
	Case
	Reached  bool // the fault was carried out
	NoVictim bool // the process to be killed was not there
	Exit     int  // of the operation's command; -1: there is none
	Said     string
	Report   admin.UpgradeReport
	Seen     Seen
	Counters admin.Counters // at the end
	Reasons  map[string]uint64
	Detached int      // workers that go on without a channel
	Refused  int      // clients that could not connect meanwhile
	Wrong    []string // what the design does not allow
	Steps    []Step   // with Options.Trace
	Took     time.Duration
	Log      string // the unit's
}

// Step is a step that a process passed, and how often.
type Step struct {
	Role, Name string
	Count      int
}

func (r *Result) wrong(format string, args ...any) {
	r.Wrong = append(r.Wrong, fmt.Sprintf(format, args...))
}

// OK says that the fault was reached and nothing happened that must not.
func (r *Result) OK() bool { return len(r.Wrong) == 0 && (r.Reached || r.Case.Fault.Role == "") }

// quiet says that the unit serves with all its workers and has nothing under way. A
// worker whose channel ended goes on with the sessions that it has, as others do whose
// sessions found no safe point.
func quiet(st *admin.Status) bool {
	for _, p := range st.Pools {
		ready := 0
		for _, w := range p.Workers {
			switch {
			case w.State == "ready" && w.Generation == p.Generation:
				ready++
			case w.State == "detached":
			default:
				return false
			}
		}
		if p.Upgrading || ready < 2 {
			return false
		}
	}
	return st.Sessions.Parked == 0
}

func (r *run) awaitQuiet() (*admin.Status, error) {
	return r.unit.Await(r.Patience, "the unit to come to rest", quiet)
}

func (r *run) settled(n int) (*admin.Status, error) {
	return r.unit.Await(r.Patience, fmt.Sprintf("%d sessions", n), func(st *admin.Status) bool { return quiet(st) && st.Sessions.Total == n })
}

// recovered checks that everybody who lives is served, and that nothing is in the way of
// what comes next.
func (r *run) recovered() error {
	if err := r.crowd.advance(r.Patience); err != nil {
		return err
	}
	r.crowd.phase("after", false)
	st, err := r.awaitQuiet()
	if err != nil {
		return err
	}
	if r.res.Detached = detached(st); r.res.Detached > 0 {
		return nil // what they have cannot move
	}
	res := r.unit.Run("upgrade", "--wait", r.Patience.String())
	st, err = r.awaitQuiet()
	if err != nil {
		return err
	}
	if res.Code == 4 { // the end of a channel that was closed takes a while to be seen
		r.res.Detached = detached(st)
	}
	if res.Code != 0 && r.res.Detached == 0 {
		r.res.wrong("an upgrade afterwards: %s", res)
	}
	return nil
}

// detached is how many workers go on without a control channel.
func detached(st *admin.Status) (n int) {
	for _, p := range st.Pools {
		for _, w := range p.Workers {
			if w.State == "detached" {
				n++
			}
		}
	}
	return n
}

// wind lets the clients end, and compares all accounts.
func (r *run) wind() error {
	r.res.Seen = r.crowd.stop(r.Patience)
	st, err := r.unit.Await(r.Patience, "all sessions to have ended", func(st *admin.Status) bool { return quiet(st) && st.Sessions.Total == 0 })
	if err != nil {
		return err
	}
	r.res.Counters, r.res.Reasons = st.Counters, st.Reasons
	r.judge()
	var n int
	_, err = r.unit.Await(r.Patience, "the keeper's descriptors to be as many as before", func(st *admin.Status) bool {
		n, _ = visor.Descriptors(r.unit.KeeperPID())
		return n <= r.keeperFDs
	})
	if err != nil {
		r.res.wrong("the keeper has %d descriptors, %d before there was a client", n, r.keeperFDs)
	}
	return nil
}

// judge compares the clients' account, the unit's, and what the design allows.
func (r *run) judge() {
	s, c := r.res.Seen, r.res.Counters
	if s.WrongBytes > 0 || s.Unclean > 0 {
		r.res.wrong("%d wrong bytes, %d ends without close_notify: %v", s.WrongBytes, s.Unclean, s.Examples)
	}
	if sum := c.ClosedByPeer + c.ClosedByOwner + c.ClosedUnknown + c.Lost; sum != c.Accepted {
		r.res.wrong("%d accepted, but %d ended: %+v", c.Accepted, sum, c)
	}
	// Who has left does not see that the session was lost; nor does who never got an echo.
	unseen := r.res.Refused
	if r.crowd.gone {
		unseen += peers
	}
	if c.Lost < uint64(s.Lost) || c.Lost > uint64(s.Lost+unseen) {
		r.res.wrong("the clients lost %d sessions, the unit counts %d: %v", s.Lost, c.Lost, s.Examples)
	}
	if uint64(s.Interrupted) > c.Interrupted {
		r.res.wrong("%d clients miss bytes, the unit counts %d interrupted", s.Interrupted, c.Interrupted)
	}
	if s.Interrupted > 0 && r.c.commits() {
		r.res.wrong("%d clients miss bytes, though everything is committed", s.Interrupted)
	}
	// Nobody knows what a worker has heard whose channel has ended, or could not be taken
	// over: it may be killed.
	cut := r.c.closesChannel() || r.res.Detached > 0 || r.c.Op == Restart && r.c.shortage()
	if c.Interrupted > 0 && !r.c.killsWorker() && !cut {
		r.res.wrong("%d interrupted, though no worker died", c.Interrupted)
	}
	if c.Lost > 0 && !r.mayLose() {
		r.res.wrong("%d lost: %v %v", c.Lost, s.Examples, r.res.Report.Pools)
	}
	// A worker that dies takes along what it has not said of a client that has just left.
	leaving := r.c.killsWorker() && (r.c.Op == Accept || r.crowd.gone) && c.ClosedUnknown <= peers
	if c.ClosedUnknown > 0 && r.res.Detached == 0 && !r.c.closesChannel() && !leaving {
		r.res.wrong("%d sessions ended of which nobody knows how", c.ClosedUnknown)
	}
	if r.res.Exit == 3 && c.Lost == 0 || r.res.Exit == 2 {
		r.res.wrong("exit code %d: %s", r.res.Exit, r.res.Said)
	}
	if r.res.Exit == 0 && c.Lost > 0 {
		r.res.wrong("exit code 0, though %d were lost", c.Lost)
	}
	if r.res.Refused > 0 && !r.c.killsSupervisor() && !r.c.killsWorker() && !r.c.shortage() {
		r.res.wrong("%d clients could not connect", r.res.Refused)
	}
}

// mayLose: a session that the keeper does not have yet dies with the supervisor, or if the
// keeper cannot take it.
func (r *run) mayLose() bool {
	if r.c.Op == Accept && (r.c.killsSupervisor() || r.c.shortage()) {
		return true
	}
	// In the software layer a worker without a journal takes its sessions along.
	return r.Layer == "software" && r.c.killsWorker() && r.c.shortage() && r.unit != nil && strings.Contains(r.unit.Log(), "keeps no journals")
}

// end stops the unit as its operator would.
func (r *run) end() {
	if len(r.res.Wrong) > 0 {
		return
	}
	select {
	case <-r.unit.Ended():
		r.res.wrong("the unit has ended")
		return
	default:
	}
	if err := r.unit.Stop(); err != nil {
		r.res.wrong("%v", err)
	}
}

var bad = regexp.MustCompile(`DATA RACE|panic:|fatal error:`)

func (r *run) readLog() {
	r.res.Log = r.unit.Log()
	if m := bad.FindString(r.res.Log); m != "" {
		r.res.wrong("the log has %q", m)
	}
}

// readTrace takes what was passed after the faults that belong to the operation.
func (r *run) readTrace() {
	if !r.Trace {
		return
	}
	file := filepath.Join(r.fault, "trace")
	b, err := os.ReadFile(file)
	if err != nil {
		r.res.wrong("%v", err)
	}
	_ = os.Remove(file)
	skip := len(r.c.faults())
	index := map[string]int{}
	for line := range strings.Lines(string(b)) {
		role, name, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch {
		case name == "FIRED":
			skip--
			continue
		case skip > 0:
			continue
		}
		i, ok := index[line]
		if !ok {
			i = len(r.res.Steps)
			index[line] = i
			r.res.Steps = append(r.res.Steps, Step{Role: role, Name: name})
		}
		r.res.Steps[i].Count++
	}
}
