package faults

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Operations: what is under way when something fails.
const (
	Upgrade    = "upgrade"    // a pool goes to a new program
	Adoption   = "adoption"   // a worker was killed, its sessions find another one
	Accept     = "accept"     // clients connect
	Rekey      = "rekey"      // keys change, by the operator's word and by the clients'
	Succession = "succession" // the supervisor is replaced as planned
	Restart    = "restart"    // the supervisor was killed in the middle of an upgrade
	Return     = "return"     // a worker of the new generation was killed in the middle of an upgrade
	Traffic    = "traffic"    // clients send and receive
	Exact      = "exact"      // likewise, with workers that commit
	Committed  = "committed"  // an upgrade, with workers that commit
)

// Operations lists them in the order of the table.
var Operations = []string{Upgrade, Adoption, Accept, Rekey, Succession, Restart, Return, Traffic, Exact, Committed}

// commits says whether the workers of a case commit what they do: then no client misses a
// byte whatever dies.
func (c Case) commits() bool { return c.Op == Exact || c.Op == Committed }

// worker is the program of a case's workers.
func (c Case) worker() string {
	if c.commits() {
		return "committing"
	}
	return "echo"
}

// before is what has to happen before the fault that a case of the operation is about.
var before = map[string]Fault{
	Restart: {"supervisor", "before-send-RESUME", 1, "kill"},
	Return:  {"new", "before-send-ADOPTED", 1, "kill"},
}

// Fault is something that goes wrong once.
type Fault struct {
	Role   string // keeper, supervisor, successor, old (a worker of the program that ran first), new
	Step   string // as in package fault
	N      int    // when the process comes to the step for the Nth time
	Action string // of package fault, or one of those that follow
}

// Actions that the runner carries out while the process holds at the step.
const (
	PeerClose = "peer-close" // clients end their sessions with close_notify and FIN
	PeerReset = "peer-reset" // with RST
	PeerHalf  = "peer-half"  // with FIN alone
	KillOld   = "kill-old"   // another process is killed
	KillNew   = "kill-new"
	KillSup   = "kill-sup"
)

func (f Fault) String() string { return fmt.Sprintf("%s %s %d %s", f.Role, f.Step, f.N, f.Action) }

func (f Fault) held() bool {
	return slices.Contains([]string{PeerClose, PeerReset, PeerHalf, KillOld, KillNew, KillSup}, f.Action)
}

// line is the fault in a plan of package fault.
func (f Fault) line() string {
	if f.held() {
		f.Action = "hold"
	}
	return f.String()
}

// Case is one operation and what goes wrong in it.
type Case struct {
	Op    string
	Fault Fault // the zero value: nothing
}

// String is what ParseCase reads.
func (c Case) String() string {
	if c.Fault.Role == "" {
		return c.Op
	}
	return c.Op + ": " + c.Fault.String()
}

// ParseCase reads "OPERATION" or "OPERATION: ROLE STEP N ACTION".
func ParseCase(s string) (c Case, err error) {
	op, fault, found := strings.Cut(s, ":")
	c.Op = strings.TrimSpace(op)
	if !slices.Contains(Operations, c.Op) {
		return c, fmt.Errorf("case %q: no such operation; there are %s", s, strings.Join(Operations, ", "))
	}
	if !found {
		return c, nil
	}
	w := strings.Fields(fault)
	if len(w) != 4 {
		return c, fmt.Errorf("case %q: want OPERATION: ROLE STEP N ACTION", s)
	}
	n, err := strconv.Atoi(w[2])
	if err != nil || n < 1 {
		return c, errors.Join(fmt.Errorf("case %q: the number is wrong", s), err)
	}
	c.Fault = Fault{w[0], w[1], n, w[3]}
	return c, nil
}

// faults are all that a case has, in their order.
func (c Case) faults() []Fault {
	var list []Fault
	if f, ok := before[c.Op]; ok {
		list = append(list, f)
	}
	if c.Fault.Role != "" {
		list = append(list, c.Fault)
	}
	return list
}

// killsWorker says whether a worker dies in the case, by intent.
func (c Case) killsWorker() bool {
	if c.Op == Adoption {
		return true
	}
	return slices.ContainsFunc(c.faults(), func(f Fault) bool {
		return f.Action == "kill" && (f.Role == "old" || f.Role == "new") || f.Action == KillOld || f.Action == KillNew
	})
}

// killsSupervisor likewise.
func (c Case) killsSupervisor() bool {
	return slices.ContainsFunc(c.faults(), func(f Fault) bool {
		return f.Action == "kill" && (f.Role == "supervisor" || f.Role == "successor") || f.Action == KillSup
	})
}

// closesChannel says whether the channel of a worker ends.
func (c Case) closesChannel() bool { return c.Fault.Action == "close" }

// shortage says whether something runs out.
func (c Case) shortage() bool {
	return c.Fault.Action == "nofile" || strings.HasPrefix(c.Fault.Action, "fail=")
}
