package handoff

// beacon is a state that others may wait for. There is a channel only once somebody
// asked for it, because a program may have very many sessions of which nobody does.
// The lock that guards it is its user's.
type beacon struct {
	on bool
	ch chan struct{}
}

// wait returns a channel that is closed while it is on. Ask again after clear:
// the channel is another one then.
func (s *beacon) wait() <-chan struct{} {
	if s.ch == nil {
		s.ch = make(chan struct{})
		if s.on {
			close(s.ch)
		}
	}
	return s.ch
}

func (s *beacon) set() {
	if !s.on && s.ch != nil {
		close(s.ch)
	}
	s.on = true
}

func (s *beacon) clear() {
	if s.on {
		s.on, s.ch = false, nil
	}
}
