package faults

import (
	"slices"
	"strings"
)

// actions lists what can go wrong at a step, by what kind of step it is.
func actions(s Step) []string {
	word, rest, _ := strings.Cut(s.Name, "-")
	switch {
	case traffic(s):
		return []string{"kill"}
	case s.Role == "keeper": // it is not meant to die, only to be short of something
		return []string{"stop", "delay", "nofile"}
	case strings.HasPrefix(s.Name, "before-send-"):
		list := []string{"kill", "stop", "close", "drop", "delay", "repeat", "fill", "fail=ENOBUFS"}
		if s.Name == "before-send-ADOPT" || s.Name == "before-send-PARKED" {
			list = append(list, "fail=ETOOMANYREFS", "nofile")
		}
		return append(list, PeerClose, PeerReset, PeerHalf)
	case s.Name == "after-send-READY" || s.Name == "after-send-FREEZE":
		return []string{"kill", "stop", "close", "nofile"} // no room for the descriptors that come next
	case strings.HasPrefix(s.Name, "after-send-"):
		return []string{"kill", "stop", "close"}
	case word == "recv":
		return []string{"kill", "stop", "close", PeerReset}
	case word == "handled":
		return []string{"kill"}
	case strings.HasPrefix(rest, "keeper-put") && word == "before":
		return []string{"kill", "stop", "fail=ETOOMANYREFS", "nofile"}
	case strings.HasPrefix(rest, "keeper-") && word == "before":
		return []string{"kill", "stop", "fail=EMFILE", "nofile"}
	case strings.HasPrefix(rest, "set-key") && word == "before":
		return []string{"kill", "stop", "fail=EBUSY", KillOld}
	case rest == "memfd":
		return []string{"kill", "fail=EMFILE", "fail=ENOMEM", "nofile"}
	case rest == "import":
		return []string{"kill", "stop", "nofile"}
	case strings.HasSuffix(s.Name, "-ledger"):
		return []string{"kill", "stop", KillOld, KillNew}
	default:
		return []string{"kill", "stop"}
	}
}

// traffic says whether a step is of the data, not of the control.
func traffic(s Step) bool {
	return strings.HasSuffix(s.Name, "-register") || strings.Contains(s.Name, "-socket-recv") || strings.Contains(s.Name, "-socket-send")
}

// times are when a step of the data fails: each has its own place among records.
var times = []int{1, 5, 23, 60}

// kept names messages that are not dropped, because nobody would ask again and a session
// would stand still until the next inventory: the socket that carries them loses none.
var kept = []string{"RESUME", "INVENTORY", "INVENTORY_REPLY"}

// Cases makes the cases of an operation from the steps that a run of it has passed. every
// step fails when it is passed for the first time; with twice set also when it is passed
// for the second time.
func Cases(op string, steps []Step, twice bool) []Case {
	var list []Case
	for _, s := range steps {
		heartbeat := strings.HasSuffix(s.Name, "-PING") || strings.HasSuffix(s.Name, "-PONG")
		if s.Role == "keeper" && s.Name == "before-reply" || heartbeat && op != Upgrade {
			continue // the heart beats when it likes; once is enough
		}
		for _, a := range actions(s) {
			message := strings.TrimPrefix(s.Name, "before-send-")
			switch {
			case (op == Exact || op == Committed) && a != "kill":
				continue
			case op == Traffic != traffic(s) && op != Exact && op != Committed:
				continue // a kill in the traffic is the same in every operation
			case traffic(s) && op != Committed:
				for _, n := range times {
					if n < s.Count {
						list = append(list, Case{op, Fault{s.Role, s.Name, n, a}})
					}
				}
				continue
			case a == "drop" && slices.Contains(kept, message):
				continue
			case a == KillNew && op != Upgrade && op != Restart:
				continue
			}
			list = append(list, Case{op, Fault{s.Role, s.Name, 1, a}})
			if twice && s.Count > 1 && (a == "kill" || a == "stop") {
				list = append(list, Case{op, Fault{s.Role, s.Name, 2, a}})
			}
		}
	}
	return list
}
