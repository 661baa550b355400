package keeper

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/sys"
)

var errNoHello = errors.New("the first message was not HELLO")

func failed(f failure, text string) answer {
	return answer{msg: message{Failure: f, Text: short(text)}}
}

// handle answers one request and owns its descriptors.
func (k *keeper) handle(r request) answer {
	m, c := r.msg, r.ch
	if r.full != nil {
		k.log.Error("a request was refused: out of descriptors", "error", r.full)
		return failed(failFull, "too many open files in the keeper")
	}
	fds := r.fds
	defer func() { sys.CloseAll(fds) }()
	switch {
	case m.Op == opHello && !c.hello:
		fds = r.fds[1:]
		return k.hello(c, m, r.fds[0])
	case !c.hello:
		return answer{fatal: errNoHello}
	case k.doneProc != nil:
		return failed(failEnding, "")
	}
	switch m.Op {
	case opGet:
		return answer{entries: k.store.find(m.Kind, m.IDs), withFDs: true}
	case opList:
		return answer{entries: k.store.find(m.Kind, nil)}
	case opLead:
		return k.lead(c)
	case opReclaim:
		return k.reclaim(c)
	case opSuccessor:
		if c != k.leaderCh && c != k.yielded {
			return k.notLeader(m)
		}
		return k.successor()
	case opPut, opDelete, opYield, opDone:
		if c != k.leaderCh {
			return k.notLeader(m)
		}
	default:
		return answer{fatal: fmt.Errorf("unknown message %d", m.Op)}
	}
	switch m.Op {
	case opPut:
		fds = nil
		return k.put(m, r.fds)
	case opDelete:
		for i := range m.Entries {
			e := &m.Entries[i]
			k.store.remove(Key{Kind: e.Kind, ID: e.ID, Name: e.Name})
		}
	case opYield:
		k.yielded, k.leader, k.leaderCh = c, nil, nil
	case opDone:
		k.done(c, m)
	}
	return answer{}
}

func (k *keeper) notLeader(m *message) answer {
	text := ""
	if len(m.Entries) > 0 {
		e := &m.Entries[0]
		text = Key{Kind: e.Kind, ID: e.ID, Name: e.Name}.String()
	}
	return failed(failNotLeader, text)
}

// hello owns pidfd.
func (k *keeper) hello(c *channel, m *message, pidfd int) answer {
	if m.Version == 0 {
		sys.CloseAll([]int{pidfd})
		return answer{fatal: errors.New("HELLO without a version")}
	}
	p, err := k.watchProc(pidfd, false)
	if err != nil {
		return answer{fatal: fmt.Errorf("HELLO: %w", err)}
	}
	c.proc, c.hello = p, true
	p.channels++
	if k.ending {
		k.pushTerminate(c)
	}
	return answer{msg: message{Version: min(m.Version, version)}}
}

func (k *keeper) lead(c *channel) answer {
	if c.proc.dead {
		return failed(failNotLeader, "the process is dead")
	}
	if k.leader != nil && k.leader != c.proc {
		if !k.leader.dead {
			return failed(failLed, fmt.Sprintf("pid %d leads", k.leader.pid))
		}
		k.bury(k.leader)
	}
	if k.leader == nil {
		for p := range k.procs {
			if p.led && p != c.proc {
				p.retired = true
			}
		}
		k.incarnation++
		k.yielded = nil
	}
	k.takeOver(c)
	k.log.Info("a supervisor leads", "pid", c.proc.pid, "incarnation", k.incarnation)
	return answer{msg: message{Incarnation: k.incarnation}}
}

func (k *keeper) reclaim(c *channel) answer {
	switch {
	case c.proc.dead:
		return failed(failNotLeader, "the process is dead")
	case k.leader != nil && k.leader != c.proc:
		return failed(failLed, fmt.Sprintf("pid %d leads", k.leader.pid))
	case c == k.leaderCh:
		return answer{}
	case c != k.yielded:
		return failed(failNotLeader, "this process has not yielded, or another led since")
	}
	k.yielded = nil
	k.takeOver(c)
	k.log.Warn("the supervisor took the lead back", "pid", c.proc.pid, "incarnation", k.incarnation)
	return answer{}
}

