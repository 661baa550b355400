package supervise

import (
	"testing"
	"time"

	"github.com/ktlsvisor/ktlsvisor/internal/wire"
)

// The window follows the time that a batch takes, within its bounds, and one slow moment
// counts once.
func TestPace(t *testing.T) {
	var p pace
	now := time.Unix(1000, 0)
	batch := func(took time.Duration) {
		var m wire.Message
		for id := range uint64(20) {
			m.Items = append(m.Items, wire.Item{Ref: wire.Ref{ID: id + 1}})
			m.Refs = append(m.Refs, wire.Ref{ID: id + 1})
		}
		p.parked(&m, now)
		now = now.Add(took)
		p.adopted(&m, now)
	}
	if p.window() != paceFirst {
		t.Errorf("begins with %d", p.window())
	}
	for range 20 {
		batch(time.Millisecond)
	}
	if p.window() != window {
		t.Errorf("quick batches give a window of %d", p.window())
	}
	batch(4 * time.Millisecond)
	if p.window() != window {
		t.Errorf("neither quick nor slow: %d", p.window())
	}
	batch(20 * time.Millisecond)
	p.took(20*time.Millisecond, now) // of the same moment
	if p.window() != window*3/4 {
		t.Errorf("one slow moment: %d", p.window())
	}
	for range 30 {
		batch(time.Duration(p.window()) * time.Millisecond)
	}
	if n := p.window(); n > 3*paceLeast {
		t.Errorf("batches as slow as they are large give a window of %d", n)
	}
	for range 60 {
		batch(50 * time.Millisecond)
	}
	if n := p.window(); n < window/2 {
		t.Errorf("where small batches take as long as large ones: %d", n)
	}
	for range 200 {
		batch(time.Duration(p.window()) * 250 * time.Microsecond)
	}
	if n := p.window(); n < paceLeast || n > 40 {
		t.Errorf("on a quick machine again: %d", n)
	}
	for id := range uint64(10 * window) { // sessions that nobody adopts are forgotten
		p.parked(&wire.Message{Items: []wire.Item{{Ref: wire.Ref{ID: id + 1}}}}, now)
	}
	if len(p.offered) > 4*window+1 {
		t.Errorf("%d batches remembered", len(p.offered))
	}
}
