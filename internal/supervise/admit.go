package supervise

import (
	"errors"

	"github.com/ktlsvisor/ktlsvisor/internal/keeper"
	"github.com/ktlsvisor/ktlsvisor/internal/sys"
	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// admitSession enters a new session into the ledger: first its record state, then
// its socket at the keeper, then a worker. It owns a.fd.
func (s *Supervisor) admitSession(a *admission) {
	p := s.pools[a.facts.Pool]
	if p == nil || s.stopping || len(s.freeSlots) == 0 || len(s.sessions) >= s.cfg.MaxSessions {
		why := "max_sessions is reached"
		switch {
		case p == nil:
			why = "its pool does not exist"
		case s.stopping:
			why = "the unit is stopping"
		}
		s.log.Warn("session refused", "peer", a.facts.Peer, "why", why)
		s.led.count(cntHandshakeRefused, 1)
		_ = sys.ShutdownBoth(a.fd)
		sys.CloseAll([]int{a.fd})
		return
	}
	slot := s.freeSlots[len(s.freeSlots)-1]
	s.freeSlots = s.freeSlots[:len(s.freeSlots)-1]
	ss := &session{slot: uint32(slot), pool: p, accepted: s.now().UnixNano(), software: a.software}
	ss.ID, ss.X = s.led.nextID(), ss
	if !p.cfg.Retain {
		a.facts.Cookie, _ = sys.SocketCookie(a.fd) // 0 is found out when it is to be compared
	}
	if !a.software {
		a.facts.Base = a.record
	}
	err := s.led.putFacts(slot, &a.facts)
	if errors.Is(err, errTooLarge) {
		err = s.keepBigFacts(ss, a)
	}
	if err == nil {
		_, err = ss.allFacts(s.led) // what cannot be read back would be a session nobody can adopt
	}
	switch {
	case err != nil:
	case a.software:
		ss.kept, err = s.led.keepRecord(ss.ID, a.record)
	default:
		err = s.enterKeys(slot, a.secrets)
	}
	if err != nil {
		s.log.Error("session refused: it does not fit the ledger", "peer", a.facts.Peer, "error", err)
		s.led.count(cntHandshakeRefused, 1)
		_ = sys.ShutdownBoth(a.fd)
		sys.CloseAll([]int{a.fd})
		s.led.free(slot)
		s.freeSlots = append(s.freeSlots, slot)
		return
	}
	s.m.Admit(&ss.Session)
	s.carryOut()
	s.trim.Did(1)
	s.led.count(cntAccepted, 1)
	s.sessions[ss.ID] = ss
	s.log.Debug("session", "session", sid(ss.ID), "peer", a.facts.Peer, "pool", p.name, "software", a.software, "reason", a.facts.Reason)
	rec := a.record
	s.retain.put(keeper.Entry{Key: ss.key(), FDs: []int{a.fd}}, func(err error) {
		if s.sessions[ss.ID] != ss {
			return
		}
		if err != nil {
			s.lose(ss, "the keeper cannot hold its socket: "+err.Error())
			return
		}
		s.park(ss, wire.Cargo{Record: rec}, 0)
	})
}

// keepBigFacts stores facts that are too large for the slot (a client's
// certificates) with the keeper.
func (s *Supervisor) keepBigFacts(ss *session, a *admission) error {
	fd, err := sys.SealedMemfd("ktlsvisor-facts", a.facts.Facts)
	if err != nil {
		return err
	}
	ss.edit().bigFacts = a.facts.Facts
	if err := s.led.putBigFacts(int(ss.slot), &a.facts); err != nil {
		sys.CloseAll([]int{fd})
		return err
	}
	s.retain.put(keeper.Entry{Key: ss.overflowKey(), FDs: []int{fd}}, nil)
	return nil
}

// inspectLost looks whether a session of the software layer, whose worker died,
// had ended already; if not, it is lost.
func (s *Supervisor) inspectLost(ss *session) {
	s.retain.inspect(ss.ID, func(open bool) {
		if s.sessions[ss.ID] != ss {
			return
		}
		if open {
			s.m.SettledLost(&ss.Session, "its worker died, and its record state with it (software layer, no journal)")
			return
		}
		s.m.SettledGone(&ss.Session)
	})
}