// takeOver makes the process at c the leader. When it is told so, the keeper no
// longer reads the workers' output.
func (k *keeper) takeOver(c *channel) {
	k.leader, k.leaderCh = c.proc, c
	c.proc.led, c.proc.retired, c.proc.expired = true, false, false
	k.restart.clear()
	k.leadBy.clear()
	k.orphan.clear()
	k.drains.stop()
}

func (k *keeper) put(m *message, fds []int) answer {
	if len(m.Entries) == 0 {
		return answer{}
	}
	hs := make([]*held, 0, len(m.Entries))
	for i := range m.Entries {
		e := &m.Entries[i]
		n := int(e.FDs)
		hs = append(hs, newHeld(Key{Kind: e.Kind, ID: e.ID, Name: e.Name}, e.Meta, fds[:n]))
		fds = fds[n:]
	}
	if err := k.store.put(hs); err != nil {
		k.log.Error("an entry was refused", "error", err)
		return failed(failFull, err.Error())
	}
	return answer{}
}

func (k *keeper) successor() answer {
	_, peer, err := k.newChannel()
	if err != nil {
		return failed(failFull, err.Error())
	}
	return answer{msg: message{Code: replyChannel}, fds: []int{peer}}
}

func (k *keeper) done(c *channel, m *message) {
	k.log.Info("the supervisor is done", "pid", c.proc.pid, "exit", m.Code, "message", strings.ToValidUTF8(m.Text, "?"))
	k.doneProc = c.proc
	k.doneProc.done = result{code: m.Code}
	k.grace.clear()
	k.end.arm(endWait)
}

func (k *keeper) channelGone(g gone) {
	c := g.ch
	if g.err != nil {
		pid := 0
		if c.proc != nil {
			pid = c.proc.pid
		}
		k.log.Error("closed the channel to a supervisor; what it stored is kept", "pid", pid, "error", g.err)
	}
	delete(k.channels, c)
	if c == k.yielded {
		k.yielded = nil
	}
	if c.proc == nil {
		return
	}
	c.proc.channels--
	if c == k.leaderCh {
		k.leaderCh = nil
		k.orphan.arm(k.cfg.LeadWithin)
	}
	if c.proc.dead {
		k.bury(c.proc)
	}
}

// killOrphan ends a leader that has no channel any more and did not exit: it can
// store nothing, and nobody else may lead while it lives.
func (k *keeper) killOrphan() {
	if k.leader == nil || k.leaderCh != nil {
		return
	}
	k.log.Error("the supervisor lost its channel and did not exit; killing it", "pid", k.leader.pid, "after", k.cfg.LeadWithin)
	k.leader.kill(k.log)
}

// nobodyLed gives up waiting for those who might have led.
func (k *keeper) nobodyLed() {
	for p := range k.procs {
		if !p.candidate() {
			continue
		}
		k.log.Error("a supervisor did not lead in time; starting another", "pid", p.pid, "limit", k.cfg.LeadWithin)
		p.expired = true
		if p.spawned && !p.led {
			p.kill(k.log)
		}
	}
}

// reconsider runs after every event: it sees to it that somebody leads.
func (k *keeper) reconsider() {
	if k.leader != nil || k.doneProc != nil || k.result != nil {
		return
	}
	if !k.drains.on {
		entries := k.store.find(KindOutput, nil)
		k.drains.start(entries)
		releaseAll(entries)
	}
	waiting := false
	for p := range k.procs {
		waiting = waiting || p.candidate()
	}
	switch {
	case k.ending && !waiting:
		k.result = &result{}
	case k.ending:
	case waiting:
		k.leadBy.arm(k.cfg.LeadWithin)
	default:
		k.leadBy.clear()
		k.restart.arm(k.pause())
	}
}

// pause before the next start.
func (k *keeper) pause() time.Duration {
	if k.quick < 2 {
		return 0
	}
	d := k.cfg.Backoff.Min
	for range k.quick - 2 {
		if d *= 2; d >= k.cfg.Backoff.Max {
			break
		}
	}
	return min(d, k.cfg.Backoff.Max)
}
