package handoff

import (
	"errors"
	"testing"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// A session whose PARKED is still waiting when the supervisor goes away was given to
// nobody: it goes on here, alone or with its group.
func TestParkedThatNeverLeft(t *testing.T) {
	for _, group := range []string{"", "g"} {
		t.Run("group "+group, func(t *testing.T) {
			p := startProc(t, echoHandler)
			s := software(t)
			s.group = group
			e := newEpoch()
			p.send(&wire.Message{Type: wire.TypeAdopt, Group: group, Last: group != "", Items: []wire.Item{s.item(e)}})
			p.expect(wire.TypeAdopted)
			s.epoch = e
			p.send(&wire.Message{Type: wire.TypeResume, Group: group, Last: group != "", Refs: []wire.Ref{s.own()}})
			s.say("before", "before")
			// More answers than this supervisor and the channel take.
			for i := range cap(p.msgs) + 5000 {
				p.send(&wire.Message{Type: wire.TypePing, Nonce: uint64(i)})
			}
			e = newEpoch()
			p.send(&wire.Message{Type: wire.TypeFreeze, Group: group, Last: group != "", Refs: []wire.Ref{s.ref(e)}})
			waitFor(t, "PARKED", func() bool {
				sent := make(chan bool, 1)
				p.w.in.post(func() { sent <- p.w.sessions[s.id] != nil && p.w.sessions[s.id].sent == e })
				return <-sent
			})
			_ = p.ch.Close()
			for range p.msgs { // until the reader has ended
			}
			s.say("after it", "after it")
			_ = s.cli.CloseWrite()
			if err := p.result(); !errors.Is(err, ErrSupervisorGone) {
				t.Errorf("Serve: %v", err)
			}
		})
	}
}
